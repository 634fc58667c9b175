"""One fault on its way into a run: it waits for its moment, lasts its time and leaves."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from esper.grower import Grower
from esper.protocol import Lifecycle
from esper.safety.faults import Fault, Moment, Strikes, Subject

_SETTLED = 2
"""Steps that a branch has been in the forward pass before it counts as being there."""


class BrokenOffError(TimeoutError):
    """The harness has broken off a call that took too long."""


class Injection:
    """A fault and where it is.

    Parameters
    ----------
    attach:
        Hangs a second grower on the model.

    Attributes
    ----------
    strikes:
        Of the fault, once it has begun.
    phase:
        What the newest cohort was doing when the fault began.
    struck_at:
        The step in which it struck first.
    """

    def __init__(self, fault: Fault, attach: Callable[[Grower], object]) -> None:
        self.fault = fault
        self.strikes = Strikes()
        self.phase = "never came"
        self.struck_at: int | None = None
        self._attach = attach
        self._begun: int | None = None
        self._undo: ExitStack | None = None

    @property
    def is_waiting(self) -> bool:
        return self._begun is None

    @property
    def is_acting(self) -> bool:
        return self._undo is not None

    @property
    def time_limit_s(self) -> float | None:
        """Of a call into the grower while the fault acts."""
        return self.fault.time_limit_s if self.is_acting else None

    def is_due(self, grower: Grower) -> bool:
        """Whether the run is doing what the fault waits for."""
        cohorts = list(grower.kasmina.cohorts.values())
        moment, step = self.fault.moment, grower.clock.steps
        if moment in (Moment.IDLE, Moment.GERMINATION):
            return not cohorts
        if moment is Moment.JUDGEMENT:
            return any(cohort.state is Lifecycle.STABILIZATION for cohort in cohorts)
        if moment is Moment.GRAFTED:
            return any(
                c.state is Lifecycle.GRAFTING and c.alpha > 0 and step - c.entered >= _SETTLED for c in cohorts
            )  # fmt: skip
        return moment is Moment.ANY

    def begin(self, grower: Grower, clock: int) -> None:
        """Let it act from this step on."""
        cohorts = grower.kasmina.cohorts
        self.phase = cohorts[max(cohorts)].state.name if cohorts else Moment.IDLE.value
        self._begun, self._undo = clock, ExitStack()
        subject = Subject(
            model=grower.model, optimizers=grower.clock.optimizers, sites=grower.kasmina.sites,
            attach=functools.partial(self._attach, grower),
        )  # fmt: skip
        self.strikes = self._undo.enter_context(self.fault.inject(subject))

    def after_step(self, clock: int) -> None:
        """Step ``clock`` is over: end the fault if its time is."""
        if self._undo is None or self._begun is None:
            return
        if self.struck_at is None and self.strikes.num:
            self.struck_at = clock
        since = self._begun if self.struck_at is None else self.struck_at
        longest = self.fault.patience if self.struck_at is None else self.fault.lasts
        if clock + 1 - since >= longest:
            self.end()

    def end(self) -> None:
        """Take the fault out, whatever it was doing."""
        if self._undo is not None:
            self._undo.close()
            self._undo = None


@contextmanager
def time_limit(seconds: float | None) -> Generator[None]:
    """Raise :class:`BrokenOffError` in a call that takes longer (``None``: it may). For the main thread, on POSIX."""
    if seconds is None or not hasattr(signal, "setitimer"):
        yield
        return

    def break_off(number: int, frame: FrameType | None) -> Any:
        raise BrokenOffError(f"a call may take {seconds} s here, it took longer")

    before = signal.signal(signal.SIGALRM, break_off)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def inconsistencies(grower: Grower) -> list[str]:
    """What a half-made change would leave: banks without a cohort, chunks without a seed, branches that are gone."""
    kasmina, found = grower.kasmina, list[str]()
    alive = set(kasmina.cohorts)
    for name, site in kasmina.sites.items():
        if set(site.banks) - alive:
            found.append(f"{name} holds banks of no cohort")
        if site.grafted - set(site.banks):
            found.append(f"{name} adds branches that it does not hold")
    slots = {int(slot) for cohort in kasmina.cohorts.values() for slot in cohort.slots}
    occupied = {int(slot) for slot in kasmina.table.occupied()}
    if occupied != slots:
        found.append(f"{len(occupied ^ slots)} seeds belong to no cohort")
    return found
