"""A whole training in a folder: curves, checkpoints, and at the end a policy with its card.

::

    curves.jsonl     one line an update
    progress/        checkpoints, for the same command to go on from
    policy/          tensors and card
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.config import TamiyoConfig
from esper.errors import ConfigError, StateError
from esper.files import replace_text
from esper.learning.cloning import agreement, clone, demonstrate
from esper.learning.contest import Following, play
from esper.learning.environment import HostEnvironment, find_environment, is_played_only
from esper.learning.options import TrainOptions
from esper.learning.ppo import PPOConfig
from esper.learning.shards import spread
from esper.learning.training import Training
from esper.safety.checkpoint import Checkpoints
from esper.tamiyo.actions import FACTORS
from esper.tamiyo.neural import policy_file
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.policy_file import Card
from esper.tamiyo.neural.ranges import Ranges
from esper.tamiyo.neural.threads import one_thread
from esper.tamiyo.registry import make_controller

CURVES, PROGRESS, POLICY = "curves.jsonl", "progress", "policy"
KIND = "policy-training"
OnLine = Callable[[dict[str, Any]], None]

_FLOORS = {"operation": 0.2, "site": 0.1, "size": 0.1}
_TEST_SEED = 1_000_000
"""Added to the seed: episodes that are scored on are never those of the training."""


def ppo_config(options: TrainOptions) -> PPOConfig:
    """The settings of the learner."""
    return PPOConfig(
        steps=options.steps, lr=options.lr, minibatch=max(32, options.episodes * options.steps // 4),
        floors=tuple(_FLOORS.get(head, 0.0) for head in FACTORS), decay_updates=options.updates,
    )  # fmt: skip


def train(options: TrainOptions, on_line: OnLine) -> dict[str, Any]:
    """Train, or go on training; returns what ``--json`` writes.

    Raises
    ------
    ConfigError
        The folder holds another training, or the environment draws tasks of evaluation.
    StateError
        The folder cannot be used, or its checkpoints or curves are damaged.
    WorkerError
        A Ray worker cannot be started or is gone. The checkpoints stay.
    """
    factory = find_environment(options.environment)
    if is_played_only(options.environment):
        raise ConfigError(
            f"nothing is trained on tasks of evaluation, got the environment {options.environment!r}, which draws "
            "them; train in 'greenhouse' and play there"
        )
    if options.fresh and options.run_dir.exists():
        shutil.rmtree(options.run_dir / PROGRESS, ignore_errors=True)
        (options.run_dir / CURVES).unlink(missing_ok=True)
    with (
        one_thread(),
        Checkpoints(options.run_dir / PROGRESS, kind=KIND) as checkpoints,
        spread(factory, options.episodes, options.workers, options.ray) as environment,
    ):
        training = Training(
            environment, Policy(options.size, seed=options.seed), ppo_config(options), seed=options.seed
        )
        cloned = _begin(training, options, checkpoints)
        lines = _lines_until(options.run_dir / CURVES, training.history.updates)
        while training.history.updates < options.updates:
            lines.append(training.update())
            on_line(lines[-1])
            if training.history.updates % options.checkpoint_every == 0 or training.history.updates == options.updates:
                _save(training, options, checkpoints, cloned)
                replace_text(options.run_dir / CURVES, "".join(json.dumps(line) + "\n" for line in lines))
        return _finish(training, options, cloned)


def _begin(training: Training, options: TrainOptions, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Go on from the newest checkpoint, or clone; returns how the cloning went."""
    loaded = checkpoints.load()
    if loaded is None:
        cloned = _clone(training, options)
        _save(training, options, checkpoints, cloned)
        return cloned
    tree: dict[str, Any] = loaded.tree
    # Before there were workers there was one.
    here, there = options.fixed(), {"workers": 1} | tree["options"]
    differing = [
        f"{name}: {there.get(name)!r} there, {here[name]!r} here" for name in here if there.get(name) != here[name]
    ]
    if differing:
        raise ConfigError(
            f"a training goes on with the options it was begun with, got {len(differing)} differences in "
            f"{str(options.run_dir)!r}: {'; '.join(differing)}; use --fresh, or choose another --run-dir"
        )
    training.load(tree["training"])
    return tree["cloned"]


def _clone(training: Training, options: TrainOptions) -> dict[str, Any] | None:
    if options.clone is None:
        return None
    name, environment = options.clone, training.environment
    pairs, finished = demonstrate(
        environment, lambda: make_controller(name, TamiyoConfig(first=0)), options.clone_steps, seed=options.seed
    )  # fmt: skip
    curve = clone(training.policy, pairs, seed=options.seed)
    training.ranges = Ranges.of(pair.sight.features for pair in pairs)
    training.collector.reset(options.seed)
    return {
        "controller": name, "pairs": len(pairs), "loss": curve, "agreement": agreement(training.policy, pairs),
        "mean_return": sum(finished) / len(finished) if finished else None,
    }  # fmt: skip


def _save(training: Training, options: TrainOptions, checkpoints: Checkpoints, cloned: dict[str, Any] | None) -> None:
    tree = {"options": options.fixed(), "training": training.state(), "cloned": cloned}
    checkpoints.save(tree, step=training.history.updates)


def _lines_until(path: Path, updates: int) -> list[dict[str, Any]]:
    """The curves up to an update; later lines are of updates that will be made again."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["update"] <= updates]
    except (ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path} must hold one update a line as JSON, got something else ({error}); move it away: the training "
            "goes on and its curves begin there, or start afresh with --fresh"
        ) from error


def _finish(training: Training, options: TrainOptions, cloned: dict[str, Any] | None) -> dict[str, Any]:
    environment, history = training.environment, training.history
    scores = {
        mode: _mean_return(training.policy, environment, options, sampled=mode == "sampled")
        for mode in ("greedy", "sampled")
    }
    problems = history.problems()
    assert training.ranges is not None
    card = policy_file.save(
        options.run_dir / POLICY, training.policy,
        Card(
            ranges=training.ranges, scope=environment.scope, hosts=environment.families, seeds=(options.seed,),
            data=f"{history.episodes} episodes of {options.environment!r}, {history.steps} decision points",
            scores=scores, limits=("trained and scored on the same kind of hosts only", *problems),
        ),
    )  # fmt: skip
    return {
        "environment": options.environment, "updates": history.updates, "episodes": history.episodes,
        "steps": history.steps, "cloned": cloned, "scores": scores, "best": environment.best, "problems": problems,
        "policy": str(options.run_dir / POLICY), "sha256": card.sha256,
    }  # fmt: skip


def _mean_return(policy: Policy, environment: HostEnvironment, options: TrainOptions, *, sampled: bool) -> float:
    player = Following(policy, sampled=sampled)
    returns = play(environment, player, options.test_episodes, seed=_TEST_SEED + options.seed)
    return sum(returns) / len(returns)
