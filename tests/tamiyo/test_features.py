from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tamiyo.observations import SITES, random_observation

from esper.errors import ConfigError
from esper.protocol import SITE_FEATURES as SENSED
from esper.protocol import CohortView, Lifecycle, Observation, Verdict
from esper.tamiyo.features import (
    GLOBAL_COLUMNS,
    GLOBAL_FEATURES,
    LIMIT,
    SITE_COLUMNS,
    SITE_FEATURES,
    FeatureReader,
    Features,
)

pytestmark = pytest.mark.unit

Observe = Callable[..., Observation]
NAN = float("nan")


def world(features: Features, name: str) -> float:
    return float(features.world[GLOBAL_COLUMNS.index(name)])


def site(features: Features, name: str, row: int = 0) -> float:
    return float(features.sites[row, SITE_COLUMNS.index(name)])


def read(*observations: Observation) -> Features:
    reader = FeatureReader()
    return [reader.read(observation) for observation in observations][-1]


# ----------------------------------------------------------------------------------------------------------------------
# Known answers


def test_columns_are_names_and_their_flags() -> None:
    assert len(set(GLOBAL_COLUMNS)) == len(GLOBAL_COLUMNS) == 2 * len(GLOBAL_FEATURES)
    assert SITE_COLUMNS[len(SITE_FEATURES)] == "is_span.missing"


def test_the_run_as_a_whole(observe: Observe, verdict: Callable[..., Verdict]) -> None:
    seen = read(
        observe(
            params=30_000, budget_params=40_000, flops_per_step=8e6, budget_flops=12e6, train_loss=0.5, lr_share=0.25,
            loss_noise=0.1, price=0.02, verdicts=(verdict(), verdict(Lifecycle.CULLED), verdict(Lifecycle.CANCELLED)),
        )
    )  # fmt: skip
    assert world(seen, "progress") == pytest.approx(0.1)
    assert world(seen, "params_used") == world(seen, "flops_used") == 0.5
    assert world(seen, "params_grown") == pytest.approx(math.log(1.5))
    assert world(seen, "flops_grown") == pytest.approx(math.log(2))
    assert world(seen, "loss_drop") == pytest.approx(-math.log(2))
    assert world(seen, "gap") == pytest.approx(math.log(2))
    assert (world(seen, "lr_share"), world(seen, "loss_noise")) == (0.25, pytest.approx(0.1))
    assert world(seen, "price") == pytest.approx(math.log(0.02))
    assert world(seen, "kept") == world(seen, "failed") == world(seen, "failed_in_row") == pytest.approx(math.log(2))
    assert world(seen, "since_verdict") == pytest.approx(0.1)
    assert world(seen, "slope_short.missing") == 1


def test_failures_in_a_row_end_with_a_cohort_that_was_kept(observe: Observe, verdict: Callable[..., Verdict]) -> None:
    row = (verdict(Lifecycle.CULLED), verdict(Lifecycle.ROLLED_BACK), verdict())
    assert world(read(observe(verdicts=row)), "failed_in_row") == 0


def test_slopes_are_those_of_a_power_law(observe: Observe) -> None:
    """log(loss) = -0.5 * step / now: the slope in units of the time so far is -0.5 at any step size."""
    for stride in (1, 10, 1000):
        steps = [stride * number for number in range(1, 21)]
        now = steps[-1]
        looks = [observe(step=step, train_loss=math.exp(-0.5 * step / now)) for step in steps]
        seen = read(*looks)
        assert world(seen, "slope_short") == pytest.approx(-0.5, abs=1e-6)
        assert world(seen, "slope_long") == pytest.approx(-0.5, abs=1e-6)


def test_slopes_fall_back_on_the_held_out_loss_and_skip_a_repeated_step(observe: Observe) -> None:
    looks = [observe(step=step, held_out=math.exp(step / 100)) for step in (0, 50, 50, 100)]
    assert world(read(*looks), "slope_short") == pytest.approx(1.0, abs=1e-6)


def test_a_site(observe: Observe, verdict: Callable[..., Verdict]) -> None:
    view = CohortView(
        cohort=0, state=Lifecycle.EVALUATING, steps_in_state=20, sites=("blocks.1",), num_seeds=1, alpha=0.75,
        added_params=10,
    )  # fmt: skip
    sites = observe().sites.copy()
    column = {name: index for index, name in enumerate(SENSED)}
    sites[:, column["gradient_energy"]] = [1.0, 3.0, 3.0, 5.0]
    sites[0, column["steps_since_growth"]] = 25
    seen = read(
        observe(
            sites=sites, grown=np.array([32, 0, 0, 0]), alive=(view,), verdicts=(verdict(gain=0.2),),
            fit_explained=np.array([NAN, 0.3, NAN, NAN]), fit_error=np.array([NAN, 0.1, NAN, NAN]),
        )
    )  # fmt: skip
    assert site(seen, "log_in") == pytest.approx(0.6) and site(seen, "log_width") == pytest.approx(0.6)
    assert site(seen, "fill") == pytest.approx(math.log(2)) and site(seen, "fill", 1) == 0
    assert site(seen, "energy", 1) == pytest.approx(0) and site(seen, "energy") == pytest.approx(-math.log(3))
    assert site(seen, "last_gain") == pytest.approx(0.2) and site(seen, "last_kept") == 1
    assert site(seen, "last_error") == pytest.approx(0.15)
    assert site(seen, "last_gain.missing", 1) == 1
    assert site(seen, "age") == 0.25 and site(seen, "age.missing", 1) == 1
    assert [site(seen, name, 1) for name in ("fit_gain", "fit_error")] == [pytest.approx(0.3), pytest.approx(0.1)]
    assert [site(seen, name, 1) for name in ("live", "stage", "alpha", "wait")] == pytest.approx([1, 0.8, 0.75, 0.2])
    assert site(seen, "cost_params") == pytest.approx(math.log(32 * 129 / 20_000))
    assert site(seen, "cost_flops") == pytest.approx(math.log(32 * 129 / 20_000))
    assert site(seen, "live", 0) == 0 and site(seen, "stage.missing", 0) == 1


