"""Train one policy by a recipe on hosts of the training families, on a fixed number of updates.

A training is a folder: checkpoints, curves, the policy after cloning (``cloned``) and at the end (``policy``). The same
call goes on where it was interrupted. Every update has hosts of its own, which follow from seed and update.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from benchmarks.controller.contest.recipes import RECIPES, Recipe, earned, lens
from benchmarks.controller.schedules import NEVER, Schedule, schedules, scripted

from esper.config import Config, TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.episodes import SCOPE, Episodes
from esper.greenhouse.family import FAMILIES, FIRST_HELD_OUT, HostSpec, data_of
from esper.greenhouse.field import TRAINING
from esper.greenhouse.frontier import LEARNING_RATES, frontier_of, tasks_of
from esper.learning.cloning import Pair, agreement, clone
from esper.learning.credit import relative_advantages
from esper.learning.ppo import PPOConfig, Rollout, gae, learn
from esper.safety.checkpoint import Checkpoints
from esper.tamiyo import Controller, HeuristicController
from esper.tamiyo.actions import FACTORS, WAIT, Action, Operation, nearest
from esper.tamiyo.neural import policy_file
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.policy_file import Card
from esper.tamiyo.neural.ranges import Ranges
from esper.tamiyo.sight import Sight

KIND = "contest-policy"
LEARNED_ON = tuple(name for name in FAMILIES if name.removesuffix("_long") in TRAINING)
"""Families that policies are trained on: the training families, and the longer ones of their kind."""
PRICES = (0.002, 0.005, 0.01, 0.02, 0.05)
"""Smallest gains per cost (``min_gain_per_cost``) that hosts of a training are run at: users differ in them."""
_FLOORS = {"operation": 0.2, "site": 0.1, "size": 0.1}


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much a training is."""

    updates: int = 90
    hosts: int = 12
    """Different hosts in an update, shared out over the families ..."""
    copies: int = 8
    """... and runs of each."""
    teachers: int = 24
    """Hosts on which the best schedule is looked for, and the heuristic watched."""
    tried: int = 16
    """Schedules tried on each."""
    checkpoint_every: int = 2


@dataclass
class Played:
    """Finished episodes: T decision points of N hosts each."""

    sights: list[list[Sight]]
    actions: list[list[Action]]
    returns: np.ndarray
    rewards: np.ndarray
    raw: list[list[Sight]]


def learned_on() -> str:
    """What the hosts were that a policy has learned on, for its card."""
    lengths = " and ".join(f"{steps:,}" for steps in sorted({FAMILIES[name].steps for name in LEARNED_ON}))
    layers = sorted({FAMILIES[name].num_sites for name in LEARNED_ON})
    return f"runs of {lengths} steps of small fully connected networks with {layers[0]} to {layers[-1]} hidden layers"


