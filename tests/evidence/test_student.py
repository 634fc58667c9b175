from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.evidence import student
from esper.evidence.student import incomplete_beta, quantile, survival

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("a", "b", "x", "value"),
    [
        (1, 1, 0.3, 0.3),
        (2, 1, 0.3, 0.09),
        (1, 3, 0.5, 0.875),
        (2, 2, 0.25, 0.15625),  # 3x^2 - 2x^3
        (0.5, 0.5, 0.5, 0.5),
        (0.5, 0.5, 0.25, 1 / 3),  # (2/pi) asin(sqrt(x))
        (5, 3, 0.0, 0.0),
        (5, 3, 1.0, 1.0),
    ],
)
def test_incomplete_beta(a: float, b: float, x: float, value: float) -> None:
    assert incomplete_beta(a, b, x) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("t", [-3.0, -0.4, 0.0, 0.7, 2.0, 50.0])
def test_survival_closed_forms(t: float) -> None:
    assert survival(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, abs=1e-12)
    assert survival(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), abs=1e-12)


def test_survival_far_tail_keeps_relative_precision() -> None:
    # 2 degrees of freedom: the tail tends to 1 / (2 t^2)
    assert survival(1e6, 2) == pytest.approx(0.5e-12, rel=1e-9)
    assert survival(1e200, 3) == 0.0
    assert survival(-1e200, 3) == 1.0


def test_survival_many_degrees_is_normal() -> None:
    assert survival(1.959963984540054, 1e7) == pytest.approx(0.025, abs=1e-7)


@pytest.mark.parametrize(
    ("dof", "value"),
    # The classic table of the two-sided 95% point.
    [(1, 12.706204736), (2, 4.302652730), (5, 2.570581836), (10, 2.228138852), (30, 2.042272456), (120, 1.979930405)],
)
def test_quantile_table(dof: int, value: float) -> None:
    assert quantile(0.975, dof) == pytest.approx(value, abs=1e-8)


def test_special_arguments() -> None:
    assert quantile(0.5, 7) == pytest.approx(0.0, abs=1e-12)
    assert survival(math.inf, 3) == 0.0 and survival(-math.inf, 3) == 1.0
    assert math.isnan(survival(math.nan, 3)) and math.isnan(survival(1.0, math.nan))


def test_no_convergence_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "_MAX_TERMS", 1)
    assert math.isnan(survival(1.0, 40))


@given(st.floats(-50, 50), st.floats(0.5, 500))
def test_symmetry_and_range(t: float, dof: float) -> None:
    assert 0 <= survival(t, dof) <= 1
    assert survival(t, dof) + survival(-t, dof) == pytest.approx(1.0, abs=1e-12)


@given(st.floats(0.5, 0.999), st.integers(1, 200))
def test_quantile_inverts_survival(probability: float, dof: int) -> None:
    assert survival(quantile(probability, dof), dof) == pytest.approx(1 - probability, abs=1e-10)
