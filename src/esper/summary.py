"""A run in words: what ``print(grower)`` and ``grower.report()`` show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from esper.config import Config
from esper.kasmina.discovery import Discovery
from esper.kasmina.execution import Kasmina
from esper.kasmina.ledger import Ledger
from esper.observe.credit import grafting_effect
from esper.protocol import Attached, Audited, EffectScored, Lifecycle, SiteInfo, TwinScored, Verdict
from esper.state import Loop
from esper.tamiyo import Controller
from esper.tamiyo.registry import waits_of
from esper.trials import Scored, Trials

_FARTHEST = 100_000
"""Decision points that are asked for the first at which something may grow."""


class Run(Protocol):
    """What a summary reads: a grower, seen from here."""

    config: Config
    kasmina: Kasmina
    discovery: Discovery
    loop: Loop
    controller: Controller

    @property
    def stopped(self) -> str | None: ...

    trials: Trials

    @property
    def verdicts(self) -> tuple[Verdict, ...]: ...

    @property
    def ended(self) -> Mapping[Lifecycle, int]: ...

    @property
    def held_out(self) -> float: ...

    @property
    def ledger(self) -> Ledger: ...

    def sites(self, pattern: str = "*") -> list[SiteInfo]: ...


def attached(run: Run) -> Attached:
    """What is told when a run begins."""
    kasmina, found = run.kasmina, run.discovery
    return Attached(
        step=0, sites=tuple(run.sites()), skipped=found.skipped, host_params=kasmina.host_params,
        covered_params=found.covered_params, total_steps=run.config.total_steps, notes=found.notes,
        family=kasmina.family, optimizer=kasmina.optimizer_family,
    )  # fmt: skip


def describe(run: Run) -> str:
    """At most 15 lines: coverage, what was skipped and why, what is alive."""
    kasmina, infos = run.kasmina, run.sites()
    covered = run.discovery.covered_params / max(1, kasmina.host_params)
    grown = kasmina.params - kasmina.host_params
    lines = [
        f"Grower: {len(infos)} sites covering {covered:.0%} of weights | "
        f"{kasmina.host_params:,} host parameters, {grown:,} grown | state_dict keys unchanged"
    ]
    for info in infos[:6]:
        units = kasmina.units(info.name)
        inner = f"{info.hidden_features} hidden" if info.hidden_features else "layer"
        lines.append(f"  {info.name}: {info.in_features} -> {inner} (+{units}) -> {info.out_features}")
    if len(infos) > 6:
        lines.append(f"  ... and {len(infos) - 6} more: grower.sites()")
    lines += [f"chosen by free memory: {note}" for note in run.discovery.notes[:2]]
    skipped = run.discovery.skipped
    if skipped:
        lines.append(f"skipped {len(skipped)}:")
        lines += [f"  {item.name}: {item.reason}" for item in skipped[:4]]
        if len(skipped) > 4:
            lines.append(f"  ... and {len(skipped) - 4} more: grower.discovery.skipped")
    kept = run.ended.get(Lifecycle.FOSSILIZED, 0)
    lines.append(f"{len(kasmina.cohorts)} cohorts alive, {kept} of {sum(run.ended.values())} kept | {_status(run)}")
    return "\n".join(lines)


def _status(run: Run) -> str:
    if run.stopped:
        return f"stopped: {run.stopped}"
    first = _first_to_grow(run)
    return "growing" if first is None else f"nothing germinates before step {first:,}"


def _first_to_grow(run: Run) -> int | None:
    """The decision point until which the controller waits; ``None`` where it does not, or cannot tell."""
    waits, interval, total = waits_of(run.controller), run.config.interval, run.config.total_steps
    if waits is None or run.kasmina.cohorts:
        return None
    ended, step = sum(run.ended.values()), run.loop.last_step + interval - run.loop.last_step % interval
    if not waits(step, total_steps=total, num_ended=ended):
        return None
    further = range(step, step + _FARTHEST * interval, interval)
    return next((n for n in further if not waits(n, total_steps=total, num_ended=ended)), None)


@dataclass(frozen=True)
class Report:
    """What a run grew, where, what it gained and what it cost."""

    verdicts: tuple[Verdict, ...]
    widths: dict[str, int]
    host_params: int
    params: int
    held_out: float
    flops: dict[str, float]
    stopped: str | None
    scored: tuple[Scored, ...] = ()
    """What twins, withholding and the audit found, oldest first."""
    notes: tuple[str, ...] = ()
    """What was chosen otherwise than asked, and why."""
    untold: Mapping[Lifecycle, int] = field(default_factory=dict[Lifecycle, int])
    """How many more cohorts came to each end, too long ago to be among ``verdicts``."""

    @classmethod
    def of(cls, run: Run) -> Report:
        kasmina = run.kasmina
        widths = {
            info.name: info.hidden_features + kasmina.sites[info.name].grown_units
            for info in run.sites()
            if info.kind.is_span
        }
        return cls(
            verdicts=run.verdicts,
            widths=widths,
            host_params=kasmina.host_params,
            params=kasmina.params,
            held_out=run.held_out,
            flops=dict(run.ledger.spent),
            stopped=run.stopped,
            scored=tuple(run.trials.scored),
            notes=run.discovery.notes,
            untold=Counter(run.ended) - Counter(verdict.state for verdict in run.verdicts),
        )

    def __str__(self) -> str:
        total = max(1.0, sum(self.flops.values()))
        lines = [
            f"{self.host_params:,} -> {self.params:,} parameters ({self.params / self.host_params - 1:+.0%}), "
            f"held-out loss {self.held_out:.4g}",
            "cost: " + ", ".join(f"{part} {flops / total:.1%}" for part, flops in self.flops.items()),
        ]
        for verdict in self.verdicts:
            gain = f"{-verdict.gain:+.4f}" if math.isfinite(verdict.gain) else "not measured"
            if math.isfinite(verdict.gain_shrunken):
                gain += f" (shrunken {-verdict.gain_shrunken:+.4f})"
            sites = ", ".join(verdict.sites)
            lines.append(
                f"step {verdict.step}: {_word(verdict.state)} {sites}: {gain} for {verdict.added_params:,} parameters"
            )
            lines += [f"  {_found(event)}" for event in self._scores_of(verdict.cohort)]
        if self.untold:
            counts = ", ".join(f"{count:,} {_word(state)}" for state, count in self.untold.items())
            lines.append(f"longer ago, in the event log only: {counts}")
        lines += self._effect()
        lines += [f"chosen by free memory: {note}" for note in self.notes]
        lines.append(f"stopped: {self.stopped}" if self.stopped else "growth has not stopped")
        return "\n".join(lines)

    def _scores_of(self, cohort: int) -> list[TwinScored | Audited]:
        found = [event for event in self.scored if not isinstance(event, EffectScored)]
        return [event for event in found if event.cohort == cohort]

    def _effect(self) -> list[str]:
        effect = grafting_effect(event for event in self.scored if isinstance(event, EffectScored))
        if effect is None:
            return []
        counts = f"{effect.num_grafted} grafted, {effect.num_withheld} withheld by a draw"
        known = math.isfinite(effect.gain)
        change = f"{-effect.gain:+.4f} ({-effect.high:+.4f} to {-effect.low:+.4f})" if known else "not known"
        return [f"effect of grafting on the held-out loss: {change}; {counts}"]


def _word(state: Lifecycle) -> str:
    return {Lifecycle.FOSSILIZED: "KEPT", Lifecycle.CULLED: "REJECTED"}.get(state, state.name)


def _found(event: TwinScored | Audited) -> str:
    if isinstance(event, TwinScored):
        change, bounds = -event.credit, (-event.credit_high, -event.credit_low)
        what = f"against its twin after {event.num_steps} steps"
    else:
        change, bounds = -event.gain, (-event.gain_high, -event.gain_low)
        what = "audit against its twin" if event.source == "twin" else "audit, on against off"
    return f"{what}: {change:+.4f} ({bounds[0]:+.4f} to {bounds[1]:+.4f})"