def draw_hosts(rng: np.random.Generator, num: int, families: Sequence[str] = LEARNED_ON) -> list[HostSpec]:
    """Training hosts: families in turn, tasks, learning rates and seeds drawn."""
    found: list[HostSpec] = []
    for row in range(num):
        name = families[row * len(families) // num]
        tasks = [task for task in tasks_of(name) if task < FIRST_HELD_OUT]
        found.append(
            HostSpec(
                family=name, task=int(rng.choice(tasks)), seed=int(rng.integers(1 << 20, 1 << 31)),
                lr=float(rng.choice(LEARNING_RATES)),
            )
        )  # fmt: skip
    return found


def play(specs: Sequence[HostSpec], act: Any, recipe: Recipe, *, rng: np.random.Generator | None = None) -> Played:
    """Episodes of hosts, family after family; ``act(sights, observations)`` gives one action each. With ``rng`` every
    family's hosts see a price that is drawn.

    Short and long hosts side by side: they have as many decision points.
    """
    shown = lens(recipe)
    stacks = [
        Episodes(
            [s for s in specs if s.family == name], None if rng is None else _priced(name, float(rng.choice(PRICES)))
        )
        for name in dict.fromkeys(s.family for s in specs)
    ]
    assert len({stack.num_decisions for stack in stacks}) == 1
    assert list(specs) == [spec for stack in stacks for spec in stack.hosts.specs]
    sights: list[list[Sight]] = []
    raw: list[list[Sight]] = []
    actions: list[list[Action]] = []
    while not stacks[0].done:
        seen = [sight for stack in stacks for sight in stack.sights]
        raw.append(seen)
        sights.append([shown(sight) for sight in seen])
        actions.append(act(sights[-1], [o for stack in stacks for o in stack.observations]))
        first = 0
        for stack in stacks:
            chosen = actions[-1][first : first + len(stack)]
            stack.step([a if s.masks.allow(a) else WAIT for a, s in zip(chosen, stack.sights, strict=True)])
            first += len(stack)
    ends = [end for stack in stacks for end in stack.outcomes]
    returns = [earned(recipe, end, frontier_of(spec.family, spec.task)) for end, spec in zip(ends, specs, strict=True)]
    return Played(sights, actions, np.array(returns), np.array([end.reward for end in ends]), raw)


def _priced(family: str, price: float) -> Config:
    config = FAMILIES[family].config
    return replace(config, tamiyo=replace(config.tamiyo, min_gain_per_cost=price))


class Training:
    """One policy on its way."""

    def __init__(self, recipe: Recipe, extent: Extent, seed: int, size: str) -> None:
        self.recipe, self.extent, self.seed = recipe, extent, seed
        self.policy = Policy(size, seed=seed)
        floors = tuple(_FLOORS.get(head, 0.0) if recipe.floors else 0.0 for head in FACTORS)
        self.config = PPOConfig(
            lr=5e-4, epochs=3, minibatch=512, floors=floors, decay_updates=extent.updates,
            normalise=recipe.credit == "critic",
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.config.lr, eps=1e-5)
        self.generator = torch.Generator().manual_seed(seed)
        self.updates, self.episodes = 0, 0
        self.ranges: Ranges | None = None
        self.lines: list[dict[str, Any]] = []

    def begin(self) -> dict[str, Any] | None:
        """Imitate, where the recipe says so; returns how well that went."""
        if self.recipe.start == "nothing":
            return None
        specs = draw_hosts(np.random.default_rng([self.seed, 1 << 20]), self.extent.teachers)
        watched = [self._watch(specs, [HeuristicController(TamiyoConfig()) for _ in specs])]
        chosen: list[int] = []
        if self.recipe.start == "branches":
            best, chosen = self._best_branches(specs)
            watched.append(best)
        pairs = [pair for played in watched for pair in _pairs(played)]
        curve = clone(self.policy, pairs, epochs=6, seed=self.seed)
        return {
            "pairs": len(pairs), "loss": curve, "agreement": agreement(self.policy, pairs), "chosen": chosen,
            "rewards": [round(float(played.rewards.mean()), 3) for played in watched],
        }  # fmt: skip

    def update(self) -> dict[str, Any]:
        """Collect and learn once; returns a line of the curves."""
        rng = np.random.default_rng([self.seed, self.updates])
        siblings = self.recipe.credit == "siblings"
        copies = self.extent.copies if siblings else 1
        num = self.extent.hosts if siblings else self.extent.hosts * self.extent.copies
        specs = [spec for spec in draw_hosts(rng, num) for _ in range(copies)]
        decided: list[Any] = []

        def act(sights: list[Sight], observations: Any) -> list[Action]:
            with torch.no_grad():
                decided.append(self.policy(self.policy.collate(sights), generator=self.generator))
            return [Action(*row) for row in decided[-1].actions.tolist()]

        played = play(specs, act, self.recipe, rng=rng)
        self._widen(played)
        values = np.stack([found.value.double().numpy() for found in decided])
        advantages, returns = self._credit(played, values, copies)
        rollout = Rollout(
            looks=[sight for row in played.sights for sight in row],
            actions=torch.cat([found.actions for found in decided]),
            log_probs=torch.cat([found.log_prob for found in decided]),
            values=torch.from_numpy(values.ravel()).float(), advantages=torch.from_numpy(advantages.ravel()).float(),
            returns=torch.from_numpy(returns.ravel()).float(),
        )  # fmt: skip
        learned = learn(
            self.policy, self.optimizer, rollout, self.config, generator=self.generator, update=self.updates
        )
        self.updates, self.episodes = self.updates + 1, self.episodes + len(specs)
        grown = np.array([[a.operation == Operation.GERMINATE for a in row] for row in played.actions])
        line = {
            "update": self.updates, "episodes": self.episodes, "mean_return": round(float(played.returns.mean()), 4),
            "germinations": round(float(grown.sum(0).mean()), 3), "kl": round(learned.kl, 5),
            "entropy": {h: round(e, 4) for h, e in zip(self.policy.heads, learned.entropies, strict=True) if e == e},
        }  # fmt: skip
        self.lines.append(line)
        return line

    def _credit(self, played: Played, values: np.ndarray, copies: int) -> tuple[np.ndarray, np.ndarray]:
        """Advantages and the critic's targets, ``(T, N)``; NaN where the critic learns nothing."""
        if self.recipe.credit == "siblings":
            worth = relative_advantages(played.returns.reshape(-1, copies)).ravel()
            return np.broadcast_to(worth, values.shape).copy(), np.full(values.shape, np.nan)
        rewards, ended = np.zeros(values.shape), np.zeros(values.shape, dtype=np.bool_)
        rewards[-1], ended[-1] = played.returns, True
        following = np.concatenate([values[1:], np.zeros((1, values.shape[1]))])
        advantages = gae(rewards, values, following, ended, 1.0, self.config.lam)
        return advantages, advantages + values

    def _watch(self, specs: Sequence[HostSpec], controllers: Sequence[Controller]) -> Played:
        def act(sights: list[Sight], observations: Any) -> list[Action]:
            return [
                nearest(() if seen.stopped is not None else c.decide(seen), seen, sight.masks)
                for c, seen, sight in zip(controllers, observations, sights, strict=True)
            ]

        played = play(specs, act, self.recipe)
        self._widen(played)
        return played

    def _best_branches(self, specs: Sequence[HostSpec]) -> tuple[Played, list[int]]:
        """On each host (with two seeds) the best of some schedules, played once more in the list."""
        rng = np.random.default_rng([self.seed, 1 << 21])
        found: list[tuple[Schedule, ...]] = []
        runs: list[HostSpec] = []
        for spec in specs:
            family = FAMILIES[spec.family]
            plans = schedules(family.config.interval, family.steps, family.num_sites)[1:]
            picked = rng.choice(len(plans), self.extent.tried - 1, replace=False)
            found.append((NEVER, *(plans[number] for number in picked)))
            runs += [spec.with_seed(spec.seed + twin) for _ in found[-1] for twin in (0, 1)]
        plans = [plan for some in found for plan in some for _ in (0, 1)]
        played = self._watch(runs, [_scripted(plan, run) for plan, run in zip(plans, runs, strict=True)])
        means = played.returns.reshape(len(specs), self.extent.tried, 2).mean(2)
        best = means.argmax(1)
        rows = [(row * self.extent.tried + int(b)) * 2 + twin for row, b in enumerate(best) for twin in (0, 1)]
        kept = Played(
            *([[turn[row] for row in rows] for turn in part] for part in (played.sights, played.actions)),
            played.returns[rows], played.rewards[rows], [[turn[row] for row in rows] for turn in played.raw],
        )  # fmt: skip
        return kept, best.tolist()

    def _widen(self, played: Played) -> None:
        seen = Ranges.of(sight.features for row in played.raw for sight in row)
        self.ranges = seen if self.ranges is None else self.ranges.joined(seen)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "policy": dict(self.policy.state_dict()), "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(), "updates": self.updates, "episodes": self.episodes,
            "ranges": None if self.ranges is None else msgspec.to_builtins(self.ranges), "lines": self.lines,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.updates, self.episodes, self.lines = state["updates"], state["episodes"], state["lines"]
        self.ranges = None if state["ranges"] is None else msgspec.convert(state["ranges"], Ranges)

    def write(self, folder: Path, *, limits: tuple[str, ...]) -> None:
        """The policy as it is now."""
        assert self.ranges is not None
        card = Card(
            ranges=self.ranges, scope=SCOPE, hosts=LEARNED_ON, seeds=(self.seed,), limits=limits,
            data=f"{self.episodes} episodes of stacked hosts ({learned_on()}), drawn from the training tasks of "
            f"{', '.join(LEARNED_ON)}",
        )  # fmt: skip
        policy_file.save(folder, self.policy, card)


def _scripted(plan: Schedule, spec: HostSpec) -> Controller:
    family = FAMILIES[spec.family]
    names = body_of(spec.family).names
    return scripted(plan, data_of(family, spec.task).widths, names)


def _pairs(played: Played) -> list[Pair]:
    return [
        Pair(sight, action)
        for sights, actions in zip(played.sights, played.actions, strict=True)
        for sight, action in zip(sights, actions, strict=True)
    ]


def train(
    name: str, seed: int, folder: str, extent: dict[str, int], seconds: float | None = None, size: str = "small"
) -> dict[str, Any]:
    """Train by the recipe ``name``, or go on; returns what is told of it.

    ``seconds`` of wall-clock time after which the policy is taken as it is.
    """
    started, place = time.monotonic(), Path(folder)
    training = Training(RECIPES[name], Extent(**extent), seed, size)
    told: dict[str, Any] | None = None
    with Checkpoints(place / "progress", kind=KIND) as checkpoints:
        loaded = checkpoints.load()
        if loaded is None:
            told = training.begin()
            if training.ranges is not None:
                training.write(place / "cloned", limits=("it imitates, and has not learned from what came of it",))
            checkpoints.save({"training": training.state(), "begun": told}, step=0)
        else:
            training.load(loaded.tree["training"])
            told = loaded.tree["begun"]
        while training.updates < training.extent.updates:
            if seconds is not None and time.monotonic() - started > seconds:
                break
            training.update()
            if training.updates % training.extent.checkpoint_every == 0:
                checkpoints.save({"training": training.state(), "begun": told}, step=training.updates)
        checkpoints.save({"training": training.state(), "begun": told}, step=training.updates)
    training.write(place / "policy", limits=(f"trained on {learned_on()}",))
    replace_text(place / "curves.jsonl", "".join(json.dumps(line) + "\n" for line in training.lines))
    return {
        "recipe": name, "seed": seed, "updates": training.updates, "planned": training.extent.updates,
        "episodes": training.episodes, "begun": told, "lines": training.lines[:: max(1, len(training.lines) // 30)],
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
