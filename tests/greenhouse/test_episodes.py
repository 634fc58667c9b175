"""Episodes end at the planned step with one reward; branches share all but their action."""

from __future__ import annotations

import importlib
import sys
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from esper.errors import ConfigError
from esper.greenhouse.environment import ID, Growth, gymnasium, read_action
from esper.greenhouse.episodes import Episodes
from esper.greenhouse.family import HostSpec
from esper.tamiyo.actions import UNUSED, WAIT, Action, Operation, draw, every_action

pytestmark = pytest.mark.component

GROW = Action(Operation.GERMINATE, 0, 2, 0, 0)


def episodes(*tasks: int, family: str = "teacher", steps: int | None = None) -> Episodes:
    return Episodes([HostSpec(family=family, task=task, seed=1, lr=2e-2, steps=steps) for task in tasks])


def test_an_episode_from_its_first_decision_to_its_reward() -> None:
    running = episodes(0, 1, steps=100)
    rng = np.random.default_rng(0)
    rewards = [running.step([draw(sight.masks, rng) for sight in running.sights]) for _ in range(running.num_decisions)]
    assert running.done and running.num_decisions == 4 and all(not r.any() for r in rewards[:-1])
    for reward, end in zip(rewards[-1], running.outcomes, strict=True):
        assert reward == end.reward == pytest.approx((end.frontier_loss - end.loss) / end.deviation)
        assert end.flops == pytest.approx(sum(end.parts.values())) and end.params > 0
    with pytest.raises(ConfigError, match="have ended"):
        running.step([WAIT, WAIT])


def test_an_action_outside_the_masks_is_refused() -> None:
    running = episodes(0, steps=100)
    with pytest.raises(ConfigError, match="within its host's masks"):
        running.step([Action(Operation.CULL, 1)])
    running.step([GROW])
    with pytest.raises(ConfigError, match="within its host's masks"):
        running.step([GROW])


def test_branches_under_common_random_numbers() -> None:
    running = episodes(0, 1, steps=100)
    running.step([WAIT, WAIT])
    actions = list(every_action(running.sights[1].masks))
    assert len(actions) >= 8
    branches = running.branch(1, [*actions[:8], WAIT])
    while not branches.done:
        branches.step([WAIT] * 9)
    rewards = [end.reward for end in branches.outcomes]
    assert actions[0] == WAIT and rewards[0] == rewards[-1]  # A/A: equal to the last bit
    assert len(set(rewards)) > 4
    while not running.done:
        running.step([WAIT, WAIT])
    assert running.outcomes[1].reward == pytest.approx(rewards[0], rel=1e-3)
    again = running.select([1])
    assert again.done and again.outcomes == running.outcomes[1:]


def test_drift_earns_no_credit() -> None:
    """Branches of one action on fresh seeds: the interval of their difference contains zero."""
    specs = [HostSpec(family="teacher", task=0, seed=seed, lr=2e-2, steps=100) for seed in range(16)]
    running = Episodes(specs)
    while not running.done:
        running.step([GROW if s.masks.allow(GROW) and running.hosts.step_count == 20 else WAIT for s in running.sights])
    rewards = np.array([end.reward for end in running.outcomes])
    gaps = rewards[:8] - rewards[8:]
    assert abs(gaps.mean()) < 2.4 * gaps.std(ddof=1) / np.sqrt(8)


@pytest.mark.parametrize("family", ["spirals", "textures", "grammar"])
def test_gymnasium_finds_nothing_to_say(family: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ID, family=family).unwrapped)


def test_the_environment_is_an_episode() -> None:
    environment = Growth(tasks=[0], learning_rates=[1e-2])
    with pytest.raises(ConfigError, match="must be reset"):
        environment.step(np.zeros(5, dtype=np.int64))
    look, info = environment.reset(seed=5, options={"seed": 3})
    assert info["task"] == 0 and info["lr"] == 1e-2 and environment.observation_space.contains(look)
    assert info["masks"]["operation"].tolist() == [True, True, False, True]
    _, reward, ended, truncated, info = environment.step(np.array([Operation.CULL, 1, 0, 0, 0]))
    assert info["invalid"] and reward == 0.0 and not ended and not truncated
    _, _, _, _, info = environment.step(np.array([Operation.GERMINATE, 1, 2, 0, 0]))
    assert not info["invalid"] and not info["masks"]["operation"][Operation.GERMINATE]
    num = 2
    while not ended:
        look, reward, ended, truncated, info = environment.step(np.array([Operation.STOP, 0, 0, 0, 0]))
        num += 1
        assert not truncated and environment.observation_space.contains(look)
    assert num == 19 and reward == pytest.approx(
        (info["frontier_loss"] - info["loss"]) / environment.episodes.outcomes[0].deviation
    )


def test_wrong_settings_of_the_environment() -> None:
    with pytest.raises(ConfigError, match="whose frontier was measured"):
        Growth(tasks=[999])
    with pytest.raises(ConfigError, match="options may name task, seed and lr"):
        Growth().reset(options={"colour": 1})


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "esper.greenhouse.environment")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'esper-morph\[rl\]'"):
        importlib.import_module("esper.greenhouse.environment")


def test_factors_that_are_not_asked_for_are_dropped() -> None:
    assert read_action(np.array([0, 2, 3, 1, 1])) == WAIT
    assert read_action(np.array([2, 2, 3, 1, 1])) == Action(Operation.CULL, 2)
    assert read_action(np.array([1, 2, 3, 0, 0])) == Action(Operation.GERMINATE, 2, 3, 0, 0)
    assert Action(Operation.STOP)[1:] == (UNUSED,) * 4
