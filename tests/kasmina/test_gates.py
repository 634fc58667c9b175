"""The gates, which fail closed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.kasmina.gates import (
    SANITY_KINDS,
    Gate,
    capture_gate,
    evidence_gate,
    germination_gate,
    hold_gate,
    ramp_gate,
    sanity_gate,
    stability_gate,
)
from esper.kasmina.lifecycle import TABLE

pytestmark = pytest.mark.unit

# --------------------------------------------------------------------------------------------------------------------
# Gates: each with arguments that pass, every one of which is then taken away or spoiled

WITHOUT_REMEDY = ("evidence", "hold")
"""Gates whose refusal is the answer: there is nothing for the user to do."""

PASSING: dict[str, tuple[Callable[..., Gate], dict[str, Any]]] = {
    "germination": (
        germination_gate,
        {
            "free_slots": 1,
            "chunks_free": 4,
            "embargo": 0,
            "params_after": 1_000_001,
            "budget_params": 1_000_001,
            "flops_after": 2.0e9,
            "budget_flops": 2.0e9,
            "bytes_needed": 100,
            "bytes_free": 100,
        },
    ),
    "capture": (capture_gate, {"batches": 100, "needed": 100}),
    "sanity": (
        lambda **kw: sanity_gate("gradient", **kw),
        {"t_statistic": 2.0, "min_t": 2.0, "capture_age": 50, "max_age": 50},
    ),
    "sanity, reconstruction": (
        lambda **kw: sanity_gate("reconstruction", **kw),
        {"explained": 0.25, "max_unexplained": 0.75, "capture_age": 0, "max_age": 50},
    ),
    "sanity, nothing fitted": (lambda **kw: sanity_gate("none", **kw), {"capture_age": 0, "max_age": 50}),
    "ramp": (ramp_gate, {"alpha": 0.5, "target": 0.5}),
    "stability": (
        lambda **kw: stability_gate(np.full(12, 2.0), **kw),
        {"steps": 10, "min_steps": 10, "slope_band": 2.0, "variance_band": 4.0, "calm": 0.01},
    ),
    "evidence": (
        evidence_gate,
        {"e_value": 20.0, "threshold": 20.0, "confirm_p": 0.05, "level": 0.05, "gain": 0.01, "min_gain": 0.0},
    ),
    "hold": (
        hold_gate,
        {"gain": 0.001, "harm": 0.01, "tolerated_harm": 0.01, "gain_per_cost": 0.02, "min_gain_per_cost": 0.02},
    ),
}
NO_CEILING = {("germination", "budget_params"), ("germination", "budget_flops")}


@pytest.mark.parametrize("name", PASSING)
def test_a_gate_passes_at_its_bound_and_says_why(name: str) -> None:
    gate_of, arguments = PASSING[name]
    gate = gate_of(**arguments)
    assert gate.passed, gate.reason
    assert gate.name == name.split(",")[0] and gate.reason
    assert gate.name in {way for row in TABLE for way in row.successors.values()}


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        (name, argument, value)
        for name, (_, arguments) in PASSING.items()
        for argument in arguments
        for value in (None, math.nan, math.inf, -math.inf)
        if not (value is None and (name, argument) in NO_CEILING)
    ],
)
def test_a_missing_or_non_finite_metric_or_bound_refuses(name: str, argument: str, value: float | None) -> None:
    gate_of, arguments = PASSING[name]
    gate = gate_of(**{**arguments, argument: value})
    assert not gate.passed
    shown = str(value).lstrip("-")  # the share left unexplained has the other sign
    assert "finite" in gate.reason and shown in gate.reason and (";" in gate.reason or name in WITHOUT_REMEDY)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("germination", "free_slots", 0),
        ("germination", "chunks_free", 0),
        ("germination", "embargo", 1),
        ("germination", "params_after", 1_000_002),
        ("germination", "flops_after", 2_000_000_001.0),
        ("germination", "bytes_needed", 101),
        ("germination", "bytes_needed", -1),
        ("capture", "batches", 99),
        ("capture", "needed", 0),
        ("sanity", "t_statistic", 1.99),
        ("sanity", "capture_age", 51),
        ("sanity", "capture_age", -1),
        ("sanity, reconstruction", "explained", 0.24),
        ("sanity, nothing fitted", "capture_age", 51),
        ("ramp", "alpha", 0.4999),
        ("ramp", "target", 0.0),
        ("stability", "steps", 9),
        ("evidence", "e_value", 19.9),
        ("evidence", "confirm_p", 0.051),
        ("evidence", "confirm_p", -1),
        ("evidence", "gain", 0.0),
        ("hold", "gain", 0.0),
        ("hold", "harm", 0.0101),
        ("hold", "gain_per_cost", 0.019),
    ],
)
def test_a_gate_refuses_just_beyond_its_bound_with_rule_value_and_remedy(
    name: str, argument: str, value: float
) -> None:
    gate_of, arguments = PASSING[name]
    gate = gate_of(**{**arguments, argument: value})
    assert not gate.passed
    rule, _, remedy = gate.reason.partition("; ")
    shown = 1 - value if argument == "explained" else value
    written = f"{shown:,.0f}" if float(shown).is_integer() else f"{shown:.4g}"
    assert "must be" in rule and rule.endswith(f"got {written}")
    assert bool(remedy) != (name in WITHOUT_REMEDY)


def test_no_ceiling_means_no_refusal_but_the_metric_must_still_be_known() -> None:
    gate_of, arguments = PASSING["germination"]
    free = {**arguments, "budget_params": None, "budget_flops": None, "params_after": 10**12}
    assert gate_of(**free).passed
    assert "unbounded" in gate_of(**free).reason
    assert not gate_of(**{**free, "params_after": None}).passed


def test_an_unknown_kind_of_sanity_test_refuses() -> None:
    gate = sanity_gate("vibes", t_statistic=9.0, min_t=2.0, capture_age=0, max_age=9)
    assert not gate.passed and "'vibes'" in gate.reason and "reconstruction" in gate.reason


def test_sanity_reads_the_metric_of_its_own_kind() -> None:
    age = {"capture_age": 0, "max_age": 9}
    assert not sanity_gate("gradient", explained=1.0, max_unexplained=0.9, min_t=2.0, **age).passed
    assert not sanity_gate("reconstruction", t_statistic=9.0, min_t=2.0, max_unexplained=0.9, **age).passed


# --------------------------------------------------------------------------------------------------------------------
# Stability

NOISE = np.random.default_rng(0).standard_normal(30)


def _stability(losses: Any, **kw: Any) -> Gate:
    return stability_gate(losses, steps=30, min_steps=10, **kw)


@pytest.mark.parametrize(
    ("losses", "passes", "word"),
    [
        (2.0 + 0.1 * NOISE, True, ""),
        (np.linspace(4, 2, 30) + 0.1 * NOISE, True, ""),
        (np.full(30, 2.0), True, ""),
        (np.zeros(30), True, ""),
        (np.linspace(2, 2.01, 30), True, ""),
        (np.linspace(2, 3, 30) + 0.1 * NOISE, False, "rise"),
        (2.0 + np.where(np.arange(30) < 15, 0.05, 0.5) * NOISE, False, "variance"),
        (2.0 + np.where(np.arange(30) < 15, 0.5, 0.05) * NOISE, True, ""),
        (np.full(7, 2.0), False, "losses in the window"),
        (np.zeros(0), False, "losses in the window"),
        (None, False, "losses in the window"),
    ],
)
def test_what_counts_as_settled(losses: Any, passes: bool, word: str) -> None:
    gate = _stability(losses)
    assert gate.passed is passes, gate.reason
    assert word in gate.reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_non_finite_loss_in_the_window_refuses(bad: float) -> None:
    losses = np.full(30, 2.0)
    losses[17] = bad
    gate = _stability(losses)
    assert not gate.passed and f"got {bad}" in gate.reason


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 2.0**10, 1e300]), st.floats(-1, 1))
def test_stability_does_not_depend_on_the_scale(seed: int, scale: float, drift: float) -> None:
    losses = 2 + 0.2 * np.random.default_rng(seed).standard_normal(30) + np.linspace(0, drift, 30)
    assert _stability(losses).passed == _stability(losses * scale).passed


def test_the_standard_error_of_the_slope_is_the_textbooks() -> None:
    losses = 2 + 0.3 * NOISE + np.linspace(0, 0.4, 30)
    design = np.stack([np.ones(30), np.linspace(-0.5, 0.5, 30)], axis=1)
    coefficients, residuals, *_ = np.linalg.lstsq(design, losses, rcond=None)
    error = math.sqrt(residuals[0] / 28 * np.linalg.inv(design.T @ design)[1, 1])
    t = coefficients[1] / error
    assert _stability(losses, slope_band=t * 1.001, calm=0.0).passed
    assert not _stability(losses, slope_band=t * 0.999, calm=0.0).passed


def test_settled_noise_is_rarely_refused() -> None:
    generator = np.random.default_rng(1)
    refused = sum(not _stability(2 + 0.2 * generator.standard_normal(30)).passed for _ in range(400))
    assert refused / 400 < 0.06  # one-sided 2 standard errors (2.3%) and an F ratio of 4 at 15 and 15 (0.5%)


def test_the_kinds_of_sanity_test() -> None:
    assert SANITY_KINDS == ("gradient", "reconstruction", "none")
