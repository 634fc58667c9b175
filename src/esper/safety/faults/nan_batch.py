"""A batch that holds a NaN while a branch is on trial."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.poison import poisoned


@FAULTS.register("nan_batch")
class NanBatch(Fault):
    """Whose fault it is cannot be seen from the loss: the newest suspect leaves, the host is restored."""

    does = "one number of a training batch is NaN while a branch is in the forward pass"
    moment, expects = Moment.GRAFTED, Expectation.RESTORED

    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        return poisoned(subject.model, math.nan)
