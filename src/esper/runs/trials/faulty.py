"""Fault trials: one fault done to one host in the middle of its growth, and a look at what is left afterwards."""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from esper.config import Config
from esper.errors import EsperError
from esper.grower import Grower
from esper.protocol import AnyEvent, Lifecycle, Warned
from esper.runs.interrupt import obey
from esper.runs.trials.records import FaultRecord
from esper.runs.trials.training import Setup, take_step, trial_config
from esper.runs.trials.trial import is_finite
from esper.safety.faults import FAULTS, Expectation, Fault, Moment, Strikes, Subject

EVERY = "all"
STEPS = 320
AFTER = 80
"""Steps that a run goes on after its fault."""
WARM_UP = 20
TOLERATED = 1.25
"""Largest loss after a restoration, as a multiple of that before the fault."""


class BrokenOffError(TimeoutError):
    """The harness has broken off a call that took too long."""


def fault_names(asked: Sequence[str]) -> tuple[str, ...]:
    """The faults to inject, in order; those of the disk have their own harness.

    Raises
    ------
    UnknownNameError
        No fault of such a name; the known ones are listed.
    """
    names = tuple(FAULTS) if EVERY in asked else tuple(dict.fromkeys(asked))
    return tuple(name for name in names if FAULTS[name].moment is not Moment.SAVING)


def fault_trial(number: int, faults: Sequence[str]) -> FaultRecord:
    """Trial ``number`` injects the fault whose turn it is."""
    started = time.perf_counter()
    name = faults[number % len(faults)]
    run = FaultyRun(Setup.of(number), FAULTS[name])
    run.train()
    problems = run.problems()
    if run.fault.leaves_no_trace and run.strikes.num and not problems:
        clean = FaultyRun(run.setup, None)
        clean.train(until=run.clock)
        problems = [] if same_weights(run.grower, clean.grower) else ["the run went on otherwise than without it"]
    return FaultRecord(
        number=number, kind=name, task=run.setup.task.name, family=run.setup.task.family, phase=run.phase,
        struck=run.strikes.num, expects=run.fault.expects.value, held=not problems, detail="; ".join(problems),
        seconds=round(time.perf_counter() - started, 2),
    )  # fmt: skip


