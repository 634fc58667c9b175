"""Fault trials: one fault done to one host in the middle of its growth, and a look at what is left afterwards."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from esper.grower import Grower
from esper.protocol import AnyEvent, Lifecycle, Warned
from esper.runs.interrupt import obey
from esper.runs.trials.injection import BrokenOffError, Injection, inconsistencies, time_limit
from esper.runs.trials.records import FaultRecord
from esper.runs.trials.training import Setup, take_step, trial_config
from esper.runs.trials.trial import is_finite
from esper.safety.faults import FAULTS, Expectation, Fault

STEPS = 320
AFTER = 80
"""Steps that a run goes on after its fault."""
WARM_UP = 20
TOLERATED = 1.25
"""Largest loss after a restoration, as a multiple of that before the fault, or of the same training without it."""


def training_trial(number: int, name: str) -> FaultRecord:
    """Trial ``number``: the fault strikes in a training step."""
    started = time.perf_counter()
    run = FaultyRun(Setup.of(number), FAULTS[name])
    problems = run.train()
    if run.fault.leaves_no_trace and not problems:
        clean = FaultyRun(run.setup, None)
        clean.take_steps(run.clock)
        problems = [] if same_weights(run.grower, clean.grower) else ["the run went on otherwise than without it"]
    injection = run.injection
    assert injection is not None
    return FaultRecord(
        number=number, kind=name, task=run.setup.task.name, family=run.setup.task.family, phase=injection.phase,
        struck=injection.strikes.num, expects=run.fault.expects.value, held=not problems, detail="; ".join(problems),
        seconds=round(time.perf_counter() - started, 2),
    )  # fmt: skip


class FaultyRun:
    """A host that grows, with at most one fault on the way."""

    def __init__(self, setup: Setup, fault: Fault | None) -> None:
        self.setup = setup
        self.model = setup.host()
        self.optimizer = setup.recipe.build(self.model)
        self.choose = setup.batches.clone_state()
        self.events: list[AnyEvent] = []
        self.config = trial_config(setup.number, twins=False)
        self.grower = self._attach()
        self.injection = None if fault is None else Injection(fault, self._attach)
        self.clock = 0
        self.level = math.nan
        """Loss before the fault."""
        self.escaped: list[str] = []
        """Errors that reached the training loop."""

    @property
    def fault(self) -> Fault:
        assert self.injection is not None  # asked of runs that have one
        return self.injection.fault

    def _attach(self, first: Grower | None = None) -> Grower:
        return Grower(
            self.model, self.optimizer, loss=self.setup.task.loss, evaluate=self.setup.task.gate, config=self.config,
            on_event=self.events.append,
        )  # fmt: skip

    def train(self) -> list[str]:
        """Train through the fault and :data:`AFTER` steps more; returns what does not hold then."""
        injection = self.injection
        assert injection is not None
        try:
            while self.clock < STEPS:
                if injection.is_waiting and self.clock >= WARM_UP and injection.is_due(self.grower):
                    self.level = self._loss()
                    injection.begin(self.grower, self.clock)
                self.take_steps(1)
                injection.after_step(self.clock - 1)
                if injection.struck_at is not None and self.clock - injection.struck_at > AFTER:
                    break
        finally:
            injection.end()
        return self._problems(injection)

    def take_steps(self, num: int) -> None:
        """Steps as a loop takes them that nothing can stop."""
        for _ in range(num):
            obey()
            batch = self.setup.task.batch(self.choose)
            limit = None if self.injection is None else self.injection.time_limit_s
            try:
                loss = take_step(self.setup, self.model, self.optimizer, batch, self.clock)
                with time_limit(limit):
                    self.grower.step(loss, batch=batch)
            except BrokenOffError:
                pass  # the harness's own doing
            except Exception as error:  # noqa: BLE001  whatever a fault lets out would have ended the user's run
                self.escaped.append(f"{type(error).__name__}: {error}")
                self.optimizer.zero_grad()
            self.clock += 1

    def _loss(self) -> float:
        """Over a part of the audit split, which nothing else reads."""
        task = self.setup.task
        self.model.eval()
        with torch.no_grad():
            value = sum(float(task.loss(self.model, batch)) for batch in task.audit[:8]) / 8
        self.model.train()
        return value

    # ---------------------------------------------------------------------------------------------- what must hold

    def _problems(self, injection: Injection) -> list[str]:
        """What does not hold of what the fault expects; empty if all does."""
        if not injection.strikes.num:
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
            clean = FaultyRun(self.setup, None)  # a host may overfit in that time by itself
            clean.take_steps(self.clock)
            alone = clean._loss()
            if not (math.isfinite(alone) and after <= TOLERATED * alone):
                found.append(
                    f"the loss was {self.level:.4g} before, it is {after:.4g} {AFTER} steps after, and "
                    f"{alone:.4g} without the fault"
                )
        return found


def same_weights(one: Grower, two: Grower) -> bool:
    """Whether hosts and all that has grown are bit for bit the same."""
    return all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(two), strict=True))


def _tensors(grower: Grower) -> list[Tensor]:
    banks = [*grower.kasmina.live_banks]
    for site in grower.kasmina.sites.values():
        banks += site.permanent
    return [*grower.model.parameters(), *(value for bank in banks for value in bank.params.values())]
