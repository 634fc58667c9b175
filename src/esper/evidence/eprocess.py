"""An anytime-valid test of paired loss differences, by betting.

Source: I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 86(1), 2024
(section 4, the mixture or "grid" capital). A gambler who starts with capital 1 bets a fixed share ``lambda`` on "the
branch helps" before each batch. If it does not help, no strategy is expected to win: the capital is a non-negative
supermartingale, and by Ville's inequality it ever reaches ``1/a`` with probability at most ``a``, however often one
looks and whenever one stops.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esper.errors import EvidenceError

BETS = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)
"""The mixture. Dense near 1 because a gate has few batches: only bold bets reach a threshold of 40 in 16 of them."""

SCALE_FACTOR = 2.0
SCALE_FLOOR = 1e-6
"""Loss units; below this a difference of float32 losses is rounding, not evidence."""


def robust_scale(calibration_differences: npt.ArrayLike, *, floor: float = SCALE_FLOOR) -> float:
    """Return a bound for :class:`PairedEProcess`: twice the median absolute difference, at least ``floor``.

    A wider bound bets less a batch, a narrower one clips more. Two medians clip 18% of a normal null's differences.
    With an effect of 1.5 standard deviations the median capital after 16 gate batches is about 140 (three medians:
    30), with one of 1.0 after 24 batches about 550. What clipping hides (rare, large harm) is left to the
    confirmation, which tests the plain mean on other batches.

    Parameters
    ----------
    calibration_differences:
        ``(n,)`` paired differences on batches that the test itself never sees; ``n >= 1``. Where more than half are
        exactly zero their mean absolute value stands in for the median.
    floor:
        Smallest bound, in loss units.

    Raises
    ------
    EvidenceError
        No differences, or a non-finite one.
    """
    sizes = np.abs(np.asarray(calibration_differences, dtype=np.float64).reshape(-1))
    if sizes.size == 0 or not np.isfinite(sizes).all():
        raise EvidenceError(
            f"calibration needs at least one difference and all of them finite, got {sizes.size} with "
            f"{int((~np.isfinite(sizes)).sum())} not finite; check that the loss is finite on every held-out batch"
        )
    typical = float(np.median(sizes)) or float(sizes.mean())
    return max(SCALE_FACTOR * typical, floor)


def fewest_differences(threshold: float) -> int:
    """Return the number of differences below which the capital cannot reach ``threshold``, even if all are large.

    Seven for 41, the first threshold at a false discovery rate of 0.05. A ``min_gain`` above zero asks for more.
    """
    bets = 1.0 + np.array(BETS, dtype=np.float64)
    num = 1
    while float((bets**num).mean()) < threshold:
        num += 1
    return num


class PairedEProcess:
    """E-process against ``H0: E[d] <= min_gain`` for a stream of differences ``d = loss_without - loss_with``.

    Positive differences say that the branch helps. Each difference is clipped to ``[-scale, scale]``, so the null
    hypothesis is about the mean of the *clipped* difference; batches with huge losses of either sign count as
    ``scale``. ``scale`` must be fixed before the stream starts (see :func:`robust_scale`).

    With ``x = (clip(d) - min_gain) / (scale + min_gain) >= -1`` the capital is the mean over the grid of bets of
    ``prod(1 + lambda * x)``, kept in log space.

    A non-finite difference refuses for good: the e-value is 0 from there on, whatever follows.

    Parameters
    ----------
    scale:
        Bound on a difference, in loss units; positive and finite.
    min_gain:
        Smallest mean gain that counts, in loss units; finite and above ``-scale``. At ``scale`` or more the test can
        never accept.

    Raises
    ------
    EvidenceError
        ``scale`` or ``min_gain`` out of range.
    """

    def __init__(self, scale: float, min_gain: float = 0.0) -> None:
        if not (np.isfinite(scale) and scale > 0):
            raise EvidenceError(
                f"scale must be positive and finite, got {scale!r}; take robust_scale of calibration differences"
            )
        if not (np.isfinite(min_gain) and min_gain > -scale):
            raise EvidenceError(f"min_gain must be finite and above -scale={-scale!r}, got {min_gain!r}; use 0.0")
        self.scale = float(scale)
        self.min_gain = float(min_gain)
        self._bets = np.array(BETS, dtype=np.float64)
        self._log_capitals = np.zeros(len(BETS), dtype=np.float64)
        self._count = 0
        self._peak = 1.0
        self._refused = False

    @property
    def count(self) -> int:
        """Differences seen, the refused one included."""
        return self._count

    @property
    def refused(self) -> bool:
        """Whether a non-finite difference has been seen."""
        return self._refused

    @property
    def e_value(self) -> float:
        """Capital now: 1 before the first difference, 0 once refused."""
        if self._refused:
            return 0.0
        top = float(self._log_capitals.max())
        # exp(709) is the largest float64; evidence beyond that is all the same.
        return float(np.exp(min(top, 700.0)) * np.exp(self._log_capitals - top).mean())

    @property
    def peak(self) -> float:
        """Largest capital so far (0 once refused); Ville's inequality bounds this too, so a crossing counts."""
        return 0.0 if self._refused else self._peak

    def update(self, difference: float) -> float:
        """Take one difference (loss units) and return the e-value after it."""
        self._count += 1
        if not np.isfinite(difference):
            self._refused = True
        if self._refused:
            return 0.0
        clipped = min(max(float(difference), -self.scale), self.scale)
        outcome = (clipped - self.min_gain) / (self.scale + self.min_gain)
        self._log_capitals += np.log1p(self._bets * outcome)
        self._peak = max(self._peak, self.e_value)
        return self.e_value
