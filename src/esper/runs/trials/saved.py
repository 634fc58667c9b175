"""Fault trials of the disk: a run that saves, the fault, and another process that goes on from what is left."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from esper.errors import StateError
from esper.protocol import Warned
from esper.runs.trials.faulty import FaultyRun, inconsistencies, same_weights
from esper.runs.trials.records import FaultRecord
from esper.runs.trials.training import Setup
from esper.runs.trials.trial import is_finite
from esper.safety.faults import FAULTS, Expectation, Fault, Strikes, Subject
from esper.safety.shelf import Shelf
from esper.safety.simulation.faults import ProcessDeath
from esper.safety.tree import digest

FIRST = (30, 110)
"""Least and most steps before the first save; the trial's number says how many."""
BETWEEN = 25
"""Steps between the first save and the second one, or the fault."""
FURTHER = 40
"""Steps that both processes go on for."""
_SAVES = (Expectation.REFUSED, Expectation.SURVIVES)
"""What is done to a save; anything else is done to a checkpoint that was saved."""


def saving_trial(number: int, name: str) -> FaultRecord:
    """Trial ``number``: two saves with the fault in or after the second one, and a fresh process after it."""
    started, fault = time.perf_counter(), FAULTS[name]
    with tempfile.TemporaryDirectory(prefix="esper-trial-") as place:
        run = SavedRun(Setup.of(number), fault, Path(place) / f"{name}-{number}")
        problems = run.train()
    return FaultRecord(
        number=number, kind=name, task=run.setup.task.name, family=run.setup.task.family, phase=run.phase,
        struck=run.strikes.num, expects=fault.expects.value, held=not problems, detail="; ".join(problems),
        seconds=round(time.perf_counter() - started, 2),
    )  # fmt: skip


class SavedRun:
    """One run, its folder of checkpoints, and the process that comes after it."""

    def __init__(self, setup: Setup, fault: Fault, folder: Path) -> None:
        self.setup, self.fault, self.folder = setup, fault, folder
        self.run = FaultyRun(setup, None)
        self.strikes = Strikes()
        self.phase = "no cohort alive"
        self._draws: dict[int, torch.Tensor] = {}
        """State of what draws the batches, by step: a user's loop has its data position in ``track``."""
        self._digests: dict[int, str] = {}

    def train(self) -> list[str]:
        """Everything; returns what does not hold."""
        least, most = FIRST
        self.run.take_steps(least + self.setup.number % (most - least))
        self._save()
        self.run.take_steps(BETWEEN)
        cohorts = self.run.grower.kasmina.cohorts
        self.phase = cohorts[max(cohorts)].state.name if cohorts else self.phase
        problems = self._strike()
        return problems if self.strikes.num else ["it never struck"]

    def _strike(self) -> list[str]:
        problems: list[str] = []
        if self.fault.expects not in _SAVES:
            self._save()
        subject = Subject(
            model=self.run.model, optimizers=[self.run.optimizer], sites=self.run.grower.kasmina.sites,
            attach=lambda: None, folder=self.folder,
        )  # fmt: skip
        with self.fault.inject(subject) as self.strikes:
            if self.fault.expects in _SAVES:
                problems += self._save_under_fault()
            # of a killed writer the next process may find the checkpoint that nobody was told of
            known = list(self._draws) if self.fault.expects is Expectation.SURVIVES else [min(self._draws)]
            return problems + self._after(known)

    def _save_under_fault(self) -> list[str]:
        expected = StateError if self.fault.expects is Expectation.REFUSED else ProcessDeath
        try:
            self._save()
        except (StateError, ProcessDeath) as error:
            return [] if type(error) is expected else [f"the save ended with {type(error).__name__}: {error}"]
        return ["the save was acknowledged"]

    def _save(self) -> None:
        grower, step = self.run.grower, self.run.clock
        self._draws[step] = self.run.choose.get_state()
        self._digests[step] = digest(grower.state_dict())
        shelf = Shelf()  # a writer of its own each time: the fault puts its disk under new ones
        try:
            shelf.save(self.folder, grower.state_dict(), step=step, keep=2)
        finally:
            shelf.close()

    def _after(self, steps: list[int]) -> list[str]:
        """The run goes on, and another process from a checkpoint of one of ``steps``: both come to the same."""
        end = self.run.clock + FURTHER
        again = FaultyRun(self.setup, None)
        loaded = again.grower.load(self.folder)
        if loaded.step not in steps:
            return [f"step {loaded.step} was loaded, not one of {steps}"]
        is_same = digest(loaded.tree) == self._digests[loaded.step]
        problems = [] if is_same else ["another state was loaded than was saved"]
        warned = any(isinstance(event, Warned) and "went back" in event.message for event in again.events)
        if warned != (self.fault.expects is Expectation.REPORTED):
            problems.append("a warning without damage" if warned else "it was not said that a checkpoint is damaged")
        self._end(self.run, end, problems)
        again.choose.set_state(self._draws[loaded.step])
        again.clock = loaded.step
        again.grower.load(self.folder)  # once more: the other run has drawn from the global streams
        self._end(again, end, problems)
        if not same_weights(self.run.grower, again.grower):
            problems.append("the run went on otherwise than without it")
        return problems

    def _end(self, run: FaultyRun, end: int, problems: list[str]) -> None:
        run.take_steps(end - run.clock)
        problems += [f"reached the training loop: {text}" for text in run.escaped[:2]]
        problems += inconsistencies(run.grower)
        if not is_finite(run.model):
            problems.append("the host's weights are not finite")
