"""What the others are measured against: never, a fixed schedule, and actions drawn evenly."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import Pair
from tests.rigs import attach
from tests.tamiyo.observations import random_observation

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.protocol import Germinate, Germinated, Observation, Stop, Stopped
from esper.tamiyo import EvenController, NeverController, RandomController, make_controller
from esper.tamiyo.actions import commands as commands_of
from esper.tamiyo.actions import every_action, masks

pytestmark = pytest.mark.unit

Observe = Callable[..., Observation]
NAMES = {"never": NeverController, "schedule": EvenController, "random": RandomController}


def grown(subject: EvenController, observation: Observation) -> list[tuple[str, int | None]]:
    """What it germinates there."""
    return [
        (plan.site, plan.width)
        for command in subject.decide(observation)
        if isinstance(command, Germinate)
        for plan in command.seeds
    ]


def test_never_stops_at_once_and_says_nothing_more(observe: Observe) -> None:
    subject = NeverController(TamiyoConfig())
    assert subject.decide(observe(step=10)) == (Stop(reason="the controller 'never' grows nothing"),)
    assert subject.decide(observe(step=20, stopped="x")) == ()


def test_even_growth_once(observe: Observe) -> None:
    subject = EvenController(TamiyoConfig(growth=0.5))
    assert subject.waits(190, total_steps=1000, num_ended=0) and not subject.waits(200, total_steps=1000, num_ended=0)
    assert subject.decide(observe(step=190)) == ()
    assert grown(subject, observe(step=200)) == [(f"blocks.{row}", 16) for row in range(4)]
    assert subject.decide(observe(step=210)) == (Stop(reason="schedule finished: 1 cohort germinated"),)
    assert not subject.waits(210, total_steps=1000, num_ended=0)
    assert subject.decide(observe(step=220, stopped="x")) == ()


def test_even_growth_again_and_again_until_it_is_late(observe: Observe) -> None:
    subject = EvenController(TamiyoConfig(first=50, spacing=200))
    steps = [step for step in range(0, 1000, 10) if grown(subject, observe(step=step))]
    assert steps == [50, 250, 450]
    assert subject.decide(observe(step=610)) == (Stop(reason="schedule finished: 3 cohorts germinated"),)
    unknown = EvenController(TamiyoConfig())
    assert unknown.decide(observe(step=90, total_steps=None)) == () != unknown.decide(observe(total_steps=None))


def test_even_growth_waits_for_sites_and_keeps_under_ceilings(observe: Observe) -> None:
    subject = EvenController(TamiyoConfig(first=0))
    assert subject.decide(observe(eligible=np.zeros(4, dtype=np.bool_))) == ()
    assert subject.decide(observe(eligible=np.zeros(4, dtype=np.bool_), budget_params=20_001)) == ()
    assert subject.decide(observe(budget_params=20_000)) == ()
    unit = 2 * 64 + 1
    found = grown(subject, observe(budget_params=20_000 + 4 * 10 * unit))
    assert found == [(f"blocks.{row}", 10) for row in range(4)]


@settings(max_examples=50)
@given(observation=random_observation(), seed=st.integers(0, 100))
def test_random_draws_valid_actions_alone(observation: Observation, seed: int) -> None:
    found = RandomController(TamiyoConfig(), seed=seed).decide(observation)
    valid = [commands_of(action, observation, reason="random") for action in every_action(masks(observation))]
    assert found in valid


def test_random_follows_its_seed_and_begins_at_first(observe: Observe) -> None:
    def play(seed: int, first: int | None = None) -> list[object]:
        subject = RandomController(TamiyoConfig(first=first), seed=seed)
        return [subject.decide(observe(step=step)) for step in range(0, 300, 10)]

    assert play(1) == play(1) != play(2)
    assert not any(play(1, first=200)[:20]) and any(play(1, first=200)[20:])
    assert {type(found[0]) for found in play(1) if isinstance(found, tuple) and found} == {Germinate, Stop}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_goes_on_and_another_is_refused(name: str, observe: Observe) -> None:
    config = TamiyoConfig(first=0, spacing=20)
    subject, again = (make_controller(name, config, seed=3) for _ in range(2))
    assert isinstance(subject, NAMES[name])
    for step in range(0, 200, 10):
        subject.decide(observe(step=step))
    again.load(json.loads(json.dumps(subject.state())))
    for step in range(200, 400, 10):
        assert again.decide(observe(step=step)) == subject.decide(observe(step=step))
    with pytest.raises(ConfigError, match=f"a state of the controller '{name}' has the keys"):
        again.load({"other": 1})


@pytest.mark.parametrize(("name", "num"), [("never", 0), ("schedule", 1), ("random", 1)])
def test_under_a_grower(name: str, num: int) -> None:
    config = TamiyoConfig(controller=name, first=0, growth=1.0)
    rig = attach(Pair(), total_steps=200, controller=make_controller(name, config, seed=4))
    rig.train(60)
    assert not rig.refused()
    assert len([event for event in rig.events if isinstance(event, Germinated)]) >= num
    assert name == "random" or any(isinstance(event, Stopped) for event in rig.events)
