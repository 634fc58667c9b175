"""A message bus that delivers late and in the wrong order."""

from __future__ import annotations

from contextlib import AbstractContextManager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.traffic import in_trouble


@FAULTS.register("bus_disorders")
class BusDisorders(Fault):
    """Orders are applied as they come, those whose deadline has passed not at all."""

    does = "every message is late and comes after later ones"
    moment, expects = Moment.COMMANDED, Expectation.SURVIVES
    leaves_no_trace = True

    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        return in_trouble(subject, "disorders")
