from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tamiyo.observations import random_observation

from esper.errors import ConfigError
from esper.kasmina.lifecycle import LEGAL
from esper.protocol import Cancel, CohortView, Cull, Germinate, Lifecycle, Observation, Pause, SeedPlan, Stop
from esper.tamiyo.actions import (
    ALL,
    BLUEPRINTS,
    DEFAULT,
    SIZES,
    STRATEGIES,
    UNUSED,
    WAIT,
    Action,
    Operation,
    Scope,
    commands,
    describe,
    draw,
    every_action,
    masks,
    nearest,
)
from esper.tamiyo.features import FeatureReader
from esper.tamiyo.sight import see

pytestmark = pytest.mark.unit

Observe = Callable[..., Observation]
View = Callable[[Lifecycle], CohortView]
NAN = float("nan")


def operations(observation: Observation, scope: Scope | None = None) -> set[str]:
    valid = masks(observation) if scope is None else masks(observation, scope)
    return {Operation(index).name for index in np.flatnonzero(valid.operation).tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def test_with_nothing_in_the_way(observe: Observe) -> None:
    valid = masks(observe())
    assert operations(observe()) == {"WAIT", "GERMINATE", "STOP"}
    assert valid.valid((Operation.GERMINATE,)).tolist() == [True] * 5
    assert valid.fits[:, :, DEFAULT].all() and not valid.fits[:, :, DEFAULT + 1 :].any()
    assert valid.valid((Operation.WAIT,)).size == valid.valid((Operation.STOP,)).size == 0
    assert not valid.forced and valid.num_sites == 4


def test_after_the_stop_there_is_nothing_to_choose(observe: Observe, view: View) -> None:
    valid = masks(observe(stopped="by hand", alive=(view(Lifecycle.GRAFTING),)))
    assert valid.forced and list(every_action(valid)) == [WAIT]


def test_a_ceiling_in_parameters(observe: Observe) -> None:
    """A unit costs 64 + 64 + 1 parameters, the host's width is 32."""
    valid = masks(observe(budget_params=20_000 + 16 * 129))
    assert valid.fits[1, :, DEFAULT].tolist() == [True, True, False, False]
    assert valid.fits[ALL, :, DEFAULT].tolist() == [False] * 4
    assert masks(observe(budget_params=20_000 + 32 * 129)).fits[ALL, :, DEFAULT].tolist() == [True, False, False, False]
    assert "GERMINATE" not in operations(observe(budget_params=20_000 + 7 * 129))


def test_a_ceiling_in_flops(observe: Observe) -> None:
    costs = np.array([1.0, 1e9, NAN, 1.0])
    valid = masks(observe(budget_flops=4e6 + 8, unit_flops=costs, unit_params=np.ones(4)))
    assert valid.valid((Operation.GERMINATE,)).tolist() == [False, True, False, False, True]


def test_an_unknown_size_leaves_no_room(observe: Observe) -> None:
    assert "GERMINATE" not in operations(observe(budget_flops=5e6, flops_per_step=NAN))


@pytest.mark.parametrize("ceiling", [None, 100_000])
def test_only_eligible_sites(observe: Observe, ceiling: int | None) -> None:
    valid = masks(observe(eligible=np.array([False, True, False, True]), budget_params=ceiling))
    assert valid.valid((Operation.GERMINATE,)).tolist() == [True, False, True, False, True]
    alone = masks(observe(eligible=np.array([False, True, False, False])))
    assert not alone.valid((Operation.GERMINATE,))[ALL], "one site alone is not a group"


def test_blueprints_that_can_sit_there(observe: Observe) -> None:
    costs = np.array([[1.0, NAN], [NAN, 1.0], [NAN, NAN], [NAN, NAN]])
    valid = masks(
        observe(alternatives=("affine", "of their own"), alternative_params=costs, alternative_flops=costs)
    )  # fmt: skip
    found = {(site, BLUEPRINTS[kind]) for site, _, kind in np.argwhere(valid.fits).tolist()}
    assert found == {*((site, "default") for site in range(5)), (1, "affine")}


@pytest.mark.parametrize("state", list(Lifecycle)[1:])
def test_cohorts_alive(observe: Observe, view: View, state: Lifecycle) -> None:
    seen = operations(observe(alive=(view(state),)))
    assert ("GERMINATE" in seen) == (state >= Lifecycle.FINE_TUNING)
    assert ("CULL" in seen) == (state <= Lifecycle.FINE_TUNING)
    both = operations(observe(alive=(view(state),)), Scope(most_on_trial=None))
    assert "GERMINATE" in both


def test_scope_narrows(observe: Observe) -> None:
    scope = Scope(
        operations=("wait", "germinate"), sizes=(0.5, 2.0), blueprints=("default",), strategies=("fixed_ramp",),
        together=False,
    )  # fmt: skip
    found = set(every_action(masks(observe(), scope)))
    assert found == {WAIT, *(Action(1, site, size, 0, 1) for site in range(1, 5) for size in (1, 3))}


@pytest.mark.parametrize(
    "changes", [{"operations": ("germinate",)}, {"sizes": (3.0,)}, {"blueprints": ()}, {"strategies": ("hop",)}]
)
def test_scope_refuses_what_is_unknown(changes: dict[str, tuple[object, ...]]) -> None:
    with pytest.raises(ConfigError, match="scope"):
        Scope(**changes)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def test_what_still_captures_is_withdrawn(observe: Observe, view: View) -> None:
    """A grower refuses to cull it."""
    for state in Lifecycle:
        if not Lifecycle.GERMINATED <= state <= Lifecycle.FINE_TUNING:
            continue
        observation = observe(alive=(view(state),))
        (command,) = commands(Action(Operation.CULL, 1), observation)
        target = Lifecycle.CANCELLED if isinstance(command, Cancel) else Lifecycle.CULLED
        assert isinstance(command, Cancel) == (state is Lifecycle.GERMINATED) and LEGAL[state, target]
        assert (command.cohort, command.reason) == (0, "learned: cull")
        assert nearest((command,), observation, masks(observation)) == Action(Operation.CULL, 1)


def test_commands(observe: Observe, view: View) -> None:
    observation = observe(alive=(view(Lifecycle.GRAFTING),))
    assert commands(WAIT, observation) == ()
    assert commands(Action(Operation.STOP), observation) == (Stop(reason="learned: stop"),)
    assert commands(Action(Operation.CULL, 1), observation) == (Cull(cohort=0, reason="learned: cull"),)
    (one,) = commands(Action(Operation.GERMINATE, 2, SIZES.index(0.5), 0, 1), observation, reason="neural")
    assert one == Germinate(
        seeds=(SeedPlan(site="blocks.1", width=16, strategy="fixed_ramp"),),
        reason="neural: grow blocks.1 by 0.5 of its width",
    )
    (many,) = commands(Action(Operation.GERMINATE, ALL, 3, 0, 0), observe(layers=2))
    assert isinstance(many, Germinate)
    assert [(plan.site, plan.width) for plan in many.seeds] == [(f"blocks.{row}", 64) for row in range(4)]
    (layers,) = commands(Action(Operation.GERMINATE, ALL, 2, 2, 0), observe(spans=0, layers=2))
    assert isinstance(layers, Germinate) and [plan.blueprint for plan in layers.seeds] == ["attention"] * 2
    assert describe(Action(Operation.CULL, 1), observation) == "cull at blocks.0"


@pytest.mark.parametrize("action", [Action(Operation.CULL, 2), Action(Operation.CULL, ALL), Action(1, 9, 0, 0, 0)])
def test_an_action_from_elsewhere_is_refused(observe: Observe, view: View, action: Action) -> None:
    with pytest.raises(ConfigError, match="masks"):
        commands(action, observe(alive=(view(Lifecycle.GRAFTING),)))


# ----------------------------------------------------------------------------------------------------------------------
# What cloning learns from


def test_nearest(observe: Observe, view: View) -> None:
    observation = observe()
    valid = masks(observation)

    def near(*wanted: object) -> Action:
        return nearest(wanted, observation, valid)  # type: ignore[arg-type]

    def grow(*sites: int, width: int = 32, **plan: object) -> Germinate:
        seeds = tuple(SeedPlan(site=f"blocks.{site}", width=width, **plan) for site in sites)  # type: ignore[arg-type]
        return Germinate(seeds=seeds)

    assert near() == near(Pause(cohort=0)) == near(grow()) == near(grow(7)) == WAIT
    assert near(Stop(reason="")) == Action(Operation.STOP)
    assert near(grow(0, 1, 2, 3)) == Action(1, ALL, SIZES.index(1.0), 0, 0)
    assert near(grow(2, width=31)) == Action(1, 3, SIZES.index(0.5), 0, 0)
    assert near(grow(2, width=1, strategy="drift_controlled")) == Action(1, 3, 0, 0, 3)
    assert near(grow(2, blueprint="gated")) == Action(1, 3, 2, 0, 0), "it cannot sit there"
    assert near(grow(2, width=8, seeds=4)) == Action(1, 3, 2, 0, 0)
    assert near(Cull(cohort=0, reason="")) == WAIT
    alive = observe(alive=(view(Lifecycle.GRAFTING),))
    assert nearest((Cull(cohort=0, reason=""),), alive, masks(alive)) == Action(Operation.CULL, 1)
    assert nearest((grow(1),), alive, masks(alive)) == WAIT
    narrow = masks(observation, Scope(together=False, strategies=("fixed_ramp",)))
    assert nearest((grow(0, 1),), observation, narrow) == WAIT
    assert nearest((grow(1),), observation, narrow) == Action(1, 2, 2, 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Properties


@settings(max_examples=100)
@given(observation=random_observation(), seed=st.integers(0, 100))
def test_what_is_drawn_is_valid_and_within_the_ceilings(observation: Observation, seed: int) -> None:
    valid = masks(observation)
    action = draw(valid, np.random.default_rng(seed))
    assert valid.allow(action) and all(value >= UNUSED for value in action)
    for command in commands(action, observation):
        if isinstance(command, Germinate):
            rows = [observation.site_names.index(plan.site) for plan in command.seeds]
            assert observation.eligible[rows].all() and observation.stopped is None
            if observation.budget_params is not None and observation.unit_params is not None and not action.blueprint:
                unit = observation.unit_params[rows]
                cost = sum((plan.width or 0) * each for plan, each in zip(command.seeds, unit, strict=True))
                assert np.isnan(cost) or observation.params + cost <= observation.budget_params
        if isinstance(command, Cull | Cancel):
            (view,) = [view for view in observation.alive if view.cohort == command.cohort]
            assert LEGAL[view.state, Lifecycle.CULLED if isinstance(command, Cull) else Lifecycle.CANCELLED]


@settings(max_examples=50)
@given(observation=random_observation(most=3))
def test_every_action_is_allowed_and_nothing_else_is(observation: Observation) -> None:
    valid = masks(observation)
    actions = list(every_action(valid))
    assert len(set(actions)) == len(actions) and WAIT in actions
    assert all(valid.allow(action) for action in actions)
    num = valid.num_sites + 2
    sizes, kinds, ramps = range(-1, len(SIZES)), (-1, 0, 1, 7), range(-1, len(STRATEGIES))
    some = {
        Action(o, s, z, b, k) for o in range(4) for s in range(-1, num) for z in sizes for b in kinds for k in ramps
    }
    allowed = {action for action in some if valid.allow(action)}
    assert allowed == {action for action in actions if action.blueprint in kinds}


@settings(max_examples=50)
@given(observation=random_observation(), seed=st.integers(0, 100))
def test_nearest_of_an_action_is_the_action(observation: Observation, seed: int) -> None:
    """Unless sizes coincide on a narrow site, where the smaller number of the same width comes back."""
    valid = masks(observation)
    action = draw(valid, np.random.default_rng(seed))
    wanted = commands(action, observation)
    back = nearest(wanted, observation, valid)
    assert valid.allow(back)
    if action.operation != Operation.CULL:
        same = dataclasses.replace(observation)
        assert {type(c) for c in commands(back, same)} == {type(c) for c in wanted}
        widths = [[p.width for p in c.seeds] for c in wanted if isinstance(c, Germinate)]
        assert widths == [[p.width for p in c.seeds] for c in commands(back, same) if isinstance(c, Germinate)]


def test_one_look_holds_both(observe: Observe) -> None:
    sight = see(FeatureReader(), observe())
    assert sight.features.sites.shape[0] == sight.masks.num_sites == 4
