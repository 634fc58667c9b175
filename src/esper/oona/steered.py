"""One training as a server steers it: its controller, what was decided on last, and the orders under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from esper.tamiyo import Controller

OBSERVATION_MAX_AGE_S = 60.0
"""An observation that is older, or as far ahead, by this server's clock is not decided on."""


@dataclass
class Training:
    """One training as it is steered."""

    controller: Controller
    heard: float
    is_steered: bool = False
    """Whether its last observation could be read and decided on."""
    decided: float = float("-inf")
    """Time of the observation that was decided on last, by the training's clock."""
    answered: float = float("-inf")
    """Time of its last acknowledgement, by the training's clock."""
    open: dict[str, float] = field(default_factory=dict[str, float])
    """Orders that are not answered, and when they run out."""

    def is_free(self, now: float) -> bool:
        """Whether all its orders are answered or have run out."""
        self.open = {order: until for order, until in self.open.items() if until > now}
        return not self.open

    def mind(self, at: float) -> None:
        """Drop marks too far ahead of an observation's time: the training's clock was set back since."""
        if self.decided - at > OBSERVATION_MAX_AGE_S:
            self.decided = float("-inf")
        if self.answered - at > OBSERVATION_MAX_AGE_S:
            self.answered = float("-inf")
