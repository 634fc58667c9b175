"""The gates between the states of a seed.

They are pure and fail closed: a metric that is missing (``None``), NaN or infinite *refuses*, as does a missing
threshold. A gate's reason always states the rule and the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import numpy as np
import numpy.typing as npt

Number = float | int | None
"""A metric; ``None`` where it could not be measured."""

MIN_WINDOW = 8
"""Fewest losses from which slope and variance are read."""

SANITY_KINDS = ("gradient", "reconstruction", "none")
"""What a start's isolated training promises: see :func:`sanity_gate`."""


@dataclass(frozen=True, slots=True)
class Gate:
    """What a gate said. ``reason`` holds the rule and the value, also when it passed."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class _Rule:
    """``what`` must be ``relation`` ``bound``, and no less than ``least`` (which catches a -1 that stands for "none").

    ``ceiling``: a bound of ``None`` means that the user set none.
    """

    what: str
    value: Number
    relation: Literal["at least", "at most", "above"]
    bound: Number
    remedy: str
    ceiling: bool = False
    least: float = -math.inf

    def problem(self) -> str | None:
        if not _is_finite(self.value):
            return f"{self.what} must be a finite number, got {self.value}{self._advice()}"
        value, bound = self.value, self.bound
        if value < self.least:
            return f"{self.what} must be at least {_number(self.least)}, got {_number(value)}{self._advice()}"
        if self.ceiling and bound is None:
            return None
        if not _is_finite(bound):
            return f"the bound on {self.what} must be a finite number, got {bound}; check the configuration"
        if self.relation == "above":
            holds = value > bound
        else:
            holds = value >= bound if self.relation == "at least" else value <= bound
        if holds:
            return None
        return f"{self.what} must be {self.relation} {_number(bound)}, got {_number(value)}{self._advice()}"

    def _advice(self) -> str:
        return f"; {self.remedy}" if self.remedy else ""

    def statement(self) -> str:
        assert self.value is not None  # a rule states itself only once it has been judged
        bound = "unbounded" if self.bound is None else f"{self.relation} {_number(self.bound)}"
        return f"{self.what} {_number(self.value)} ({bound})"


def _number(value: float) -> str:
    """Counts as they are, measurements to four digits (more would only claim precision)."""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


def _is_finite(value: Number) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _judge(name: str, *rules: _Rule) -> Gate:
    for rule in rules:
        problem = rule.problem()
        if problem is not None:
            return Gate(name, False, problem)
    return Gate(name, True, ", ".join(rule.statement() for rule in rules))


def germination_gate(
    *,
    free_slots: Number,
    chunks_free: Number,
    embargo: Number,
    params_after: Number,
    budget_params: Number,
    flops_after: Number,
    budget_flops: Number,
    bytes_needed: Number,
    bytes_free: Number,
) -> Gate:
    """DORMANT -> GERMINATED: is there room, and is the place free?

    ``chunks_free`` counts the wanted chunks that nobody owns, ``embargo`` the steps for which they must still rest.
    ``budget_params`` and ``budget_flops`` are the user's ceilings; ``None`` there means that none was set.
    """
    return _judge(
        "germination",
        _Rule("free slots", free_slots, "at least", 1, "wait for a cohort to end"),
        _Rule("free chunks", chunks_free, "at least", 1, "name chunks without a live seed"),
        _Rule("steps of embargo left", embargo, "at most", 0, "wait, or name other chunks"),
        _Rule("parameters after", params_after, "at most", budget_params, "raise the budget or grow less", True, 1),
        _Rule("FLOPs after", flops_after, "at most", budget_flops, "raise the budget or grow less", True, 1),
        _Rule("bytes needed", bytes_needed, "at most", bytes_free, "grow less, or lower capture.rows", least=0),
    )


def capture_gate(*, batches: Number, needed: Number) -> Gate:
    """GERMINATED -> TRAINING: is the capture buffer full?"""
    return _judge(
        "capture",
        _Rule("batches needed", needed, "at least", 1, "set capture.batches to at least 2"),
        _Rule("captured batches", batches, "at least", needed, "wait for more training batches"),
    )


def sanity_gate(
    kind: str,
    *,
    t_statistic: Number = None,
    explained: Number = None,
    min_t: Number = None,
    max_unexplained: Number = None,
    capture_age: Number,
    max_age: Number,
) -> Gate:
    """TRAINING -> GRAFTING: did the isolated training learn something that holds on rows of other batches?

    ``gradient`` needs ``t_statistic`` (clustered by sequence or image) of at least ``min_t``; ``reconstruction`` needs
    to leave at most the share ``max_unexplained`` of the target's variance; ``none`` (a start that fits nothing and
    begins with zero effect) is held to the age of the captures alone. ``capture_age`` and ``max_age`` are in steps.
    """
    age = _Rule("age of the captures in steps", capture_age, "at most", max_age, "capture again", least=0)
    if kind == "gradient":
        fit = _Rule("t statistic of the fit", t_statistic, "at least", min_t, "try another start or site")
        return _judge("sanity", fit, age)
    if kind == "reconstruction":
        left = 1 - explained if explained is not None else None
        fit = _Rule("unexplained share", left, "at most", max_unexplained, "fit longer or wider")
        return _judge("sanity", fit, age)
    if kind == "none":
        return _judge("sanity", age)
    return Gate("sanity", False, f"kind must be one of {', '.join(SANITY_KINDS)}, got {kind!r}; fix the start")


def ramp_gate(*, alpha: Number, target: Number) -> Gate:
    """GRAFTING -> STABILIZATION: alpha is at its target (to float32 rounding)."""
    reached = target * (1 - 1e-6) if target is not None else None
    return _judge(
        "ramp",
        _Rule("target of alpha", target, "above", 0, "set a positive target"),
        _Rule("alpha", alpha, "at least", reached, "let the strategy go on"),
    )


def stability_gate(
    losses: Sequence[float] | npt.NDArray[np.floating] | None,
    *,
    steps: Number,
    min_steps: Number,
    slope_band: Number = 2.0,
    variance_band: Number = 4.0,
    calm: Number = 0.01,
) -> Gate:
    """STABILIZATION -> EVALUATING: has the network settled?

    Read from ``losses``, the task's loss at the last steps, oldest first; nothing here depends on the loss's scale.

    * Slope: the rise of the least-squares line over the window is at most ``slope_band`` of its standard errors, or at
      most the share ``calm`` of the mean loss. A falling loss passes.
    * Variance about that line: in the second half at most ``variance_band`` times the first half's (4 is about
      p = 0.01 of an F ratio at 15 and 15 degrees of freedom), or a deviation within the share ``calm`` of the mean.
    """
    window = np.zeros(0) if losses is None else np.asarray(losses, dtype=np.float64).reshape(-1)
    enough = _judge(
        "stability",
        _Rule("steps in the state", steps, "at least", min_steps, "wait"),
        _Rule("losses in the window", window.size, "at least", MIN_WINDOW, "wait for more steps"),
        _Rule("slope band", slope_band, "at least", 0, "use 2"),
        _Rule("variance band", variance_band, "above", 0, "use 4"),
        _Rule("calm share", calm, "at least", 0, "use 0.01"),
    )
    if not enough.passed:
        return enough
    assert slope_band is not None and variance_band is not None and calm is not None  # judged finite above
    if not np.isfinite(window).all():
        bad = window[~np.isfinite(window)][0]
        return Gate("stability", False, f"losses must be finite, got {bad}; wait until they leave the window")
    # In units of the largest loss nothing over- or underflows; a window of zeros stays as it is.
    window = window / (np.abs(window).max() or 1.0)
    rise, error, early, late = _trend(window)
    level = abs(float(window.mean()))
    return _judge(
        "stability",
        _Rule("rise of the loss (share of its peak)", rise, "at most", max(slope_band * error, calm * level), "wait"),
        _Rule("late variance", late, "at most", max(variance_band * early, (calm * level) ** 2), "wait"),
        _Rule("steps in the state", steps, "at least", min_steps, "wait"),
    )


def _trend(window: npt.NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Rise of the least-squares line over the window, its standard error, residual variance of each half."""
    size = window.size
    time = np.linspace(-0.5, 0.5, size)
    spread = float(time @ time)
    rise = float(time @ window) / spread
    residual = window - window.mean() - rise * time
    error = math.sqrt(float(residual @ residual) / (size - 2) / spread)
    half = size // 2
    return rise, error, float(np.mean(residual[:half] ** 2)), float(np.mean(residual[-half:] ** 2))


