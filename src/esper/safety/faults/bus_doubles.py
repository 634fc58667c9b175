"""A message bus that delivers twice."""

from __future__ import annotations

from contextlib import AbstractContextManager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.traffic import in_trouble


@FAULTS.register("bus_doubles")
class BusDoubles(Fault):
    """An order is applied once and answered as the first time."""

    does = "every message arrives twice"
    moment, expects = Moment.COMMANDED, Expectation.SURVIVES
    leaves_no_trace = True

    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        return in_trouble(subject, "doubles")
