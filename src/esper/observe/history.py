"""A run's events folded into what the report and the progress lines show.

Curves are thinned to bounded memory. Decisions (cohorts, transitions, judgements, refusals, stop reasons) are never
thinned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from esper.protocol import (
    AlphaMoved,
    AnyEvent,
    ArmFinished,
    Attached,
    Audited,
    EffectScored,
    Event,
    Fitted,
    Germinated,
    HeldOut,
    Incident,
    Judged,
    Lifecycle,
    Overhead,
    Record,
    Refused,
    Restored,
    RunFinished,
    RunStarted,
    SiteInfo,
    Skipped,
    Stopped,
    Telemetry,
    TrainLoss,
    Transitioned,
    TwinScored,
    Warned,
    Withheld,
)

MAX_POINTS = 4096
"""Points a curve may hold before every second one is dropped."""

T = TypeVar("T", bound=Event)

END_STATES = frozenset({Lifecycle.FOSSILIZED, Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK})


class Curve(Generic[T]):
    """Events of one kind in step order, of bounded length.

    At ``limit`` it halves itself and from then on keeps every second arrival; the newest is always kept, so a curve
    never ends in the past. An event at or before an earlier step (a resumed or rewound run) replaces what it repeats.
    """

    def __init__(self, limit: int = MAX_POINTS) -> None:
        self._limit = max(limit, 2)
        self._stride = 1
        self._since_kept = 0
        self._kept: list[T] = []
        self._newest: T | None = None

    def append(self, event: T) -> None:
        self.rewind(event.step - 1)
        if self._kept and self._since_kept + 1 < self._stride:
            self._newest = event
            self._since_kept += 1
            return
        self._kept.append(event)
        self._newest = None
        self._since_kept = 0
        if len(self._kept) > self._limit:
            if len(self._kept) % 2 == 0:  # The last one falls away as a kept point and stays as the newest.
                self._newest = self._kept[-1]
                self._since_kept = self._stride
            self._kept = self._kept[::2]
            self._stride *= 2

    def rewind(self, step: int) -> None:
        """Forget everything after ``step``."""
        if self._newest is not None and self._newest.step > step:
            self._newest = None
        while self._kept and self._kept[-1].step > step:
            self._kept.pop()

    @property
    def items(self) -> list[T]:
        return self._kept if self._newest is None else [*self._kept, self._newest]

    @property
    def last(self) -> T | None:
        return self._newest if self._newest is not None else (self._kept[-1] if self._kept else None)


@dataclass(slots=True)
class Cohort:
    """One cohort from germination to its end."""

    cohort: int
    germinated: Germinated | None = None
    transitions: list[Transitioned] = field(default_factory=list[Transitioned])
    judgements: list[Judged] = field(default_factory=list[Judged])
    fits: list[Fitted] = field(default_factory=list[Fitted])
    twin: TwinScored | None = None
    withheld: Withheld | None = None
    effect: EffectScored | None = None
    audits: list[Audited] = field(default_factory=list[Audited])
    alphas: Curve[AlphaMoved] = field(default_factory=lambda: Curve[AlphaMoved](512))
    state: Lifecycle = Lifecycle.GERMINATED
    """The last state; an end state stays although the chunks turn dormant again."""
    ended_step: int | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        if self.germinated is not None:
            return self.germinated.sites
        return self.judgements[-1].sites if self.judgements else ()

    @property
    def added_params(self) -> int:
        if self.germinated is not None:
            return self.germinated.added_params
        return self.judgements[-1].added_params if self.judgements else 0

    @property
    def started_step(self) -> int:
        if self.germinated is not None:
            return self.germinated.step
        steps = [event.step for event in (*self.transitions, *self.judgements, *self.fits)]
        return min(steps, default=0)

    @property
    def is_alive(self) -> bool:
        return self.state not in END_STATES

    @property
    def verdict(self) -> Judged | None:
        """The judgement that says most: the last one, whatever its stage."""
        return self.judgements[-1] if self.judgements else None

    def rewind(self, step: int) -> None:
        """Forget what happened after ``step``."""
        self.transitions = [event for event in self.transitions if event.step <= step]
        self.judgements = [event for event in self.judgements if event.step <= step]
        self.fits = [event for event in self.fits if event.step <= step]
        self.audits = [event for event in self.audits if event.step <= step]
        self.twin = self.twin if self.twin and self.twin.step <= step else None
        self.withheld = self.withheld if self.withheld and self.withheld.step <= step else None
        self.effect = self.effect if self.effect and self.effect.step <= step else None
        self.alphas.rewind(step)
        targets = [event for event in self.transitions if event.target is not Lifecycle.DORMANT]
        self.state = targets[-1].target if targets else Lifecycle.GERMINATED
        self.ended_step = targets[-1].step if targets and self.state in END_STATES else None

    def step_of(self, state: Lifecycle) -> int | None:
        """Step at which the cohort first entered a state, ``None`` if it never did."""
        return next((event.step for event in self.transitions if event.target is state), None)


@dataclass(slots=True)
class SeedRun:
    """One training run: one arm with one random seed."""

    arm: str
    seed: int
    attached: Attached | None = None
    train: Curve[TrainLoss] = field(default_factory=Curve[TrainLoss])
    held_out: Curve[HeldOut] = field(default_factory=Curve[HeldOut])
    first_held_out: HeldOut | None = None
    telemetry: Curve[Telemetry] = field(default_factory=lambda: Curve[Telemetry](512))
    overheads: Curve[Overhead] = field(default_factory=lambda: Curve[Overhead](512))
    cohorts: dict[int, Cohort] = field(default_factory=dict[int, Cohort])
    refusals: list[Refused] = field(default_factory=list[Refused])
    warnings: list[Warned] = field(default_factory=list[Warned])
    incidents: list[Incident] = field(default_factory=list[Incident])
    restores: list[Restored] = field(default_factory=list[Restored])
    """Incidents and restores did happen, whatever was taken back: a rewind forgets none."""
    stopped: Stopped | None = None
    finished: ArmFinished | None = None
    last_step: int = 0
    overhead_ms: float = 0.0
    overhead_steps: int = 0

    @property
    def sites(self) -> tuple[SiteInfo, ...]:
        return self.attached.sites if self.attached else ()

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        return self.attached.skipped if self.attached else ()

    @property
    def host_params(self) -> int | None:
        return self.attached.host_params if self.attached else None

    @property
    def last_held_out(self) -> HeldOut | None:
        return self.held_out.last

    @property
    def kept(self) -> list[Cohort]:
        return [cohort for cohort in self.cohorts.values() if cohort.state is Lifecycle.FOSSILIZED]

    def count(self, state: Lifecycle) -> int:
        return sum(cohort.state is state for cohort in self.cohorts.values())

    def units_added(self) -> dict[str, int]:
        """Hidden units (or rank) of kept cohorts per site: what was *spent* there."""
        units: dict[str, int] = {}
        for cohort in self.kept:
            if cohort.germinated is not None:
                for site, width in zip(cohort.germinated.sites, cohort.germinated.widths, strict=False):
                    units[site] = units.get(site, 0) + width
        return units

    def cohort(self, number: int) -> Cohort:
        return self.cohorts.setdefault(number, Cohort(number))

    def rewind(self, step: int) -> None:
        """Forget what happened after ``step``: the run was resumed, or taken back, there."""
        for curve in (self.train, self.held_out, self.telemetry, self.overheads):
            curve.rewind(step)
        self.cohorts = {key: cohort for key, cohort in self.cohorts.items() if cohort.started_step <= step}
        for cohort in self.cohorts.values():
            cohort.rewind(step)
        self.refusals = [event for event in self.refusals if event.step <= step]
        self.warnings = [event for event in self.warnings if event.step <= step]
        self.stopped = self.stopped if self.stopped and self.stopped.step <= step else None
        self.finished = self.finished if self.finished and self.finished.step <= step else None
        self.last_step = min(self.last_step, step)


@dataclass(slots=True)
class RunHistory:
    """Everything a log says, ready to be shown. Feed it with :meth:`apply` or :func:`fold`."""

    run: str = ""
    preset: str = ""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    environment: dict[str, str] = field(default_factory=dict[str, str])
    started_time: float = math.nan
    last_time: float = math.nan
    """Wall-clock time of the newest event, in seconds since the epoch."""
    num_events: int = 0
    summary: dict[str, Any] | None = None
    """What the run reported at its end; ``None`` while it goes on or after a kill."""
    arms: dict[str, dict[int, SeedRun]] = field(default_factory=dict[str, dict[int, SeedRun]])

    @property
    def is_finished(self) -> bool:
        return self.summary is not None

    @property
    def seed_runs(self) -> list[SeedRun]:
        return [run for seeds in self.arms.values() for run in seeds.values()]

    @property
    def main_arm(self) -> str | None:
        """The arm the report is about: ``grown``, else the first that grew, else the first."""
        if "grown" in self.arms:
            return "grown"
        grew = [arm for arm, seeds in self.arms.items() if any(run.cohorts for run in seeds.values())]
        return next(iter(grew or self.arms), None)

    @property
    def budget_params(self) -> int | None:
        """Parameter ceiling as configured: ``budget_params`` of a job or ``budget.params`` of a grower."""
        value = self.config.get("budget_params")
        budget = self.config.get("budget")
        if value is None and isinstance(budget, dict):
            value = cast("dict[str, Any]", budget).get("params")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def seed_run(self, arm: str, seed: int) -> SeedRun:
        return self.arms.setdefault(arm, {}).setdefault(seed, SeedRun(arm, seed))

    def apply(self, record: Record) -> None:
        """Take in the next record of the log."""
        self.num_events += 1
        if not math.isfinite(self.started_time):
            self.started_time = record.time
        self.last_time = record.time
        event = record.event
        if isinstance(event, RunStarted):
            self.run, self.preset = event.run, event.preset
            self.config, self.environment = event.config, event.environment
            self.summary = None  # A run that was resumed is a run that goes on.
        elif isinstance(event, RunFinished):
            self.summary = event.summary
        else:
            _apply(self.seed_run(event.arm, event.seed), event)


def fold(records: Iterable[Record]) -> RunHistory:
    """Fold records, oldest first, into a history."""
    history = RunHistory()
    for record in records:
        history.apply(record)
    return history


def _apply(run: SeedRun, event: AnyEvent) -> None:
    run.last_step = max(run.last_step, event.step)
    match event:
        case TrainLoss():
            run.train.append(event)
        case HeldOut():
            run.first_held_out = run.first_held_out or event
            run.held_out.append(event)
        case Telemetry():
            run.telemetry.append(event)
        case Overhead():
            run.overheads.append(event)
            run.overhead_ms += sum(value for value in event.milliseconds.values() if math.isfinite(value))
            run.overhead_steps += event.num_steps
        case Attached():
            if run.attached is not None:
                run.rewind(event.step)
            run.attached = event
        case Stopped():
            run.stopped = event
        case ArmFinished():
            run.finished = event
        case Refused():
            run.refusals.append(event)
        case Incident():
            run.incidents.append(event)
        case Restored():
            run.rewind(event.to_step)
            run.restores.append(event)
        case Warned():
            run.warnings.append(event)
        case Germinated() | Transitioned() | AlphaMoved() | Fitted() | Judged():
            _apply_to_cohort(run.cohort(event.cohort), event)
        case TwinScored() | Withheld() | EffectScored() | Audited():
            _apply_trial(run.cohort(event.cohort), event)
        case _:
            pass


def _apply_to_cohort(cohort: Cohort, event: Germinated | Transitioned | AlphaMoved | Fitted | Judged) -> None:
    match event:
        case Germinated():
            cohort.germinated = event
        case Transitioned():
            cohort.transitions.append(event)
            if event.target is not Lifecycle.DORMANT:
                cohort.state = event.target
            if event.target in END_STATES:
                cohort.ended_step = event.step
        case AlphaMoved():
            cohort.alphas.append(event)
        case Fitted():
            cohort.fits.append(event)
        case Judged():
            cohort.judgements.append(event)


def _apply_trial(cohort: Cohort, event: TwinScored | Withheld | EffectScored | Audited) -> None:
    match event:
        case TwinScored():
            cohort.twin = event
        case Withheld():
            cohort.withheld = event
        case EffectScored():
            cohort.effect = event
        case Audited():
            cohort.audits.append(event)
