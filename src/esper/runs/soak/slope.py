"""The slope of memory over time with an interval, and what it comes to in three days.

Memory at one moment depends on which hosts are alive, so neighbouring samples are much alike: taken for independent
they make a drift of minutes look like a certain slope. Residuals of the block means are taken for a first-order
autoregression; the interval is that of as many independent means as there are in effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from esper.observe.credit import Line, fit_line
from esper.observe.scores import student_quantile

MOST_BLOCKS = 96
"""Means that a series is taken together to, at the most."""
FEWEST_BLOCKS = 8
"""With fewer nothing can be said about how they depend on each other."""
BLOCK_H = 1 / 60
"""A mean is over this long, at the least."""
_MOST_LIKE = 0.9
"""Autocorrelation that is taken for what it is at the most: beyond, a series this short holds no slope."""
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
        num_blocks = min(MOST_BLOCKS, len(kept), int((kept[-1][0] - start) / BLOCK_H) if kept else 0)
        if num_blocks < FEWEST_BLOCKS:
            return cls(mb_per_hour=math.nan, low=math.nan, high=math.nan, hours=0.0, num_samples=len(kept))
        edges = [round(i * len(kept) / num_blocks) for i in range(num_blocks + 1)]
        blocks = [kept[a:b] for a, b in pairwise(edges)]
        times, levels = ([_mean(pair[i] for pair in block) for block in blocks] for i in (0, 1))
        line = fit_line(times, levels)
        half = (line.high - line.slope) * _widening(line, times, levels)
        return cls(
            mb_per_hour=line.slope, low=line.slope - half, high=line.slope + half, hours=kept[-1][0] - kept[0][0],
            num_samples=len(kept),
        )  # fmt: skip

    @property
    def long_mb(self) -> float:
        """Growth over three days if it went on like this, by the upper bound."""
        return self.high * LONG_H


def _widening(line: Line, times: Sequence[float], levels: Sequence[float]) -> float:
    """Factor on the half-width of a line's interval that makes up for residuals which depend on each other.

    A fitted line takes some of their autocorrelation away, about ``(2 + 4 r) / n``, which is put back (M. G. Kendall,
    Biometrika 41, 1954, with a trend in the place of a mean).
    """
    num = len(times)
    left = [m - line.intercept - line.slope * t for t, m in zip(times, levels, strict=True)]
    total = math.fsum(value**2 for value in left)
    if total == 0:
        return 1.0
    found = math.fsum(a * b for a, b in pairwise(left)) / total
    alike = min(_MOST_LIKE, max(0.0, (found + 2 / num) / (1 - 4 / num)))
    in_effect = num * (1 - alike) / (1 + alike)
    quantiles = student_quantile(max(1, int(in_effect) - 2)) / student_quantile(num - 2)
    return quantiles * math.sqrt((1 + alike) / (1 - alike))


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return math.fsum(items) / len(items)
