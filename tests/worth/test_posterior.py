"""Known answers of the normal-inverse-gamma posterior, and what Thompson sampling makes of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ConfigError, StateError
from esper.worth import LinearPosterior

pytestmark = pytest.mark.unit


def test_one_weight_by_hand() -> None:
    """Prior precision 1, rows x = 1 with y = 1 and 3: precision 3, mean 4/3, rate 1 + (10 - 16/3) / 2."""
    known = LinearPosterior([1.0], shape=2.0, rate=1.0)
    known.update([[1.0], [1.0]], [[1.0], [3.0]])
    assert known.mean[0, 0] == pytest.approx(4 / 3)
    assert known.shape == 3.0 and known.rate[0] == pytest.approx(1 + (10 - 16 / 3) / 2)
    mean, deviation = known.predict([[2.0]])
    assert mean[0, 0] == pytest.approx(8 / 3)
    assert deviation[0, 0] == pytest.approx(np.sqrt(4 / 3 * (10 / 3) / 2))  # x V x * rate / (shape - 1)


def test_the_mean_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, y, precision = rng.normal(size=(30, 4)), rng.normal(size=(30, 2)), np.array([1.0, 2.0, 0.5, 4.0])
    known = LinearPosterior(precision, num_targets=2)
    known.update(x, y)
    extended = np.vstack([x, np.diag(np.sqrt(precision))])
    wanted = np.linalg.lstsq(extended, np.vstack([y, np.zeros((4, 2))]), rcond=None)[0]
    np.testing.assert_allclose(known.mean, wanted, rtol=1e-9)
    rest = ((np.vstack([y, np.zeros((4, 2))]) - extended @ wanted) ** 2).sum(axis=0)
    np.testing.assert_allclose(known.rate, 1.0 + rest / 2, rtol=1e-9)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order_and_portions(portions: list[int], random: Any) -> None:
    rng = np.random.default_rng(sum(portions))
    x, y = rng.normal(size=(sum(portions), 3)), rng.normal(size=(sum(portions), 2))
    at_once, apart = LinearPosterior(np.ones(3), num_targets=2), LinearPosterior(np.ones(3), num_targets=2)
    at_once.update(x, y)
    order = list(range(len(x)))
    random.shuffle(order)
    start = 0
    for portion in portions:
        part = order[start : start + portion]
        apart.update(x[part], y[part])
        start += portion
    np.testing.assert_allclose(apart.mean, at_once.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(apart.rate, at_once.rate, rtol=1e-9)
    assert apart.num_rows == at_once.num_rows


def test_draws_have_the_posteriors_moments() -> None:
    """The marginal is Student's t: its covariance is V * rate / (shape - 1)."""
    rng = np.random.default_rng(1)
    known = LinearPosterior([1.0, 1.0], shape=10.0, rate=9.0)
    known.update([[1.0, 0.5], [0.2, 2.0]], [[1.0], [-1.0]])
    draws = np.array([known.sample(rng)[:, 0] for _ in range(20_000)])
    np.testing.assert_allclose(draws.mean(axis=0), known.mean[:, 0], atol=0.02)
    x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose((draws @ x.T).std(axis=0), known.predict(x)[1][:, 0], rtol=0.03)


def test_what_is_known_well_has_a_small_deviation() -> None:
    known = LinearPosterior(np.ones(2))
    known.update([[1.0, 0.0]] * 200, [[0.5]] * 200)
    deviation = known.predict(np.eye(2))[1][:, 0]
    assert deviation[0] < 0.1 * deviation[1]
    assert np.isinf(LinearPosterior([1.0], shape=1.0).predict([[1.0]])[1]).all()


def test_thompson_sampling_comes_to_choose_what_each_context_needs() -> None:
    """Two choices, one better in either context: nine in ten are right after a hundred rounds, by chance one in two."""
    rng = np.random.default_rng(3)
    known = LinearPosterior(np.ones(4), rate=0.1)
    right: list[bool] = []
    for turn in range(300):
        context = turn % 2
        rows = np.zeros((2, 4))
        rows[[0, 1], [2 * context, 2 * context + 1]] = 1.0
        choice = int(np.argmax(rows @ known.sample(rng)[:, 0]))
        right.append(choice == context)
        known.update(rows[[choice]], [[float(choice == context) + 0.3 * rng.normal()]])
    assert np.mean(right[100:]) > 0.9


def test_the_same_generator_gives_the_same_draw() -> None:
    known = LinearPosterior(np.ones(3), num_targets=2)
    one, two = (known.sample(np.random.default_rng([4, 1])) for _ in range(2))
    assert np.array_equal(one, two) and not np.array_equal(one, known.sample(np.random.default_rng([4, 2])))


def test_a_state_survives_json() -> None:
    known, other = LinearPosterior(np.ones(3)), LinearPosterior(np.ones(3))
    known.update(np.arange(6.0).reshape(2, 3), [[1.0], [2.0]])
    other.load(json.loads(json.dumps(known.state())))
    assert np.array_equal(other.mean, known.mean) and other.shape == known.shape


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("moment"),
        lambda s: s.update(precision=[[1.0]]),
        lambda s: s.update(squares=[float("nan")]),
        lambda s: s.update(prior=[1.0]),
        lambda s: s.update(num_rows="many"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(damage: Any) -> None:
    known = LinearPosterior(np.ones(3))
    known.update(np.eye(3), np.ones((3, 1)))
    state, before = known.state(), known.mean
    damage(state)
    with pytest.raises(StateError, match="a posterior's state must"):
        known.load(state)
    assert np.array_equal(known.mean, before)


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        ([[1.0, 2.0]], [[1.0]], r"rows must be \(N, 3\)"),
        ([[1.0, 2.0, 3.0]], [[1.0, 2.0]], "with values"),
        ([[1.0, np.nan, 3.0]], [[1.0]], "finite"),
        ([[1.0, 0.0, 3.0]], [[np.inf]], "finite"),
    ],
)
def test_rows_that_do_not_fit(x: Any, y: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LinearPosterior(np.ones(3)).update(x, y)


@pytest.mark.parametrize("precision", [[], [0.0], [-1.0], [np.nan], [[1.0]]])
def test_priors_that_are_none(precision: Any) -> None:
    with pytest.raises(ConfigError, match="prior precision"):
        LinearPosterior(precision)


@pytest.mark.parametrize("settings", [{"num_targets": 0}, {"shape": 0.0}, {"rate": -1.0}])
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        LinearPosterior([1.0], **settings)
