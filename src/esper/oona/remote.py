"""The training's side of remote control: observations go out, and while nobody steers a local controller decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from esper.protocol import Command, Observation
from esper.tamiyo import Controller

REMOTE = "remote"
"""What a run calls it."""
PATIENCE_S = 10.0
"""Silence of the controller after which the training decides by itself."""


class Line(Protocol):
    """What a remote controller needs of a link."""

    @property
    def heard(self) -> float | None:
        """When a controller was heard last that steers this training (``time.monotonic``), ``None``: never."""
        ...

    @property
    def heard_any(self) -> float | None:
        """The same of one that perhaps steers others only."""
        ...

    def observe(self, observation: Observation) -> None:
        """Send an observation; never waits."""
        ...


class RemoteController:
    """Lets somebody else decide: their orders come over the bus, not from here.

    While nobody has been heard for ``patience_s`` seconds the ``fallback`` decides; as soon as somebody is heard again
    it is no longer asked.

    Parameters
    ----------
    line:
        The link to the bus; ``None``: there is none (yet), so the fallback decides.
    clock:
        Seconds that only go forward.
    """

    def __init__(
        self, fallback: Controller, *, line: Line | None = None, patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.fallback, self.line = fallback, line
        self._patience_s, self._clock = patience_s, clock
        self._was_steered: bool | None = None
        self._notes: list[str] = []

    @property
    def is_steered(self) -> bool:
        """Whether somebody was heard of late."""
        return self.line is not None and self._is_of_late(self.line.heard)

    def _is_of_late(self, heard: float | None) -> bool:
        return heard is not None and self._clock() - heard <= self._patience_s

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Send the observation; returns the fallback's commands while nobody steers."""
        steered = self.is_steered
        if steered is not self._was_steered:
            self._notes.append(self._told(steered))
            self._was_steered = steered
        if self.line is not None:
            self.line.observe(observation)
        return () if steered else self.fallback.decide(observation)

    def _told(self, steered: bool) -> str:
        if steered:
            return "a remote controller steers this training"
        if self.line is not None and self._is_of_late(self.line.heard_any):
            return (
                "a remote controller is heard, but this training is not among those that it steers (it cannot read its "
                "observations, or failed at them; its own log says which): the local one decides"
            )
        if self._was_steered is None:
            return "no remote controller was heard yet: the local one decides"
        return f"no remote controller was heard for {self._patience_s:g} s: the local one decides"

    def notes(self) -> tuple[str, ...]:
        """What there is to tell since the last call."""
        told, self._notes = tuple(self._notes), []
        return told

    def state(self) -> dict[str, Any]:
        """The fallback's."""
        return {"fallback": self.fallback.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self.fallback.load(state["fallback"])
