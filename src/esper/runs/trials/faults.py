"""Trials with a fault each: which one a trial's number stands for, and which harness it needs."""

from __future__ import annotations

from collections.abc import Sequence

from esper.runs.trials.commanded import commanded_trial
from esper.runs.trials.faulty import training_trial
from esper.runs.trials.records import FaultRecord
from esper.runs.trials.saved import saving_trial
from esper.safety.faults import FAULTS, Moment

EVERY = "all"


def fault_names(asked: Sequence[str]) -> tuple[str, ...]:
    """The faults to inject, in order.

    Raises
    ------
    UnknownNameError
        No fault of such a name; the known ones are listed.
    """
    names = tuple(FAULTS) if EVERY in asked else tuple(dict.fromkeys(asked))
    return tuple(name for name in names if FAULTS[name])


def fault_trial(number: int, faults: Sequence[str]) -> FaultRecord:
    """Trial ``number`` injects the fault whose turn it is: into a training step, around a checkpoint, or into a bus."""
    name = faults[number % len(faults)]
    trials = {Moment.SAVING: saving_trial, Moment.COMMANDED: commanded_trial}
    return trials.get(FAULTS[name].moment, training_trial)(number, name)