@dataclass
class FaultyRun:
    """A host that grows, with at most one fault on the way."""

    setup: Setup
    planned: Fault | None
    events: list[AnyEvent] = field(default_factory=list[AnyEvent])
    strikes: Strikes = field(default_factory=Strikes)
    escaped: list[str] = field(default_factory=list[str])
    """Errors that reached the training loop."""
    phase: str = "never came"
    clock: int = 0
    """Steps of the loop."""
    level: float = math.nan
    """Loss before the fault."""
    _undo: ExitStack | None = None
    _since: int = 0
    _struck_at: int | None = None

    def __post_init__(self) -> None:
        self.model = self.setup.host()
        self.optimizer = self.setup.recipe.build(self.model)
        self.choose = self.setup.batches.clone_state()
        self.grower = self._attach(trial_config(self.setup.number, twins=False))

    @property
    def fault(self) -> Fault:
        assert self.planned is not None  # asked of runs that have one
        return self.planned

    def _attach(self, config: Config) -> Grower:
        return Grower(
            self.model, self.optimizer, loss=self.setup.task.loss, evaluate=self.setup.task.gate, config=config,
            on_event=self.events.append,
        )  # fmt: skip

    def train(self, until: int | None = None) -> None:
        """Train through the fault and :data:`AFTER` steps more; ``until``: so many steps instead."""
        while self.clock < (STEPS if until is None else until):
            obey()
            self._begin_if_due()
            self._step()
            self.clock += 1
            self._end_if_over()
            if until is None and self._undo is None and self._struck_at is not None:
                if self.clock - self._struck_at >= AFTER:
                    return
        if self._undo is not None:
            self._undo.close()

    def _begin_if_due(self) -> None:
        if self.planned is None or self._since or not self._is_due(self.planned.moment):
            return
        newest = max(self.grower.kasmina.cohorts, default=None)
        cohort = None if newest is None else self.grower.kasmina.cohorts[newest]
        self.phase = "no cohort alive" if cohort is None else cohort.state.name
        self.level = self._loss()
        self._undo, self._since = ExitStack(), self.clock
        subject = Subject(
            model=self.model, optimizers=[self.optimizer], sites=self.grower.kasmina.sites,
            attach=functools.partial(self._attach, self.grower.config),
        )  # fmt: skip
        self.strikes = self._undo.enter_context(self.fault.inject(subject))

    def _is_due(self, moment: Moment) -> bool:
        cohorts = list(self.grower.kasmina.cohorts.values())
        if self.clock < WARM_UP:
            return False
        if moment in (Moment.IDLE, Moment.GERMINATION):
            return not cohorts
        if moment is Moment.JUDGEMENT:
            return any(cohort.state is Lifecycle.STABILIZATION for cohort in cohorts)
        if moment is Moment.GRAFTED:
            return any(c.state is Lifecycle.GRAFTING and c.alpha > 0 and self.clock - c.entered > 2 for c in cohorts)
        return True

    def _step(self) -> None:
        batch = self.setup.task.batch(self.choose)
        limit = self.fault.time_limit_s if self._undo is not None else None
        try:
            loss = take_step(self.setup, self.model, self.optimizer, batch, self.clock)
            with time_limit(limit):
                self.grower.step(loss, batch=batch)
        except BrokenOffError:
            pass  # the harness's own doing
        except EsperError as error:
            self.escaped.append(f"{type(error).__name__}: {error}")
        except Exception as error:  # noqa: BLE001  whatever a fault lets out would have ended the user's run
            self.escaped.append(f"{type(error).__name__}: {error}")
            self.optimizer.zero_grad()

    def _end_if_over(self) -> None:
        if self._undo is None:
            return
        if self._struck_at is None and self.strikes.num:
            self._struck_at = self.clock - 1
        begun = self._struck_at if self._struck_at is not None else self._since
        longest = self.fault.lasts if self._struck_at is not None else self.fault.patience
        if self.clock - begun >= longest:
            self._undo.close()
            self._undo = None

    def _loss(self) -> float:
        """Over a part of the audit split, which nothing else reads."""
        task = self.setup.task
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            value = sum(float(task.loss(self.model, batch)) for batch in task.audit[:8]) / 8
        self.model.train(training)
        return value

    # ---------------------------------------------------------------------------------------------- what must hold

    def problems(self) -> list[str]:
        """What does not hold of what the fault expects; empty if all does."""
        if not self.strikes.num:
            return ["it never struck"]
        found = [f"reached the training loop: {text}" for text in dict.fromkeys(self.escaped)][:2]
        found += inconsistencies(self.grower)
        if self.fault.expects is Expectation.REPORTED:
            warned = [event.message for event in self.events if isinstance(event, Warned)]
            return found + ([] if any("host" in text for text in warned) else ["nothing was reported"])
        if not is_finite(self.model):
            return [*found, "the host's weights are not finite"]
        if self.fault.expects is Expectation.RESTORED:
            found += self._not_restored()
        return found

    def _not_restored(self) -> list[str]:
        ends = [verdict.state for verdict in self.grower.verdicts]
        found = [] if Lifecycle.ROLLED_BACK in ends else ["no cohort was rolled back"]
        after = self._loss()
        if not after <= TOLERATED * self.level:
            found.append(f"the loss was {self.level:.4g} before, it is {after:.4g} {AFTER} steps after")
        return found


def inconsistencies(grower: Grower) -> list[str]:
    """What a half-made change would leave: banks without a cohort, chunks without a seed, branches that are gone."""
    kasmina, found = grower.kasmina, list[str]()
    alive = set(kasmina.cohorts)
    for name, site in kasmina.sites.items():
        if set(site.banks) - alive:
            found.append(f"{name} holds banks of no cohort")
        if site.grafted - set(site.banks):
            found.append(f"{name} adds branches that it does not hold")
    slots = {int(slot) for cohort in kasmina.cohorts.values() for slot in cohort.slots}
    occupied = {int(slot) for slot in kasmina.table.occupied()}
    if occupied != slots:
        found.append(f"{len(occupied ^ slots)} seeds belong to no cohort")
    return found


def same_weights(one: Grower, two: Grower) -> bool:
    """Whether hosts and all that has grown are bit for bit the same."""
    return all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(two), strict=True))


def _tensors(grower: Grower) -> list[Tensor]:
    banks = [*grower.kasmina.live_banks]
    for site in grower.kasmina.sites.values():
        banks += site.permanent
    return [*grower.model.parameters(), *(value for bank in banks for value in bank.params.values())]


@contextmanager
def time_limit(seconds: float | None) -> Generator[None]:
    """Raise :class:`BrokenOffError` inside a call that takes longer (``None``: it may). For the main thread, on POSIX."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return

    def break_off(number: int, frame: FrameType | None) -> Any:
        raise BrokenOffError(f"a call may take {seconds} s here, it took longer")

    before = signal.signal(signal.SIGALRM, break_off)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
