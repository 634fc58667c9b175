"""Behaviour cloning: a policy that begins by doing what another controller does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esper.learning.environment import HostEnvironment
from esper.tamiyo.actions import Action, nearest
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.registry import Controller
from esper.tamiyo.sight import Sight


@dataclass(frozen=True)
class Pair:
    """What was seen, and what the other controller did (as nearly as actions can say it)."""

    sight: Sight
    action: Action


def demonstrate(
    environment: HostEnvironment, make: Callable[[], Controller], num_steps: int, *, seed: int
) -> tuple[list[Pair], list[float]]:
    """Let controllers act for ``num_steps`` decision points in every episode; also the returns of those that ended.

    ``make`` builds a controller for each new episode.
    """
    environment.reset(seed)
    controllers = [make() for _ in range(environment.num)]
    earned, finished = np.zeros(environment.num), list[float]()
    pairs: list[Pair] = []
    for _ in range(num_steps):
        sights, observations = environment.look(), environment.observations()
        actions = [
            nearest(controller.decide(observation), observation, sight.masks)
            for controller, observation, sight in zip(controllers, observations, sights, strict=True)
        ]
        pairs += [Pair(sight, action) for sight, action in zip(sights, actions, strict=True)]
        stepped = environment.step(np.array(actions, dtype=np.int64))
        earned += stepped.rewards
        for row in np.flatnonzero(stepped.terminated | stepped.truncated).tolist():
            finished.append(float(earned[row]))
            earned[row], controllers[row] = 0.0, make()
    return pairs, finished


def clone(
    policy: Policy, pairs: Sequence[Pair], *, epochs: int = 10, minibatch: int = 256, lr: float = 1e-3, seed: int = 0
) -> list[float]:
    """Make the pairs' actions likely; returns the mean loss (nats a decision) of each epoch.

    Decision points with nothing to choose teach nothing. The critic is left alone.
    """
    taught = [pair for pair in pairs if not pair.sight.masks.forced]
    if not taught:
        return [0.0] * epochs
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr)
    actions = torch.tensor([pair.action for pair in taught])
    curve: list[float] = []
    for _ in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(taught), generator=generator).split(minibatch):
            decided = policy(policy.collate([taught[row].sight for row in rows.tolist()]), actions[rows])
            loss = -decided.log_prob.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        curve.append(total / len(taught))
    return curve


def agreement(policy: Policy, pairs: Sequence[Pair]) -> float:
    """Share of the decision points with a choice at which the policy's likeliest action is the pair's."""
    taught = [pair for pair in pairs if not pair.sight.masks.forced]
    if not taught:
        return 1.0
    with torch.no_grad():
        found = policy(policy.collate([pair.sight for pair in taught])).actions
    same = (found == torch.tensor([pair.action for pair in taught])).all(1)
    return float(same.double().mean())
