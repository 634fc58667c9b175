"""A second grower on a model that has one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from esper.errors import AttachError
from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, NotRefusedError, Strikes, Subject


@FAULTS.register("two_growers")
class TwoGrowers(Fault):
    """Refused before anything has changed: the first one never notices."""

    does = "a second grower is attached to the model while a branch is in the forward pass"
    moment, expects = Moment.GRAFTED, Expectation.REFUSED
    leaves_no_trace = True

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()
        try:
            subject.attach()
        except AttachError:
            strikes.num += 1
        if not strikes.num:
            raise NotRefusedError("a model can have one Grower, a second one was let in")
        yield strikes
