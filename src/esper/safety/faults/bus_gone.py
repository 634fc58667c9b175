"""A message bus that is away."""

from __future__ import annotations

from contextlib import AbstractContextManager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.traffic import in_trouble


@FAULTS.register("bus_gone")
class BusGone(Fault):
    """Training goes on as if there were no bus; orders and answers wait and arrive when it is back."""

    does = "every call to the message bus fails"
    moment, expects = Moment.COMMANDED, Expectation.SURVIVES
    leaves_no_trace = True

    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        return in_trouble(subject, "gone")
