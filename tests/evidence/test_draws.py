"""Draws follow from seed and cohort alone, at the rate that was asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.evidence.draws import drawn

pytestmark = pytest.mark.unit


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_a_draw_repeats_and_a_larger_share_draws_all_that_a_smaller_does(
    seed: int, cohort: int, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    first = drawn(small, seed, "twin", cohort)
    assert first == drawn(small, seed, "twin", cohort)
    assert not first or drawn(large, seed, "twin", cohort)
    assert not drawn(0.0, seed, "twin", cohort) and drawn(1.0, seed, "twin", cohort)


def test_the_rate_is_as_asked_and_purposes_are_independent() -> None:
    twin = [drawn(0.15, 7, "twin", cohort) for cohort in range(4000)]
    withhold = [drawn(0.15, 7, "withhold", cohort) for cohort in range(4000)]
    both = sum(a and b for a, b in zip(twin, withhold, strict=True)) / 4000
    assert sum(twin) / 4000 == pytest.approx(0.15, abs=0.017) and sum(withhold) / 4000 == pytest.approx(0.15, abs=0.017)
    assert both == pytest.approx(0.15**2, abs=0.008)
    assert [drawn(0.15, 8, "twin", cohort) for cohort in range(4000)] != twin
