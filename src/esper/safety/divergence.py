"""Has the training loss run away? A robust z-score over a window and a ratio; never an absolute number.

The level of the latest losses (their median) is compared with the median ``m`` and the scatter ``s`` (1.4826 times the
median absolute deviation) of those before. It has run away where both

    level - m > max_z * s        beyond what the loss has scattered by
    level - m > (ratio - 1) |m|  and a different size of loss

hold: the first alone would shout at a loss that hardly scatters, the second at one that is near zero.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

FEWEST = 20
"""Losses that must be known before anything is called a divergence."""
_TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution (Rousseeuw & Croux 1993)."""


class LossWatch:
    """The losses of the last ``window`` steps that were in order.

    Parameters
    ----------
    max_z, ratio:
        See above.
    """

    def __init__(self, window: int, max_z: float, ratio: float) -> None:
        self.losses: deque[float] = deque(maxlen=window)
        self.max_z, self.ratio = max_z, ratio

    def verdict(self, recent: Sequence[float]) -> str | None:
        """What is wrong with ``recent`` losses (finite, oldest first) against those before, or ``None``."""
        if len(self.losses) < min(FEWEST, self.losses.maxlen or FEWEST) or not recent:
            return None
        lowest = min(self.losses)
        if 0 < lowest and max(recent) < self.ratio * lowest:
            return None  # no median is needed to see that
        middle = median(self.losses)
        rise = median(recent) - middle
        if not rise > (self.ratio - 1) * abs(middle):
            return None
        scatter = _TO_SIGMA * median([abs(loss - middle) for loss in self.losses])
        if not rise > self.max_z * scatter:
            return None
        z = rise / scatter if scatter > 0 else math.inf
        return f"the training loss diverges: {middle + rise:.4g} after {middle:.4g} (z = {z:.3g})"

    def take(self, recent: Sequence[float]) -> None:
        """Count ``recent`` losses among those in order."""
        self.losses.extend(recent)

    def state(self) -> dict[str, Any]:
        """The window, as a state tree."""
        return {"losses": list(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self.losses.clear()
        self.losses.extend(state["losses"])
