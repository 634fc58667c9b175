"""Online control of false discoveries: the threshold each new cohort's e-value must reach.

Source: Z. Xu and A. Ramdas, "Online multiple testing with e-values", AISTATS 2024 (e-LOND). With
``alpha_t = level * gamma_t * (R_{t-1} + 1)``, where ``R`` counts discoveries so far and ``gamma`` sums to one, testing
``E_t >= 1 / alpha_t`` keeps the false discovery rate at ``level`` or below after any number of tests and under *any*
dependence between the e-values (cohorts share a host and held-out batches, so independence is not to be had).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from esper.errors import EvidenceError

_GAMMA_SUM = 2.109742801236892
"""Sum over n >= 2 of 1 / (n log(n)^2)."""


def discount(test: int) -> float:
    """Return ``gamma_t``, proportional to ``1 / ((t + 1) log(t + 1)^2)``: the share of the level that test t >= 1 has.

    It sums to one over all t and decays slowly enough that, at level 0.05, a run that accepts all its first ten
    cohorts asks for e-values between 41 and 270.
    """
    n = test + 1
    return 1.0 / (n * math.log(n) ** 2 * _GAMMA_SUM)


class OnlineFDR:
    """e-LOND over the cohorts of one run.

    Ask :meth:`threshold` before a cohort is judged, :meth:`record` once when it has been.

    Parameters
    ----------
    level:
        False discovery rate, between 0 and 1.

    Raises
    ------
    EvidenceError
        ``level`` out of range.
    """

    def __init__(self, level: float) -> None:
        if not 0 < level < 1:
            raise EvidenceError(f"level must lie between 0 and 1, got {level!r}; use 0.05")
        self.level = float(level)
        self._num_tests = 0
        self._num_rejected = 0

    @property
    def num_tests(self) -> int:
        """Cohorts recorded."""
        return self._num_tests

    @property
    def num_rejected(self) -> int:
        """Null hypotheses rejected so far: cohorts accepted."""
        return self._num_rejected

    def threshold(self) -> float:
        """Return the e-value that the next cohort must reach, ``1 / alpha_t``."""
        return 1.0 / (self.level * discount(self._num_tests + 1) * (self._num_rejected + 1))

    def record(self, rejected: bool) -> None:
        """Count one finished test. ``rejected``: the null was rejected, the cohort accepted."""
        self._num_tests += 1
        self._num_rejected += int(rejected)

    def state(self) -> dict[str, float | int]:
        """Return everything that :meth:`restore` needs, as plain numbers."""
        return {"level": self.level, "num_tests": self._num_tests, "num_rejected": self._num_rejected}

    def restore(self, state: Mapping[str, float | int]) -> None:
        """Go on from what :meth:`state` has told.

        Raises
        ------
        EvidenceError
            A key is missing, the level is another one, or the counts contradict each other. Nothing was changed.
        """
        missing = {"level", "num_tests", "num_rejected"} - set(state)
        if missing:
            raise EvidenceError(
                f"the state must hold level, num_tests and num_rejected, {sorted(missing)} is missing; "
                "pass what OnlineFDR.state() returned"
            )
        if state["level"] != self.level:
            raise EvidenceError(
                f"a rate once begun keeps its level {self.level}, got {state['level']!r}; build it with that level"
            )
        num_tests, num_rejected = int(state["num_tests"]), int(state["num_rejected"])
        if not 0 <= num_rejected <= num_tests:
            raise EvidenceError(
                f"num_rejected must lie between 0 and num_tests={num_tests}, got {num_rejected}; "
                "pass what OnlineFDR.state() returned"
            )
        self._num_tests, self._num_rejected = num_tests, num_rejected
