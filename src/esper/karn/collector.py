"""From the events of a run to field reports: live, or from its log."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from esper.karn.design import content_name
from esper.karn.report import ENDS, FieldReport, Placement
from esper.karn.surroundings import Surroundings
from esper.protocol import (
    AnyEvent,
    Attached,
    Germinated,
    HeldOut,
    Judged,
    Lifecycle,
    Restored,
    RunStarted,
    Telemetry,
    Transitioned,
)
from esper.worth import Choice, Place, reference_width


@dataclass
class _Open:
    """A cohort so far."""

    born: Germinated
    places: dict[str, Place]
    alive: set[int]
    judged: list[tuple[Judged, float | None]] = field(default_factory=list[tuple[Judged, float | None]])
    """Looks, each with the held-out loss then."""
    ends: list[Transitioned] = field(default_factory=list[Transitioned])

    @property
    def ended(self) -> bool:
        return not self.alive


class Collector:
    """Takes a run's events in their order (``Grower(on_event=collector.on_event)``) and makes a report of each cohort
    that has ended.

    Parameters
    ----------
    run:
        What tells this run from all others; reports of the same run, arm, seed and cohort are one.
    job:
        What is trained; a ``run_started`` event overrules it by the preset's name.
    arms:
        Arms whose events count. Controls that keep whatever they plant say nothing about worth.
    """

    def __init__(self, run: str, *, job: str = "", arms: tuple[str, ...] = ("grown",)) -> None:
        self.run, self.job, self._arms = run, job, arms
        self._trainings: dict[tuple[str, int], _Training] = {}

    def on_event(self, event: AnyEvent) -> None:
        """Take up one event."""
        if isinstance(event, RunStarted):
            self.job = event.preset
        elif event.arm in self._arms:
            self._trainings.setdefault((event.arm, event.seed), _Training()).note(event)

    def reports(self) -> list[FieldReport]:
        """All cohorts that have ended so far, by training and number."""
        return [
            _report(self, arm, seed, cohort, training.surroundings)
            for (arm, seed), training in self._trainings.items()
            for _, cohort in sorted(training.cohorts.items())
            if cohort.ended
        ]


class _Training:
    """One arm with one seed."""

    def __init__(self) -> None:
        self.surroundings = Surroundings()
        self.cohorts: dict[int, _Open] = {}

    def note(self, event: AnyEvent) -> None:
        if isinstance(event, Attached | HeldOut | Telemetry):
            self.surroundings.note(event)
        elif isinstance(event, Germinated):
            self._germinated(event)
        elif isinstance(event, Judged):
            if event.cohort in self.cohorts and event.stage == "evaluate":
                self.cohorts[event.cohort].judged.append((event, self.surroundings.held_out))
        elif isinstance(event, Transitioned):
            self._transitioned(event)
        elif isinstance(event, Restored):
            self._go_back(event.to_step)

    def _germinated(self, event: Germinated) -> None:
        sites = dict.fromkeys(event.sites)
        places = {site: self.surroundings.place(site, event.step, event.model_params) for site in sites}
        self.cohorts[event.cohort] = _Open(event, places, set(event.seeds))

    def _transitioned(self, event: Transitioned) -> None:
        cohort = self.cohorts.get(event.cohort)
        if cohort is None or cohort.ended or event.target not in ENDS:
            return
        cohort.alive -= set(event.seeds)
        cohort.ends.append(event)
        if cohort.ended:
            gain = cohort.judged[-1][0].gain if cohort.judged else None
            sites = _sites(cohort.born, set(event.seeds))
            self.surroundings.note_end(sites, gain, event.step, kept=event.target is Lifecycle.FOSSILIZED)

    def _go_back(self, step: int) -> None:
        self.cohorts = {number: cohort for number, cohort in self.cohorts.items() if cohort.born.step <= step}
        for cohort in self.cohorts.values():
            cohort.judged = [entry for entry in cohort.judged if entry[0].step <= step]
            undone = [end for end in cohort.ends if end.step > step]
            cohort.ends = [end for end in cohort.ends if end.step <= step]
            cohort.alive |= {seed for end in undone for seed in end.seeds}
        self.surroundings.go_back(step)


def _sites(born: Germinated, seeds: set[int]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(site for site, seed in zip(born.sites, born.seeds, strict=True) if seed in seeds))


def _report(collector: Collector, arm: str, seed: int, cohort: _Open, around: Surroundings) -> FieldReport:
    born, end = cohort.born, cohort.ends[-1]
    judged, held_out = cohort.judged[-1] if cohort.judged else (None, around.held_out)
    cost = born.added_flops_share if judged is None else judged.added_flops_share
    gains = [None] * 4 if judged is None else [
        _known(value) for value in (judged.gain, judged.gain_low, judged.gain_high, judged.gain_shrunken)
    ]  # fmt: skip
    return FieldReport(
        run=collector.run, job=collector.job, arm=arm, seed=seed, cohort=born.cohort, germinated=born.step,
        ended=end.step, placements=tuple(_placements(cohort, around)),
        added_params=born.added_params if judged is None else judged.added_params, added_flops_share=_known(cost),
        held_out=held_out, looks=len(cohort.judged), state=end.target, reason=end.reason, gain=gains[0],
        gain_low=gains[1], gain_high=gains[2], gain_shrunken=gains[3],
    )  # fmt: skip


def _placements(cohort: _Open, around: Surroundings) -> Iterator[Placement]:
    """One a site that was still in the cohort at its end."""
    born, last = cohort.born, set(cohort.ends[-1].seeds)
    rows = [row for row, seed in enumerate(born.seeds) if seed in last]
    counts = Counter(born.sites[row] for row in rows)
    sizes = {site: count * _of(born, site, rows)[2] for site, count in counts.items()}
    for site, count in counts.items():
        row, width, size = _of(born, site, rows)
        info = around.sites.get(site)
        reference = 1.0 if info is None else reference_width(
            info.in_features, info.out_features, info.hidden_features
        )  # fmt: skip
        choice = Choice(
            blueprint=born.blueprints[row], start=born.starts[row], growth=count * width / reference, seeds=count,
            scale=born.scales[row] if born.scales else 1.0, lr_scale=born.lr_scales[row] if born.lr_scales else 1.0,
        )  # fmt: skip
        place = cohort.places[site]
        yield Placement(
            site=site, place=place, choice=choice, width=width, params=count * size,
            design=(born.designs[row] if born.designs else "") or content_name(place.kind, choice),
            share=count * size / max(1, sum(sizes.values())),
        )  # fmt: skip


def _of(born: Germinated, site: str, rows: list[int]) -> tuple[int, int, int]:
    """First row of a site, width and parameters of one of its seeds (old logs: an even part of the cohort's)."""
    row = next(row for row in rows if born.sites[row] == site)
    params = born.params[row] if born.params else max(1, born.added_params // len(born.seeds))
    return row, born.widths[row], params


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