def test_the_last_fit_of_a_site_is_remembered(observe: Observe) -> None:
    fitted = observe(fit_explained=np.array([NAN, 0.3, NAN, NAN]), fit_error=np.array([NAN, 0.1, NAN, NAN]))
    seen = read(fitted, observe(step=110))
    assert site(seen, "fit_gain", 1) == pytest.approx(0.3) and site(seen, "fit_gain.missing", 0) == 1


def test_a_cohort_that_fades_is_not_alive(observe: Observe, view: Callable[[Lifecycle], CohortView]) -> None:
    assert site(read(observe(alive=(view(Lifecycle.CULLED),))), "live") == 0


def test_silent_sensors_and_losses_that_are_none(observe: Observe) -> None:
    seen = read(observe(held_out=-1.0, total_steps=None))
    for name in ("progress", "params_used", "flops_used", "loss_drop", "gap", "lr_share", "price"):
        assert (world(seen, name), world(seen, f"{name}.missing")) == (0, 1)
    assert site(seen, "energy.missing") == 1
    dead = observe().sites.copy()
    dead[:, SENSED.index("gradient_energy")] = 0.0
    assert site(read(observe(sites=dead)), "energy") == 0


# ----------------------------------------------------------------------------------------------------------------------
# Properties


@settings(max_examples=100)
@given(observation=random_observation())
def test_always_finite_and_bounded(observation: Observation) -> None:
    seen = read(observation, observation)
    assert seen.world.shape == (len(GLOBAL_COLUMNS),)
    assert seen.sites.shape == (len(observation.site_names), len(SITE_COLUMNS))
    assert seen.world.dtype == seen.sites.dtype == np.float32
    for values in (seen.world, seen.sites):
        assert np.isfinite(values).all() and (abs(values) <= LIMIT).all()


def scaled(observation: Observation, by: float) -> Observation:
    """The same run under a loss that is ``by`` times as large."""
    sites = observation.sites.copy()
    sites[:, SENSED.index("gradient_energy")] *= by**2
    sites[:, SENSED.index("last_gain")] *= by
    verdicts = tuple(
        Verdict(
            cohort=old.cohort, step=old.step, state=old.state, sites=old.sites, gain=by * old.gain,
            gain_low=by * old.gain_low, gain_high=by * old.gain_high, added_params=old.added_params,
            added_flops_share=old.added_flops_share, reason=old.reason, gain_shrunken=by * old.gain_shrunken,
        )
        for old in observation.verdicts
    )  # fmt: skip
    return dataclasses.replace(
        observation, held_out=by * observation.held_out, held_out_initial=by * observation.held_out_initial,
        train_loss=by * observation.train_loss, sites=sites, verdicts=verdicts,
    )  # fmt: skip


@settings(max_examples=50)
@given(observation=random_observation(), by=st.sampled_from([2.0, 0.125, 1000.0]))
def test_the_unit_of_the_loss_does_not_matter(observation: Observation, by: float) -> None:
    one, other = read(observation), read(scaled(observation, by))
    np.testing.assert_allclose(one.world, other.world, atol=1e-5)
    np.testing.assert_allclose(one.sites, other.sites, atol=1e-4)


PER_SITE = ("sites", "hidden", "grown", "eligible", "unit_params", "unit_flops", "fit_explained", "fit_error")


def reordered(observation: Observation, order: list[int]) -> Observation:
    changes: dict[str, Any] = {"site_names": tuple(observation.site_names[row] for row in order)}
    for name in PER_SITE:
        values = getattr(observation, name)
        changes[name] = None if values is None else values[order]
    return dataclasses.replace(observation, **changes)


@settings(max_examples=50)
@given(observation=random_observation(), order=st.permutations(range(SITES)))
def test_rows_follow_their_sites(observation: Observation, order: list[int]) -> None:
    order = [row for row in order if row < len(observation.site_names)]
    one, other = read(observation), read(reordered(observation, order))
    np.testing.assert_allclose(one.world, other.world, atol=1e-5)
    np.testing.assert_allclose(one.sites[order], other.sites, atol=1e-5)


@settings(max_examples=25)
@given(observations=st.lists(random_observation(), min_size=2, max_size=4))
def test_state_goes_through_json(observations: list[Observation]) -> None:
    reader, other = FeatureReader(), FeatureReader()
    for observation in observations[:-1]:
        reader.read(observation)
    other.load(json.loads(json.dumps(reader.state())))
    one, two = reader.read(observations[-1]), other.read(observations[-1])
    assert np.array_equal(one.world, two.world) and np.array_equal(one.sites, two.sites)
    assert json.dumps(reader.state()) == json.dumps(other.state())


@pytest.mark.parametrize("state", [{}, {"losses": [1], "fits": {}}, {"losses": [], "fits": []}])
def test_a_state_of_something_else_is_refused(state: dict[str, Any], observe: Observe) -> None:
    reader = FeatureReader()
    reader.read(observe(train_loss=1.0))
    before = reader.state()
    with pytest.raises(ConfigError, match="must hold 'losses' and 'fits'"):
        reader.load(state)
    assert reader.state() == before
