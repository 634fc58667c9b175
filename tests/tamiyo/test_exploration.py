from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.protocol import Observation
from esper.tamiyo.exploration import draw_variation, pressing_chunks

pytestmark = pytest.mark.unit

Observe = Callable[..., Observation]


@given(st.integers(1, 50), st.integers(0, 10), st.integers(0, 50))
def test_deterministic_and_never_empty(num: int, seed: int, cohort: int) -> None:
    one, two = draw_variation(num, seed, cohort), draw_variation(num, seed, cohort)
    assert (one.keep == two.keep).all() and one.keep.any() and one.keep.shape == (num,)
    assert (one.growth, one.start, one.strategy, one.pressing_only) == (
        two.growth,
        two.start,
        two.strategy,
        two.pressing_only,
    )


def test_everything_varies() -> None:
    draws = [draw_variation(8, 0, cohort) for cohort in range(60)]
    assert {draw.growth for draw in draws} == {0.5, 1.0, 1.5}
    assert {draw.start for draw in draws} == {None, "random_zero", "negative_gradient"}
    strategies = {"fixed_ramp", "performance_linked", "drift_controlled", "grad_norm_gated"}
    assert {draw.strategy for draw in draws} == {None, *strategies}
    assert 0.1 < np.mean([draw.pressing_only for draw in draws]) < 0.4
    assert 0.35 < np.mean([draw.keep.mean() for draw in draws]) < 0.65


def test_strongest_quarter_of_the_known_chunks(observe: Observe) -> None:
    observation = observe(
        chunk_site=np.array([2, 0, 1, 2, 0, 0, 2, 2, 0, 0]),
        chunk_index=np.array([7, 9, 0, 3, 1, 2, 4, 5, 6, 8]),
        chunk_pressure=np.array([9.0, 8, 7, np.nan, 6, 5, 4, 3, 2, 1]),
    )
    # Site 1 is not asked for and one chunk is unknown: 8 remain, the first 2 of them are taken.
    assert pressing_chunks(observation, np.array([0, 2])) == {2: (7,), 0: (9,)}
    assert pressing_chunks(observation, np.array([3])) == {}


def test_groups_are_sorted_plain_integers(observe: Observe) -> None:
    observation = observe(
        chunk_site=np.zeros(8, dtype=np.int64), chunk_index=np.arange(8)[::-1], chunk_pressure=np.ones(8)
    )
    assert pressing_chunks(observation, np.array([0])) == {0: (6, 7)}
    assert all(type(chunk) is int for chunk in pressing_chunks(observation, np.array([0]))[0])


def test_without_chunks(observe: Observe) -> None:
    assert pressing_chunks(observe(), np.arange(4)) == {}
