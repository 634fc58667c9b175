"""What a run tells: events for whoever listens, warnings (each kind once), milliseconds spent by part."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from esper.kasmina.cohort import Cohort
from esper.protocol import (
    SITE_FEATURES,
    AlphaMoved,
    AnyEvent,
    Lifecycle,
    Observation,
    Overhead,
    Telemetry,
    TrainLoss,
    Warned,
)

_SENSORS = [SITE_FEATURES.index(name) for name in ("activation_mean", "activation_var", "gradient_energy")]
_OVERHEAD_EVERY = 100
"""Real steps between two overhead events, at the least."""


class _Timer:
    """Adds the seconds spent inside to one entry; written out because it runs several times in every step."""

    __slots__ = ("_part", "_seconds", "_start")

    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self._seconds, self._part = seconds, part

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._part] += time.perf_counter() - self._start


class Journal:
    """Events of one run.

    Parameters
    ----------
    on_event:
        Called with every event, in the training thread; ``None`` drops them.
    """

    def __init__(self, on_event: Callable[[AnyEvent], None] | None) -> None:
        self._on_event = on_event
        self._warned: set[str] = set()
        self._seconds: dict[str, float] = defaultdict(float)
        self._overhead_since = 0

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens to events."""
        return self._on_event is not None

    def emit(self, event: AnyEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    def warn(self, key: str, message: str, step: int) -> None:
        """Warn and record it, once a ``key``."""
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, RuntimeWarning, stacklevel=4)  # the line that called grower.step
            self.emit(Warned(step=step, message=message))

    def timed(self, part: str) -> _Timer:
        """Count the time spent inside under ``part``."""
        return _Timer(self._seconds, part)

    def publish(self, observation: Observation, cohorts: Iterable[Cohort], *, loss: float, flops: float) -> None:
        """The picture at a decision point: training loss, telemetry, alpha of what is grafted; overhead now and then.

        ``flops`` is what the run has spent so far.
        """
        step = observation.step
        if self._on_event is None:
            return
        self.emit(TrainLoss(step=step, loss=loss, flops=flops))
        mean, variance, energy = (tuple(observation.sites[:, column].tolist()) for column in _SENSORS)
        self.emit(
            Telemetry(
                step=step, sites=observation.site_names, activation_mean=mean, activation_var=variance,
                gradient_energy=energy, grown=tuple(observation.grown.tolist()),
            )
        )  # fmt: skip
        for cohort in cohorts:
            if cohort.state is Lifecycle.GRAFTING:
                held = "paused" if cohort.paused else cohort.held_by
                self.emit(AlphaMoved(step=step, cohort=cohort.number, alpha=cohort.alpha, held_by=held))
        if step - self._overhead_since >= _OVERHEAD_EVERY:
            self.report_overhead(step)

    def report_overhead(self, step: int) -> None:
        """Milliseconds by part since the last such event."""
        if step > self._overhead_since:
            spent = {part: 1000 * seconds for part, seconds in self._seconds.items()}
            self.emit(Overhead(step=step, num_steps=step - self._overhead_since, milliseconds=spent))
            self._seconds.clear()
            self._overhead_since = step

    def remember(self, state: dict[str, Any]) -> None:
        """What was said before a restore was said, although the restored run does not know of it."""
        self._warned |= set(state["warned"])

    def state(self) -> dict[str, Any]:
        """What was said once, and when the last overhead was told (times belong to a process, not to the run)."""
        return {"warned": sorted(self._warned), "overhead_since": self._overhead_since}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self._warned, self._overhead_since = set(state["warned"]), state["overhead_since"]
        self._seconds.clear()
