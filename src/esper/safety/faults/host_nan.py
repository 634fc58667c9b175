"""A batch that holds a NaN while nothing of Esper is in the forward pass."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.poison import poisoned


@FAULTS.register("host_nan")
class HostNan(Fault):
    """A user's own divergence is reported as theirs, not papered over."""

    does = "one number of a training batch is NaN while no cohort is alive"
    moment, expects = Moment.IDLE, Expectation.REPORTED

    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        return poisoned(subject.model, math.nan)
