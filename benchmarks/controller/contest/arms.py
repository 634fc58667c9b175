"""What is compared: every arm is a controller for one host, from its name and what was tuned.

::

    never always even even-own search search-own random bandit                 controls
    heuristic heuristic-before
    karn-NUM karn-uniform bandit-NUM                                           with NUM reports of earlier runs
    RECIPE:SEED cloned:SEED sampled:SEED karn-policy:SEED                      trained policies
    replay:SEED shuffled:SEED                                                  what a policy does, without looking
    static                                                                     no growth, the best width in advance
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from benchmarks.controller.contest.recipes import FULL, RECIPES, lens
from benchmarks.controller.schedules import NEVER, Growth, Schedule, scripted

from esper.config import TamiyoConfig
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.episodes import SCOPE
from esper.greenhouse.family import FAMILIES, HostSpec, data_of
from esper.karn import AdvisedController, Architect, FieldReport, Snapshot
from esper.karn.experience import rows
from esper.protocol import Command, Observation
from esper.tamiyo import BanditController, Controller, HeuristicController
from esper.tamiyo.actions import WAIT, Action, Operation, commands, draw
from esper.tamiyo.features import FeatureReader, Features
from esper.tamiyo.neural import policy_file
from esper.tamiyo.neural.controller import NeuralController
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.sight import Sight, see

START = TamiyoConfig()
"""The heuristic as it comes, and what else follows its pace."""
HEURISTICS = ("heuristic", "heuristic-before")
"""The default as it is, and that of 0024 (half the width whatever a span puts out, two failures end growth)."""
CONTROLS = (
    "never", "always", "even", "even-own", "search", "search-own", "random", *HEURISTICS, "bandit",
)  # fmt: skip
ADVISED = ("karn-uniform", "karn-50", "karn-200", "karn-1000", "bandit-1000")
ADVISED_LONGER = ("karn-uniform", "karn-1000", "bandit-1000")
"""Those that play longer runs as well."""
LR_OF = {
    "karn-uniform": "heuristic", "karn-50": "heuristic", "karn-200": "heuristic", "karn-1000": "heuristic",
    "bandit-1000": "bandit", "karn-policy": "policy", "replay": "policy", "shuffled": "policy", "sampled": "policy",
}  # fmt: skip
"""Arms whose learning rate is that of another one."""


class Plan:
    """What was tuned and trained: a folder with ``plan.json``, policies and ``reports.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tuned: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))

    def lr(self, arm: str, family: str) -> float:
        """An arm's learning rate on a family, chosen once on tuning tasks; the family's own if none was."""
        head, _, seed = arm.partition(":")
        known = self.tuned.get("lr", {})
        for name in (arm, f"{LR_OF.get(head, head)}:{seed}" if seed else LR_OF.get(head, head)):
            if name in known and family in known[name]:
                return float(known[name][family])
        return FAMILIES[family].lr

    def schedule(self, name: str, family: str) -> Schedule:
        """A tuned schedule."""
        found = self.tuned["schedules"][name]
        return tuple(Growth(**growth) for growth in (found[family] if isinstance(found, dict) else found))

    def policy(self, recipe: str, seed: str, kind: str = "policy") -> Path:
        """The folder of a trained policy."""
        return self.folder / "policies" / f"{recipe}-{seed}" / kind


def plan_in(folder: str) -> Plan:
    """As it is now: read again when it has changed."""
    return _plan(folder, (Path(folder) / "plan.json").stat().st_mtime_ns)


@cache
def _plan(folder: str, written: int) -> Plan:
    del written
    return Plan(Path(folder))


@cache
def _reports(folder: str) -> tuple[FieldReport, ...]:
    text = (Path(folder) / "reports.json").read_text(encoding="utf-8")
    return msgspec.json.decode(text, type=tuple[FieldReport, ...])


@cache
def _architect(folder: str, num: int, *, uniform: bool = False) -> Architect:
    return Architect(Snapshot(reports=_reports(folder)[:num] if num else ()), uniform=uniform)


@cache
def _policy(path: str) -> Policy:
    return policy_file.load(path)[0]


class _Plain:
    """A controller without memory beyond its reader."""

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        del state


class Always(_Plain):
    """All sites, once their width, whenever that is possible."""

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        sight = see(FeatureReader(), observation, SCOPE)
        action = Action(Operation.GERMINATE, 0, SCOPE.sizes.index(1.0), 0, 0)
        return commands(action, observation) if sight.masks.allow(action) else ()


