"""Whole trainings in the planted environment: they learn, resume bit for bit, and notice what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.config import TamiyoConfig
from esper.errors import ConfigError, StateError, UnknownNameError
from esper.learning.cloning import Pair, agreement, clone, demonstrate
from esper.learning.contest import Following, contest, named, never, play, summary, uniform
from esper.learning.health import dead_critic, wait_collapse
from esper.learning.job import CURVES, POLICY, PROGRESS, train
from esper.learning.options import TrainOptions
from esper.learning.planted import BEST, Planted
from esper.learning.ppo import PPOConfig
from esper.learning.training import Training
from esper.tamiyo import HeuristicController
from esper.tamiyo.actions import WAIT, Operation
from esper.tamiyo.neural import policy_file
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.threads import one_thread

pytestmark = pytest.mark.component

TINY = {"episodes": 4, "steps": 6, "updates": 5, "checkpoint_every": 2, "test_episodes": 8}


def quietly(line: dict[str, Any]) -> None:
    return None


# ----------------------------------------------------------------------------------------------------------------------
# It learns


def test_finds_the_planted_site() -> None:
    """No wait-collapse: at least 95% of the best there is, on episodes it has not seen, in seconds."""
    floors = (0.2, 0.1, 0.1, 0.0, 0.0)
    config = PPOConfig(steps=6, lr=1e-3, minibatch=64, floors=floors, decay_updates=24)
    training = Training(Planted(64), Policy(seed=0), config, seed=0)
    lines = [training.update() for _ in range(18)]
    returns = play(Planted(32), Following(training.policy), 64, seed=1_000_000)
    assert np.mean(returns) >= 0.95 * BEST
    assert lines[-1]["problems"] == [] and lines[-1]["episodes"] == 18 * 64
    assert lines[-1]["mean_return"] > 2 * lines[0]["mean_return"]
    assert lines[-1]["operations"]["wait"] < 0.95 and set(lines[-1]["entropy"]) == set(training.policy.heads)
    json.dumps(lines, allow_nan=False)


def test_a_dead_critic_is_reported() -> None:
    policy = Policy(seed=0)
    policy.value.requires_grad_(False)
    training = Training(Planted(4), policy, PPOConfig(steps=6, lr=1e-5, epochs=1, minibatch=24), seed=0)
    lines = [training.update() for _ in range(30)]
    known = np.cumsum([line["explained_variance"] is not None for line in lines])
    assert known[-1] >= 20
    for line, num in zip(lines, known, strict=True):
        assert len(line["problems"]) == (num >= 20)
    assert "the critic is dead: after 20 updates it explains 0.00" in lines[int(np.argmax(known >= 20))]["problems"][0]


def test_when_a_critic_is_dead() -> None:
    nan = float("nan")
    assert dead_critic([0.0] * 19) is None
    assert dead_critic([0.0] * 20) is not None
    assert dead_critic([0.9] * 15 + [0.29] * 5) is not None
    assert dead_critic([0.0] * 19 + [0.3]) is None
    assert dead_critic([0.0] * 15 + [nan] * 100) is None, "a settled policy says nothing of its critic"


def test_when_a_policy_only_waits() -> None:
    assert wait_collapse([1.0] * 19, [0.0] * 19) is None
    assert "only waits: 100%" in (wait_collapse([0.2] * 15 + [1.0] * 5, [0.0] * 20) or "")
    assert wait_collapse([1.0] * 19 + [0.9], [0.0] * 20) is None


# ----------------------------------------------------------------------------------------------------------------------
# Cloning


def test_a_clone_does_what_the_heuristic_does() -> None:
    pairs, finished = demonstrate(Planted(16), lambda: HeuristicController(TamiyoConfig(first=0)), 18, seed=0)
    assert len(pairs) == 16 * 18 and len(finished) == 48
    operations = {Operation(pair.action.operation).name for pair in pairs}
    assert operations == {"WAIT", "GERMINATE", "STOP"}
    policy = Policy(seed=0)
    curve = clone(policy, pairs, epochs=25, minibatch=64, lr=2e-3)
    assert curve[-1] < 0.2 * curve[0]
    fresh, _ = demonstrate(Planted(16), lambda: HeuristicController(TamiyoConfig(first=0)), 6, seed=99)
    assert agreement(policy, fresh) > 0.9 > agreement(Policy(seed=1), fresh)


def test_nothing_to_choose_teaches_nothing() -> None:
    environment = Planted(1)
    environment.reset(0)
    environment.step(np.array([[Operation.STOP, -1, -1, -1, -1]]))
    pair = Pair(environment.look()[0], WAIT)
    policy = Policy(seed=0)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    assert clone(policy, [pair], epochs=2) == [0.0, 0.0] and agreement(policy, [pair]) == 1
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# Contests


def test_a_contest_is_paired() -> None:
    entries = contest(Planted(4), {"random": uniform(), "never": never()}, 10, seed=3)
    assert [entry.name for entry in entries] == ["random", "never"] and entries[1].returns == [0.0] * 10
    found = summary(entries, BEST)
    assert found["random_minus"]["never"]["mean"] == pytest.approx(np.mean(entries[0].returns))
    assert found["players"]["never"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    again = contest(Planted(4), {"random": uniform()}, 10, seed=3)
    assert again[0].returns == entries[0].returns
    assert play(Planted(8), uniform(), 10, seed=3) == entries[0].returns, "however many are played side by side"


def test_players() -> None:
    with pytest.raises(UnknownNameError, match="no controller is called 'heuristik'"):
        named("heuristik")
    with pytest.raises(ConfigError, match="at least 2 episodes"):
        contest(Planted(2), {"never": never()}, 1, seed=0)
    drawn = [play(Planted(4), Following(Policy(), sampled=sampled), 8, seed=0) for sampled in (True, True, False)]
    assert drawn[0] == drawn[1] != drawn[2]


# ----------------------------------------------------------------------------------------------------------------------
# Whole jobs


def options(folder: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(**{**TINY, "run_dir": folder, **changes})


class Cut(Exception):
    pass


def test_a_resumed_training_ends_bit_for_bit_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    def stop(line: dict[str, Any]) -> None:
        if line["update"] == 3:
            raise Cut

    wanted = train(options(tmp_path / "whole", clone="heuristic", clone_steps=6), quietly)
    with pytest.raises(Cut):
        train(options(tmp_path / "cut", clone="heuristic", clone_steps=6), stop)
    told: list[int] = []
    found = train(options(tmp_path / "cut", clone="heuristic", clone_steps=6), lambda line: told.append(line["update"]))
    assert told == [3, 4, 5], "it goes on from the checkpoint after the second update"
    assert found["sha256"] == wanted["sha256"] and found["scores"] == wanted["scores"]
    assert found["cloned"] == wanted["cloned"] and found["cloned"]["pairs"] == 24
    curves = [(tmp_path / name / CURVES).read_text() for name in ("whole", "cut")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 5
    _, card = policy_file.load(tmp_path / "cut" / POLICY)
    assert card.scope == Planted.scope and card.hosts == ("planted",) and card.scores == wanted["scores"]


def test_another_training_in_the_folder_is_refused(tmp_path: Path) -> None:
    train(options(tmp_path, updates=1), quietly)
    with pytest.raises(ConfigError, match=r"lr: 0\.0005 there, 0\.1 here; use --fresh"):
        train(options(tmp_path, updates=1, lr=0.1), quietly)
    train(options(tmp_path, updates=1, lr=0.1, fresh=True), quietly)
    (tmp_path / PROGRESS / "checkpoints.lock").unlink()
    for path in (tmp_path / PROGRESS).iterdir():
        path.write_bytes(b"")
    with pytest.raises(StateError, match="got none"):
        train(options(tmp_path, updates=1, lr=0.1), quietly)


def test_curves_that_are_none_are_refused_by_name(tmp_path: Path) -> None:
    train(options(tmp_path, updates=1), quietly)
    for text in ("rubbish\n", '{"a": 1}\n', "3\n"):
        (tmp_path / CURVES).write_text(text)
        with pytest.raises(StateError, match=r"curves\.jsonl must hold one update a line"):
            train(options(tmp_path, updates=1), quietly)
    (tmp_path / CURVES).unlink()
    train(options(tmp_path, updates=1), quietly)


def test_nothing_is_trained_on_tasks_of_evaluation(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got the environment 'greenhouse/teacher'"):
        train(options(tmp_path, environment="greenhouse/teacher"), quietly)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"updates": 0}, {"lr": 0.0}, {"seed": -1}, {"episodes": 0}])
def test_options_out_of_range(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        options(tmp_path, **changes)


def test_one_thread_at_a_time() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
