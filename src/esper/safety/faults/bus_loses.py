"""A message bus that breaks in the middle: of what was sent or fetched nobody knows whether it arrived."""

from __future__ import annotations

from contextlib import AbstractContextManager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.traffic import in_trouble


@FAULTS.register("bus_loses")
class BusLoses(Fault):
    """Every order is applied once and answered, whatever had to be sent again."""

    does = "messages and the bus's answers are lost on their way"
    moment, expects = Moment.COMMANDED, Expectation.SURVIVES
    leaves_no_trace = True

    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        return in_trouble(subject, "loses")
