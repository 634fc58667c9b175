"""Episodes dealt out to workers of this process: what happens is a function of seed, actions and number of workers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ConfigError, StateError
from esper.learning.environment import HostEnvironment, Ints, Stepped
from esper.learning.job import POLICY, train
from esper.learning.options import TrainOptions
from esper.learning.planted import BEST, HORIZON, Planted
from esper.learning.shards import Here, Part, Shards, sizes, spread
from esper.safety.checkpoint import Checkpoints
from esper.safety.tree import digest
from esper.tamiyo.sight import Sight

pytestmark = pytest.mark.component


class Cutting(Planted):
    """The first episode is cut short at its second step."""

    def step(self, actions: Ints) -> Stepped[Sight]:
        found = super().step(actions)
        cut = np.zeros(self.num, dtype=np.bool_)
        cut[0] = self._episodes[0].turn == 2
        return Stepped(found.rewards, found.terminated, cut, {0: self.look()[0]} if cut[0] else {})


def in_parts(*sizes: int, kind: type[Planted] = Planted) -> Shards:
    return Shards([Here(Part(kind(size))) for size in sizes])


def growing(num: int, turn: int) -> Ints:
    rows = np.arange(num)
    return np.stack([rows * 0 + 1, 1 + (rows + turn) % 2, rows % 3, rows * 0, rows * 0 + 1], 1)


def shown(environment: HostEnvironment) -> str:
    return digest([sight.features.sites for sight in environment.look()])


def test_one_part_is_the_environment_itself() -> None:
    plain, alone = Planted(3), in_parts(3)
    for environment in (plain, alone):
        environment.reset(7)
        environment.step(growing(3, 0))
    assert shown(plain) == shown(alone) and digest(plain.state()) == digest(alone.state())
    assert (alone.num, alone.scope, alone.families, alone.best) == (3, Planted.scope, ("planted",), BEST)


def test_the_parts_stand_side_by_side() -> None:
    """Each row is what its own environment makes of its own action; the first part has the seed itself."""
    whole, first, second = in_parts(2, 3, kind=Cutting), Cutting(2), Cutting(3)
    whole.reset(7)
    first.reset(7)
    second.reset(int(np.random.SeedSequence(7).generate_state(1)[0]) >> 1)
    assert first._episodes[0].energies != second._episodes[0].energies
    for turn in range(HORIZON + 1):
        assert digest([s.features.sites for s in whole.look()]) == digest(
            [s.features.sites for part in (first, second) for s in part.look()]
        )
        assert len(whole.observations()) == 5
        actions = growing(5, turn)
        found, one, two = whole.step(actions), first.step(actions[:2]), second.step(actions[2:])
        for name in ("rewards", "terminated", "truncated"):
            assert np.array_equal(getattr(found, name), np.concatenate([getattr(one, name), getattr(two, name)]))
        assert set(found.last) == ({0, 2} if turn == 1 else set())
    assert whole.look() is whole.look()


def test_a_state_goes_on_and_only_with_as_many_workers() -> None:
    one, other = in_parts(2, 2), in_parts(2, 2)
    one.reset(3)
    one.step(growing(4, 0))
    other.load(json.loads(json.dumps(one.state())))
    assert shown(one) == shown(other)
    assert np.array_equal(*(e.step(growing(4, 1)).rewards for e in (one, other)))
    assert shown(one) == shown(other)
    with pytest.raises(StateError, match="a state of 3 workers is needed, got one of 2; use as many as it has"):
        in_parts(2, 1, 1).load(one.state())
    with pytest.raises(StateError, match="a state of 2 workers is needed, got one of 1"):
        one.load(Planted(4).state())


@given(st.integers(1, 200), st.integers(1, 50))
def test_dealt_as_evenly_as_can_be(num: int, workers: int) -> None:
    if workers > num:
        with pytest.raises(ConfigError, match=f"between 1 and the {num} episodes"):
            sizes(num, workers)
    else:
        dealt = sizes(num, workers)
        assert sum(dealt) == num and len(dealt) == workers and max(dealt) - min(dealt) <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Whole trainings


def options(folder: Path, **changes: Any) -> TrainOptions:
    tiny = {"episodes": 4, "steps": 6, "updates": 4, "checkpoint_every": 2, "test_episodes": 8}
    return TrainOptions(**{**tiny, "run_dir": folder, **changes})


class Cut(Exception):
    pass


def test_a_training_with_two_workers_resumes_bit_for_bit(tmp_path: Path) -> None:
    def stop(line: dict[str, Any]) -> None:
        if line["update"] == 3:
            raise Cut

    wanted = train(options(tmp_path / "whole", workers=2), lambda line: None)
    with pytest.raises(Cut):
        train(options(tmp_path / "cut", workers=2), stop)
    with pytest.raises(ConfigError, match="workers: 2 there, 1 here"):
        train(options(tmp_path / "cut"), stop)
    found = train(options(tmp_path / "cut", workers=2), lambda line: None)
    assert found["sha256"] == wanted["sha256"] and found["scores"] == wanted["scores"]
    assert train(options(tmp_path / "alone"), lambda line: None)["sha256"] != wanted["sha256"]


def test_trainings_from_before_there_were_workers_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoints.save

    def without(self: Checkpoints, tree: dict[str, Any], *, step: int) -> Any:
        del tree["options"]["workers"]
        return save(self, tree, step=step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", without)
        train(options(tmp_path), lambda line: None)
    assert train(options(tmp_path), lambda line: None)["policy"] == str(tmp_path / POLICY)


def test_more_workers_than_episodes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="each worker has at least one of the 4 episodes side by side, got 5 workers"):
        options(tmp_path, workers=5)
    with pytest.raises(ConfigError, match="workers must be at least 1, got 0"):
        options(tmp_path, workers=0)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "esper.learning.ray_workers", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'esper-morph\[ray\]'"), spread(Planted, 4, 2, "local"):
        pass
