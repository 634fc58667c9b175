"""The slope of memory over time with an interval, and what it comes to in three days."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from esper.observe.credit import fit_line

BLOCKS = 24
"""Means that a series is taken together to: neighbouring samples depend on each other, distant means hardly do."""
WARM_UP = 0.25
"""Share of a sitting left out at its start: allocators and caches fill up first."""
LONG_H = 72.0


@dataclass(frozen=True, kw_only=True)
class Slope:
    """MB an hour with its 95% interval; NaN where too little was seen. ``hours`` is the stretch it was read from."""

    mb_per_hour: float
    low: float
    high: float
    hours: float
    num_samples: int

    @classmethod
    def of(cls, hours: Sequence[float], memory_mb: Sequence[float]) -> Slope:
        """From one sitting's samples, oldest first; times in hours since its start."""
        start = hours[-1] * WARM_UP if hours else 0.0
        kept = [(t, m) for t, m in zip(hours, memory_mb, strict=True) if t >= start]
        num_blocks = min(BLOCKS, len(kept))
        if num_blocks < 3:
            return cls(mb_per_hour=math.nan, low=math.nan, high=math.nan, hours=0.0, num_samples=len(kept))
        edges = [round(i * len(kept) / num_blocks) for i in range(num_blocks + 1)]
        blocks = [kept[a:b] for a, b in pairwise(edges)]
        line = fit_line(
            [_mean(t for t, _ in block) for block in blocks], [_mean(m for _, m in block) for block in blocks]
        )
        return cls(
            mb_per_hour=line.slope, low=line.low, high=line.high, hours=kept[-1][0] - kept[0][0],
            num_samples=len(kept),
        )  # fmt: skip

    @property
    def long_mb(self) -> float:
        """Growth over three days if it went on like this, by the upper bound."""
        return self.high * LONG_H


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return math.fsum(items) / len(items)
