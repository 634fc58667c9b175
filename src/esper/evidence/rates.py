"""Exact one-sided bounds on a rate (C. J. Clopper and E. S. Pearson, Biometrika 26, 1934)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper.errors import EvidenceError
from esper.evidence.student import incomplete_beta


@dataclass(frozen=True)
class Rate:
    """``events`` in ``trials``, with one-sided 95% bounds: each alone holds with 95% confidence.

    Without trials nothing is known: the rate is NaN, the bounds are 0 and 1.
    """

    events: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.events <= self.trials:
            raise EvidenceError(
                f"events must lie between 0 and the number of trials, got {self.events} of {self.trials}; "
                "count each trial once"
            )

    @property
    def share(self) -> float:
        return self.events / self.trials if self.trials else float("nan")

    @property
    def low(self) -> float:
        return lower_bound(self.events, self.trials)

    @property
    def high(self) -> float:
        return upper_bound(self.events, self.trials)


def upper_bound(events: int, trials: int, level: float = 0.05) -> float:
    """The rate at which so few ``events`` in ``trials`` (or fewer) have probability ``level``."""
    if events >= trials:
        return 1.0
    # P(X <= k | p) = 1 - I_p(k + 1, n - k)
    return _solve(lambda rate: 1.0 - incomplete_beta(events + 1, trials - events, rate) > level)


def lower_bound(events: int, trials: int, level: float = 0.05) -> float:
    """The rate at which so many ``events`` in ``trials`` (or more) have probability ``level``."""
    return 1.0 - upper_bound(trials - events, trials, level) if events > 0 else 0.0


def _solve(is_below: Callable[[float], bool]) -> float:
    """Where a condition that holds at 0 and not at 1 ceases to hold."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high
