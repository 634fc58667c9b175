"""Empirical-Bayes shrinkage: selected gains look better than they are, so reports pull them in.

Normal-normal model: ``gain_i ~ N(theta_i, s_i^2)`` with known standard errors, ``theta_i ~ N(target, tau^2)``.
The variance ``tau^2`` solves ``sum((gain_i - target)^2 / (s_i^2 + tau^2)) = dof`` and is cut off at zero (R. Paule and
J. Mandel, J. Res. NBS 87, 1982). With the degrees of freedom used here and equal standard errors this is exactly the
positive-part James-Stein estimator, in Lindley's form where the target is the pool's mean (B. Efron and C. Morris,
JASA 70, 1975).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esper.errors import EvidenceError

_POOL = 4
"""Gains from which a pool mean is worth shrinking towards: Lindley's estimator has (k - 3) degrees of freedom."""


def shrink_gains(gains: npt.ArrayLike, standard_errors: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Shrink each gain in proportion to how little is known about it.

    Pools of four or more shrink towards their precision-weighted mean, smaller ones towards zero ("no gain"), which
    for a single gain is ``gain * max(0, 1 - (s / gain)^2)``.

    Parameters
    ----------
    gains, standard_errors:
        ``(k,)`` in loss units. Entries with a non-finite gain or a standard error that is not positive and finite
        stay NaN and have no influence on the others.

    Returns
    -------
    numpy.ndarray
        ``(k,)`` float64.

    Raises
    ------
    EvidenceError
        The two arrays differ in length.
    """
    values = np.asarray(gains, dtype=np.float64).reshape(-1)
    errors = np.asarray(standard_errors, dtype=np.float64).reshape(-1)
    if values.size != errors.size:
        raise EvidenceError(
            f"gains and standard_errors must have the same length, got {values.size} and {errors.size}; "
            "pass one error a gain"
        )
    shrunken = np.full(values.size, np.nan)
    known = np.isfinite(values) & np.isfinite(errors) & (errors > 0)
    if known.any():
        shrunken[known] = _shrink_known(values[known], errors[known])
    return shrunken


def _shrink_known(gains: npt.NDArray[np.float64], errors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Work in units of the largest number at hand: squares of tiny losses must not underflow.
    unit = max(float(np.abs(gains).max()), float(errors.max()))
    gains, variances = gains / unit, (errors / unit) ** 2
    pooled = gains.size >= _POOL
    dof = gains.size - 3 if pooled else max(gains.size - 2, 1)

    def target(tau2: float) -> float:
        return float(np.average(gains, weights=1.0 / (variances + tau2))) if pooled else 0.0

    def excess(tau2: float) -> float:
        return float(((gains - target(tau2)) ** 2 / (variances + tau2)).sum()) - dof

    tau2 = 0.0
    if excess(0.0) > 0:  # decreasing in tau2, and negative at the upper end
        low, high = 0.0, float(((gains - gains.mean() if pooled else gains) ** 2).sum()) / dof
        while low < (tau2 := 0.5 * (low + high)) < high:
            low, high = (tau2, high) if excess(tau2) > 0 else (low, tau2)
    centre = target(tau2)
    return (centre + tau2 / (tau2 + variances) * (gains - centre)) * unit
