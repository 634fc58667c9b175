"""Paired mean differences with Student's t interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper.evidence.student import quantile, survival


@dataclass(frozen=True, kw_only=True)
class PairedResult:
    """A mean paired difference (loss units; positive is better), its 95% interval and one-sided p-value.

    NaN means unknown, and every gate refuses an unknown: compare as ``p_one_sided <= level``, never as
    ``not p_one_sided > level``.
    """

    mean: float
    low: float
    high: float
    p_one_sided: float
    """p-value of ``H0: mean <= min_gain``."""
    num: int

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN for fewer than two differences."""
        if self.num < 2:
            return math.nan
        return (self.high - self.low) / (2.0 * quantile(0.975, self.num - 1))


def paired_difference(differences: npt.ArrayLike, *, min_gain: float = 0.0) -> PairedResult:
    """Summarise paired differences ``loss_without - loss_with``, one a batch.

    Parameters
    ----------
    differences:
        ``(n,)``, loss units. Fewer than two, or a non-finite one, gives NaN throughout.
    min_gain:
        Smallest mean that counts as a gain.

    Returns
    -------
    PairedResult
        Two-sided 95% interval and one-sided p-value with n - 1 degrees of freedom. If all differences are exactly
        equal the interval has no width and the p-value is NaN: such batches are copies of one batch, not evidence.
    """
    values = np.asarray(differences, dtype=np.float64).reshape(-1)
    num = int(values.size)
    if num < 2 or not np.isfinite(values).all():
        return PairedResult(mean=math.nan, low=math.nan, high=math.nan, p_one_sided=math.nan, num=num)
    if values.min() == values.max():
        value = float(values[0])
        return PairedResult(mean=value, low=value, high=value, p_one_sided=math.nan, num=num)
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(num)
    half = quantile(0.975, num - 1) * error
    # Differences in the last bits of a subnormal can round to a spread of zero: unknown as well.
    p_value = survival((mean - min_gain) / error, num - 1) if error > 0 else math.nan
    return PairedResult(mean=mean, low=mean - half, high=mean + half, p_one_sided=p_value, num=num)
