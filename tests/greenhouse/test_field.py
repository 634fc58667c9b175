"""What policies learn in: hosts of several families side by side, deterministic, and to be resumed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from esper.errors import ConfigError
from esper.greenhouse.family import FAMILIES, FIRST_HELD_OUT
from esper.greenhouse.field import TRAINING, Field
from esper.learning import environment
from esper.learning.environment import known_environments, make_environment
from esper.protocol import Observation
from esper.tamiyo.actions import WAIT, Action, Operation, draw
from esper.tamiyo.sight import Sight

pytestmark = pytest.mark.component


def drawn(field: Field, rng: np.random.Generator) -> np.ndarray:
    return np.array([draw(sight.masks, rng) for sight in field.look()], dtype=np.int64)


def waiting(sights: Sequence[Sight], observations: Sequence[Observation]) -> list[Action]:
    return [WAIT] * len(sights)


def test_every_family_is_an_environment_that_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"greenhouse", *(f"greenhouse/{name}" for name in FAMILIES)}
    with monkeypatch.context() as before_anything_is_imported:
        before_anything_is_imported.setattr(environment, "_FACTORIES", {})
        assert set(known_environments()) == {*names, "planted"}
    field = make_environment("greenhouse/checkers", 2)
    assert isinstance(field, Field) and field.families == ("checkers",) and field.num == len(field.look()) == 2
    assert [seen.step for seen in field.observations()] == [20, 20]
    assert all(spec[1] >= FIRST_HELD_OUT for spec in field.state()["hosts"])


def test_training_never_sees_an_evaluation_task_or_family() -> None:
    field = make_environment("greenhouse", 5)
    assert field.families == TRAINING and {FAMILIES[name].purpose for name in TRAINING} == {"training"}
    for seed in range(20):
        field.reset(seed)
        assert all(task < FIRST_HELD_OUT for _, task, _, _ in field.state()["hosts"])


def test_seed_and_actions_decide_everything_and_a_state_goes_on_from_there() -> None:
    field, other = Field(3), Field(3)
    rng = np.random.default_rng(1)
    field.reset(4)
    for _ in range(6):
        field.step(drawn(field, rng))
    state = field.state()
    plan = []
    rewards = []
    for _ in range(15):
        plan.append(drawn(field, rng))
        stepped = field.step(plan[-1])
        rewards.append(stepped.rewards)
        assert not stepped.truncated.any() and stepped.terminated.all() == bool(stepped.terminated.any())
    assert len(field.outcomes) == 3 and sum(bool(r.any()) for r in rewards) == 1
    other.load(state)
    again = [other.step(actions).rewards for actions in plan]
    np.testing.assert_array_equal(again, rewards)
    for mine, theirs in zip(field.look(), other.look(), strict=True):
        np.testing.assert_array_equal(mine.features.sites, theirs.features.sites)


def test_branches_leave_the_field_where_it_is() -> None:
    field = Field(3)
    field.step(np.array([WAIT] * 3))
    before = field.look()[1].features.world.copy()
    grow = Action(Operation.GERMINATE, 1, 2, 0, 0)
    returns = field.branches(1, [WAIT, grow, WAIT], waiting)
    assert returns[0] == returns[2] != returns[1]
    np.testing.assert_array_equal(field.look()[1].features.world, before)
    with pytest.raises(ConfigError, match="no row 3"):
        field.branches(3, [WAIT], waiting)


def test_without_judgement_what_germinates_in_time_stays() -> None:
    """Where everything is kept, the same actions end in at least as many parameters."""
    ends = []
    for keep_all in (False, True):
        field = Field(2, families=("null",), keep_all=keep_all)
        grow = Action(Operation.GERMINATE, 1, 1, 0, 0)
        for turn in range(19):
            field.step(np.array([grow if turn == 0 else WAIT] * 2))
        ends.append([end.params for end in field.outcomes])
    assert all(kept >= judged for judged, kept in zip(*ends, strict=True)) and sum(ends[1]) > sum(ends[0])
