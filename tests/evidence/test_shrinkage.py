from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import EvidenceError
from esper.evidence.shrinkage import shrink_gains

pytestmark = pytest.mark.unit


def test_single_gain_shrinks_to_zero() -> None:
    assert shrink_gains([2.0], [1.0]) == pytest.approx([2.0 * (1 - 1 / 4)])
    assert shrink_gains([0.5], [1.0]) == pytest.approx([0.0])
    assert shrink_gains([-2.0], [1.0]) == pytest.approx([-1.5])


def test_three_gains_are_james_stein() -> None:
    gains = np.array([1.0, 2.0, 4.0])
    factor = 1 - (3 - 2) * 1.0 / (gains**2).sum()
    assert shrink_gains(gains, [1.0] * 3) == pytest.approx(factor * gains)


def test_five_equal_errors_are_lindley() -> None:
    gains = np.array([1.0, 2.0, 4.0, 7.0, 11.0])
    mean = gains.mean()
    factor = 1 - (5 - 3) * 4.0 / ((gains - mean) ** 2).sum()
    assert shrink_gains(gains, [2.0] * 5) == pytest.approx(mean + factor * (gains - mean))


def test_positive_part() -> None:
    assert shrink_gains([1.0, 1.1, 0.9, 1.0], [1.0] * 4) == pytest.approx([1.0] * 4)
    # Without any spread beyond the errors the pool's mean is weighted by precision.
    expected = (1.0 + 1.0 + 1.0 + 2.0 / 4) / 3.25
    assert shrink_gains([1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 1.0, 2.0]) == pytest.approx([expected] * 4)


def test_less_certain_gains_move_more() -> None:
    shrunken = shrink_gains([0.0, 4.0, 0.0, 4.0], [0.1, 0.1, 1.0, 1.0])
    assert shrunken[2] > shrunken[0] and shrunken[3] < shrunken[1]


def test_unknown_stays_unknown_and_harmless() -> None:
    shrunken = shrink_gains([1.0, np.nan, 2.0, 4.0, 5.0, 6.0], [1.0, 1.0, 1.0, 1.0, 0.0, np.inf])
    assert np.isnan(shrunken[[1, 4, 5]]).all()
    assert shrunken[[0, 2, 3]] == pytest.approx(shrink_gains([1.0, 2.0, 4.0], [1.0] * 3))
    assert np.isnan(shrink_gains([np.nan], [1.0])).all()
    assert shrink_gains([], []).shape == (0,)


def test_lowers_the_error_of_a_pool() -> None:
    rng = np.random.default_rng(0)
    plain = shrunken = 0.0
    for _ in range(200):
        truth = rng.normal(0.03, 0.01, 8)
        seen = truth + rng.normal(0.0, 0.02, 8)
        plain += ((seen - truth) ** 2).sum()
        shrunken += ((shrink_gains(seen, [0.02] * 8) - truth) ** 2).sum()
    assert shrunken < 0.6 * plain


gains_and_errors = st.integers(1, 12).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(-10, 10), min_size=k, max_size=k), st.lists(st.floats(0.01, 10), min_size=k, max_size=k)
    )
)


@given(gains_and_errors, st.floats(1e-6, 1e6))
def test_between_gain_and_pool_in_any_unit(pool: tuple[list[float], list[float]], unit: float) -> None:
    gains, errors = np.array(pool[0]), np.array(pool[1])
    shrunken = shrink_gains(gains, errors)
    assert np.isfinite(shrunken).all()
    low, high = (gains.min(), gains.max()) if gains.size >= 4 else (min(gains.min(), 0), max(gains.max(), 0))
    assert (shrunken >= low - 1e-9).all() and (shrunken <= high + 1e-9).all()
    np.testing.assert_allclose(shrink_gains(gains * unit, errors * unit), shrunken * unit, rtol=1e-5, atol=1e-7 * unit)


def test_lengths_must_match() -> None:
    with pytest.raises(EvidenceError, match="same length, got 2 and 1"):
        shrink_gains([1.0, 2.0], [1.0])
