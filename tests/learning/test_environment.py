"""The planted environment: what it pays is what it says, it is a function of seed and actions, its names are found."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esper.errors import ConfigError, UnknownNameError
from esper.learning import environment as environments
from esper.learning.contest import named, never, play, uniform
from esper.learning.environment import known_environments, make_environment, register_environment
from esper.learning.planted import BEST, HORIZON, Planted
from esper.safety.tree import digest
from esper.tamiyo.actions import ALL, SIZES, WAIT, Action, Operation

pytestmark = pytest.mark.component


def rows(*actions: Action) -> np.ndarray:
    return np.array(actions, dtype=np.int64)


def oracle(environment: Planted) -> np.ndarray:
    found = [
        Action(1, episode.right + 1, SIZES.index(1.0), 0, 1) if episode.turn == 0 else WAIT
        for episode in environment._episodes
    ]
    return rows(*found)


def total(environment: Planted, act: object, num: int = HORIZON) -> np.ndarray:
    earned = np.zeros(environment.num)
    for _ in range(num):
        earned += environment.step(act(environment)).rewards  # type: ignore[operator]
    return earned


def test_the_best_there_is() -> None:
    environment = Planted(8)
    environment.reset(1)
    assert total(environment, oracle) == pytest.approx(BEST)
    assert environment.best == BEST


def test_what_does_not_pay() -> None:
    """Growing everything, growing by too much, growing late, growing at random, doing nothing."""

    def all_at_once(environment: Planted) -> np.ndarray:
        return rows(*(Action(1, ALL, 2, 0, 1) if e.turn == 0 else WAIT for e in environment._episodes))

    def twice_as_much(environment: Planted) -> np.ndarray:
        found = oracle(environment)
        found[found[:, 0] == 1, 2] = SIZES.index(2.0)
        return found

    def late(environment: Planted) -> np.ndarray:
        return rows(*(Action(1, e.right + 1, 2, 0, 1) if e.turn == 5 else WAIT for e in environment._episodes))

    for act, most in ((all_at_once, BEST - 0.1), (twice_as_much, BEST - 0.1), (late, BEST - 0.4)):
        environment = Planted(8)
        environment.reset(1)
        assert (total(environment, act) <= most + 1e-9).all()
    assert play(Planted(8), never(), 16, seed=0) == [0.0] * 16
    assert np.mean(play(Planted(8), uniform(), 64, seed=0)) < 0.3
    assert np.mean(play(Planted(8), named("heuristic"), 64, seed=0)) < BEST - 0.1


def test_after_a_stop_only_waiting_is_left() -> None:
    environment = Planted(2)
    environment.reset(0)
    environment.step(rows(Action(Operation.STOP), WAIT))
    assert [sight.masks.forced for sight in environment.look()] == [True, False]
    assert environment.observations()[0].stopped is not None


def test_the_seed_and_the_actions_say_everything_and_a_state_goes_on() -> None:
    one, other = Planted(4), Planted(4)
    for environment in (one, other):
        environment.reset(5)
    rng = np.random.default_rng(0)
    for turn in range(2 * HORIZON + 1):
        actions = rows(*(Action(1, int(rng.integers(1, 3)), 0, 0, 1) for _ in range(4)))
        left, right = one.step(actions), other.step(actions)
        assert np.array_equal(left.rewards, right.rewards) and np.array_equal(left.terminated, right.terminated)
        assert left.terminated.all() == ((turn + 1) % HORIZON == 0) and not left.truncated.any()
    later = Planted(4)
    later.load(json.loads(json.dumps(one.state())))
    seen = [digest([sight.features.sites for sight in environment.look()]) for environment in (one, later)]
    assert seen[0] == seen[1]
    assert np.array_equal(total(later, oracle, 9), total(one, oracle, 9))


def test_looking_twice_shows_the_same() -> None:
    environment = Planted(2)
    assert environment.look() is environment.look()
    environment.reset(1)
    first = environment.look()[0].features.world
    environment.step(rows(WAIT, WAIT))
    assert not np.array_equal(environment.look()[0].features.world, first)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_FACTORIES", dict(environments._FACTORIES))
    assert isinstance(make_environment("planted", 2), Planted) and "planted" in known_environments()
    with pytest.raises(UnknownNameError, match="no environment is called 'plantd'; did you mean 'planted'"):
        make_environment("plantd", 2)
    with pytest.raises(ConfigError, match="at least one episode"):
        make_environment("planted", 0)

    class Other(Planted):
        pass

    register_environment("other")(Other)
    assert isinstance(make_environment("other", 1), Other)
    register_environment("other")(Other)
    with pytest.raises(ConfigError, match="must be unique, got 'planted' twice"):
        register_environment("planted")(Other)
