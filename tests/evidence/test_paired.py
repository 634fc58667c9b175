from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.evidence.paired import PairedResult, paired_difference

pytestmark = pytest.mark.unit


def test_known_answer() -> None:
    # Mean 3, sd sqrt(2.5), standard error sqrt(0.5); t = 4.2426 with 4 degrees of freedom, t(0.975, 4) = 2.776445.
    result = paired_difference([1.0, 2.0, 3.0, 4.0, 5.0])
    assert result.mean == 3.0 and result.num == 5
    assert result.low == pytest.approx(3 - 2.776445105 * math.sqrt(0.5), abs=1e-8)
    assert result.high == pytest.approx(3 + 2.776445105 * math.sqrt(0.5), abs=1e-8)
    # Closed form for 4 degrees of freedom, with u = t^2 / (1 + t^2 / 4) = 36 / 11.
    assert result.p_one_sided == pytest.approx(0.5 - 3 / 8 * math.sqrt(36 / 11) * (1 - 3 / 11), abs=1e-12)
    assert result.standard_error == pytest.approx(math.sqrt(0.5), rel=1e-12)


def test_two_values_follow_the_cauchy_law() -> None:
    # n = 2: t = mean / (|a - b| / 2) = 2 with one degree of freedom.
    assert paired_difference([1.0, 3.0]).p_one_sided == pytest.approx(0.5 - math.atan(2.0) / math.pi, abs=1e-12)


def test_min_gain_moves_the_p_value_only() -> None:
    plain, strict = paired_difference([1.0, 2.0, 3.0]), paired_difference([1.0, 2.0, 3.0], min_gain=2.0)
    assert strict.p_one_sided == pytest.approx(0.5)
    assert (strict.mean, strict.low, strict.high) == (plain.mean, plain.low, plain.high)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, 2.0, math.inf], [-math.inf, 1.0]])
def test_unknown_refuses(values: list[float]) -> None:
    result = paired_difference(values)
    assert all(math.isnan(x) for x in (result.mean, result.low, result.high, result.p_one_sided))
    assert math.isnan(result.standard_error)
    assert not result.p_one_sided <= 0.05 and result.num == len(values)


@pytest.mark.parametrize("value", [0.1, 0.0, -0.1])
def test_copies_of_one_batch_are_no_evidence(value: float) -> None:
    result = paired_difference([value] * 10)
    assert (result.mean, result.low, result.high) == (value, value, value)
    assert math.isnan(result.p_one_sided)


def test_spread_that_rounds_to_zero_is_unknown() -> None:
    assert math.isnan(paired_difference([5e-324, 1e-323]).p_one_sided)


def test_interval_covers_and_p_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    results = [paired_difference(rng.normal(0.0, 1.0, 6)) for _ in range(1500)]
    covered = np.mean([r.low <= 0 <= r.high for r in results])
    assert covered == pytest.approx(0.95, abs=0.02)
    assert np.mean([r.p_one_sided <= 0.05 for r in results]) == pytest.approx(0.05, abs=0.02)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20).filter(lambda v: max(v) - min(v) > 1e-6))
def test_sign_flip(values: list[float]) -> None:
    result, flipped = paired_difference(values), paired_difference([-v for v in values])
    assert result.low <= result.mean <= result.high
    assert result.p_one_sided + flipped.p_one_sided == pytest.approx(1.0, abs=1e-9)
    assert flipped.mean == pytest.approx(-result.mean) and flipped.low == pytest.approx(-result.high)


def test_result_is_frozen() -> None:
    result = PairedResult(mean=0.0, low=0.0, high=0.0, p_one_sided=1.0, num=3)
    with pytest.raises(AttributeError):
        result.mean = 1.0  # type: ignore[misc]