def evidence_gate(
    *, e_value: Number, threshold: Number, confirm_p: Number, level: Number, gain: Number, min_gain: Number = 0.0
) -> Gate:
    """EVALUATING -> FINE_TUNING: is the gain on held-out batches real, and confirmed once on batches of its own?

    ``gain`` and ``min_gain`` are in units of the loss. An e-value that overflowed refuses: cap it where it is computed.
    """
    return _judge(
        "evidence",
        _Rule("gain", gain, "above", min_gain, ""),
        _Rule("e-value", e_value, "at least", threshold, ""),
        _Rule("p-value of the confirmation", confirm_p, "at most", level, "", least=0),
    )


def hold_gate(
    *, gain: Number, harm: Number, tolerated_harm: Number, gain_per_cost: Number, min_gain_per_cost: Number
) -> Gate:
    """FINE_TUNING -> FOSSILIZED: the gain is still there, harm is excluded, and it is worth its cost.

    ``gain`` is in units of the loss. ``harm`` is the lower end of the gain's 95% interval with its sign turned, as a
    share of the loss: what is not excluded.
    """
    return _judge(
        "hold",
        _Rule("gain", gain, "above", 0.0, ""),
        _Rule("harm that is not excluded, as a share of the loss,", harm, "at most", tolerated_harm, ""),
        _Rule("gain per cost", gain_per_cost, "at least", min_gain_per_cost, ""),
    )
