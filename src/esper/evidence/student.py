"""Student's t distribution in plain Python, so that the core needs no SciPy.

The regularised incomplete beta function is the continued fraction of W. Press et al., "Numerical Recipes", 3rd ed.,
section 6.4, evaluated with Lentz's method (absolute error under 1e-12 in the tests).
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_EPSILON = 1e-15
_MAX_TERMS = 10_000


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function ``I_x(a, b)`` for ``a, b > 0`` and ``0 <= x <= 1``."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    # The fraction converges fast only on this side of the mean; the other side follows by symmetry.
    if x < (a + 1.0) / (a + b + 2.0):
        return math.exp(log_front) * _beta_fraction(a, b, x) / a
    return 1.0 - math.exp(log_front) * _beta_fraction(b, a, 1.0 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    c = 1.0
    d = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, _MAX_TERMS + 1):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        d = 1.0 / _away_from_zero(1.0 + even * d)
        c = _away_from_zero(1.0 + even / c)
        value *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        d = 1.0 / _away_from_zero(1.0 + odd * d)
        c = _away_from_zero(1.0 + odd / c)
        value *= d * c
        if abs(d * c - 1.0) < _EPSILON:
            return value
    return math.nan  # not converged: unknown, which every gate refuses


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def survival(t: float, dof: float) -> float:
    """Return ``P(T > t)`` for Student's t with ``dof > 0`` degrees of freedom; NaN in, NaN out."""
    if math.isnan(t) or math.isnan(dof):
        return math.nan
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    # The ratio form keeps t**2 from overflowing.
    tail = 0.5 * incomplete_beta(dof / 2.0, 0.5, dof / (dof + t * t) if abs(t) < 1e150 else 0.0)
    return tail if t >= 0 else 1.0 - tail


@lru_cache(maxsize=1024)  # asked again and again for the same few degrees of freedom
def quantile(probability: float, dof: float) -> float:
    """Return the t with ``P(T <= t) = probability``, for ``0.5 <= probability < 1``, by bisection to full precision."""
    upper_tail = 1.0 - probability
    low, high = 0.0, 1.0
    while survival(high, dof) > upper_tail:
        low, high = high, 2.0 * high
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        if survival(middle, dof) > upper_tail:
            low = middle
        else:
            high = middle
