"""Exact bounds on a rate (C. J. Clopper and E. S. Pearson, Biometrika 26, 1934)."""

from __future__ import annotations

import math


def upper_bound(events: int, trials: int, level: float = 0.05) -> float:
    """One-sided bound: the rate at which so few ``events`` in ``trials`` have probability ``level``."""
    if events >= trials:
        return 1.0
    low, high = events / trials, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        below = sum(_probability(k, trials, rate) for k in range(events + 1))
        low, high = (rate, high) if below > level else (low, rate)
    return high


def _probability(events: int, trials: int, rate: float) -> float:
    """Binomial, by logarithms: the coefficients of a thousand trials overflow a float."""
    log_choose = math.lgamma(trials + 1) - math.lgamma(events + 1) - math.lgamma(trials - events + 1)
    return math.exp(log_choose + events * math.log(rate) + (trials - events) * math.log1p(-rate))
