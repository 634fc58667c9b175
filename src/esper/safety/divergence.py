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
from typing import Any

import numpy as np

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
        self._level: tuple[float, float] | None = None

    def level(self) -> tuple[float, float]:
        """Median and scatter of the losses in order; known until more are taken in. There must be some."""
        if self._level is None:
            before = np.asarray(self.losses)
            middle = float(np.median(before))
            self._level = middle, _TO_SIGMA * float(np.median(np.abs(before - middle)))
        return self._level

    @property
    def is_ready(self) -> bool:
        """Whether enough losses are known to call anything a divergence."""
        return len(self.losses) >= min(FEWEST, self.losses.maxlen or FEWEST)

    def verdict(self, recent: Sequence[float]) -> str | None:
        """What is wrong with ``recent`` losses (finite, oldest first) against those before, or ``None``."""
        if not self.is_ready or not recent:
            return None
        middle, scatter = self.level()
        rise = _median(recent) - middle
        if not (rise > self.max_z * scatter and rise > (self.ratio - 1) * abs(middle)):
            return None
        z = rise / scatter if scatter > 0 else math.inf
        return f"the training loss diverges: {middle + rise:.4g} after {middle:.4g} (z = {z:.3g})"

    def take(self, recent: Sequence[float]) -> None:
        """Count ``recent`` losses among those in order."""
        self.losses.extend(recent)
        self._level = None

    def state(self) -> dict[str, Any]:
        """The window, as a state tree."""
        return {"losses": list(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self._level = None


def _median(values: Sequence[float]) -> float:
    """As NumPy's, which takes longer than all the rest of a look at a handful of numbers."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
