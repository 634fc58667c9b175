"""A clock that jumps back and forth."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject

JUMP_S = 86_400.0
_CLOCKS = ("time", "monotonic", "perf_counter")


@FAULTS.register("clock_jumps")
class ClockJumps(Fault):
    """Wall-clock time is reported and nothing else: the run computes the same, bit for bit."""

    does = "every reading of a clock is a day early or a day late, in turn"
    moment, expects = Moment.GRAFTED, Expectation.SURVIVES
    lasts = 30
    leaves_no_trace = True

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()

        def jumping(clock: Callable[[], float]) -> Callable[[], float]:
            def read() -> float:
                strikes.num += 1
                return clock() + (JUMP_S if strikes.num % 2 else -JUMP_S)

            return read

        originals = {name: getattr(time, name) for name in _CLOCKS}
        try:
            for name, clock in originals.items():
                setattr(time, name, jumping(clock))
            yield strikes
        finally:
            for name, clock in originals.items():
                setattr(time, name, clock)