class AtRandom(_Plain):
    """Germinates at a rate, drawn sites and sizes."""

    def __init__(self, rate: float, seed: Sequence[int]) -> None:
        self._rate, self._rng = rate, np.random.default_rng(list(seed))

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        masks = see(FeatureReader(), observation, SCOPE).masks
        if not masks.operation[Operation.GERMINATE] or self._rng.random() >= self._rate:
            return ()
        only = np.zeros_like(masks.operation)
        only[Operation.GERMINATE] = True
        return commands(draw(type(masks)(only, masks.fits, masks.cullable, masks.strategy), self._rng), observation)


class Follower(_Plain):
    """A policy of any recipe, shown what its recipe shows; what is not valid is a wait. No fallback.

    ``features`` replaces what it sees of the run, decision by decision.
    """

    def __init__(
        self, policy: Policy, recipe: str, *, seed: int | None = None, features: Sequence[Features] | None = None
    ) -> None:
        self._policy, self._show, self._reader = policy, lens(RECIPES.get(recipe, FULL)), FeatureReader()
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._features = list(features) if features is not None else None

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        sight = see(self._reader, observation, SCOPE)
        seen = self._show(sight)
        if self._features is not None:
            seen = Sight(self._features.pop(0), seen.masks)
        if sight.masks.forced:
            return ()
        with torch.inference_mode():
            found = self._policy(self._policy.collate([seen]), generator=self._generator)
        action = Action(*found.actions[0].tolist())
        return commands(action if sight.masks.allow(action) else WAIT, observation)


def names_of(spec: HostSpec) -> tuple[str, ...]:
    """Sites of a host."""
    return body_of(spec.family).names


def make(arm: str, spec: HostSpec, folder: str) -> Controller:
    """The arm's controller for one host."""
    plan, (head, _, seed) = plan_in(folder), arm.partition(":")
    drawn = [spec.task, spec.seed]
    if head in _SIMPLE:
        return _SIMPLE[head](plan, spec)
    if head == "random":
        return AtRandom(plan.tuned["rate"], drawn)
    if head == "karn-uniform":
        return AdvisedController(HeuristicController(START), _architect(folder, 0, uniform=True), seed=spec.seed)
    if head == "karn-policy":
        inner = NeuralController(_following(plan.policy("policy", seed)))
        return AdvisedController(inner, _architect(folder, 1000), seed=spec.seed)
    if head.startswith("karn-"):
        return AdvisedController(HeuristicController(START), _architect(folder, int(head[5:])), seed=spec.seed)
    if head.startswith("bandit-"):
        taught = BanditController(START, seed=spec.seed)
        taught.learn(*rows(_reports(folder)[: int(head[7:])]))
        return taught
    if head == "policy":
        return NeuralController(_following(plan.policy("policy", seed)))
    if head == "replay":
        return scripted(
            plan.schedule(arm, spec.family), data_of(FAMILIES[spec.family], spec.task).widths, names_of(spec)
        )
    kind = "cloned" if head == "cloned" else "policy"
    recipe = "policy" if head in ("cloned", "sampled", "shuffled") else head
    return Follower(
        _policy(str(plan.policy(recipe, seed, kind))), recipe, seed=spec.seed if head == "sampled" else None
    )


BEFORE = TamiyoConfig(growth=0.5, patience=2)


def _following(path: Path) -> TamiyoConfig:
    return TamiyoConfig(first=0, controller="neural", policy=str(path))


def _schedule(name: str) -> Callable[[Plan, HostSpec], Controller]:
    def make_one(plan: Plan, spec: HostSpec) -> Controller:
        chosen = plan.schedule(name, spec.family)
        return scripted(chosen, data_of(FAMILIES[spec.family], spec.task).widths, names_of(spec))

    return make_one


_SIMPLE: dict[str, Callable[[Plan, HostSpec], Controller]] = {
    "never": lambda plan, spec: scripted(NEVER, (), ()),
    "always": lambda plan, spec: Always(),
    "heuristic": lambda plan, spec: HeuristicController(START),
    "heuristic-before": lambda plan, spec: HeuristicController(BEFORE),
    "bandit": lambda plan, spec: BanditController(START, seed=spec.seed),
    **{name: _schedule(name) for name in ("even", "even-own", "search", "search-own")},
}
