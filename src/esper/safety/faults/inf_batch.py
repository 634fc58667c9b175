"""A batch that holds an infinity while a branch is on trial."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.poison import poisoned


@FAULTS.register("inf_batch")
class InfBatch(Fault):
    """As a NaN, but it becomes one only on its way."""

    does = "one number of a training batch is infinite while a branch is in the forward pass"
    moment, expects = Moment.GRAFTED, Expectation.RESTORED

    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        return poisoned(subject.model, math.inf)
