"""Controllers against each other on the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.evidence.paired import paired_difference
from esper.learning.environment import HostEnvironment
from esper.protocol import Observation
from esper.tamiyo.actions import WAIT, Action, draw, nearest
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.registry import Controller, make_controller
from esper.tamiyo.sight import Sight

Player = Callable[[Sight, Observation], Action]
"""Plays one episode."""
MakePlayer = Callable[[int], Player]
"""Builds a player for a new episode, from its number."""


def never(number: int) -> Player:
    """Grows nothing."""
    return lambda sight, observation: WAIT


def uniform(number: int) -> Player:
    """Each factor uniformly among its valid values."""
    rng = np.random.default_rng([7, number])
    return lambda sight, observation: draw(sight.masks, rng)


def following(policy: Policy, *, sampled: bool = False) -> MakePlayer:
    """A policy: its likeliest action, or one drawn from it."""

    def make(number: int) -> Player:
        generator = torch.Generator().manual_seed(number) if sampled else None

        def play(sight: Sight, observation: Observation) -> Action:
            with torch.inference_mode():
                return Action(*policy(policy.collate([sight]), generator=generator).actions[0].tolist())

        return play

    return make


def obeying(make_one: Callable[[int], Controller]) -> MakePlayer:
    """Any controller, as nearly as actions can say what it asks for."""

    def make(number: int) -> Player:
        controller = make_one(number)
        return lambda sight, observation: nearest(controller.decide(observation), observation, sight.masks)

    return make


def named(name: str, config: TamiyoConfig | None = None) -> MakePlayer:
    """``never``, ``random``, or a registered controller with its default settings.

    Raises
    ------
    UnknownNameError
        No controller of that name.
    """
    if name in _SIMPLE:
        return _SIMPLE[name]
    settings = config or TamiyoConfig(first=0)
    make_controller(name, settings)  # an unknown name is an error before anything is played
    return obeying(lambda number: make_controller(name, settings, seed=number))


_SIMPLE: dict[str, MakePlayer] = {"never": never, "random": uniform}
SIMPLE_NAMES = tuple(_SIMPLE)


def play(environment: HostEnvironment, make: MakePlayer, num_episodes: int, *, seed: int) -> list[float]:
    """Returns of the first ``num_episodes`` episodes to begin, in the order in which they begin.

    With a fixed horizon that order, and every episode, follows from the seed alone: players can be paired.
    """
    environment.reset(seed)
    numbers = list(range(environment.num))
    players = [make(number) for number in numbers]
    earned: dict[int, float] = dict.fromkeys(numbers, 0.0)
    returns: dict[int, float] = {}
    following_number = environment.num
    while not all(number in returns for number in range(num_episodes)):
        pairs = zip(players, environment.look(), environment.observations(), strict=True)
        actions = [player(sight, observation) for player, sight, observation in pairs]
        stepped = environment.step(np.array(actions, dtype=np.int64))
        for row, number in enumerate(numbers):
            earned[number] += float(stepped.rewards[row])
            if stepped.terminated[row] or stepped.truncated[row]:
                returns[number] = earned.pop(number)
                numbers[row], following_number = following_number, following_number + 1
                players[row], earned[numbers[row]] = make(numbers[row]), 0.0
    return [returns[number] for number in range(num_episodes)]


@dataclass(frozen=True)
class Entry:
    """One contestant's returns, episode by episode."""

    name: str
    returns: list[float]


def contest(
    environment: HostEnvironment, players: dict[str, MakePlayer], num_episodes: int, *, seed: int
) -> list[Entry]:
    """Let every player play the same episodes.

    Raises
    ------
    ConfigError
        Fewer than two episodes: nothing could be said of them.
    """
    if num_episodes < 2:
        raise ConfigError(f"a contest takes at least 2 episodes, got {num_episodes}; use 200")
    return [Entry(name, play(environment, make, num_episodes, seed=seed)) for name, make in players.items()]


def summary(entries: Sequence[Entry], best: float | None) -> dict[str, Any]:
    """Means with 95% intervals, and paired differences: the first one minus each other."""
    first = entries[0]
    return {
        "episodes": len(first.returns),
        "best": best,
        "players": {entry.name: _interval(entry.returns) for entry in entries},
        f"{first.name}_minus": {
            entry.name: _interval([a - b for a, b in zip(first.returns, entry.returns, strict=True)])
            for entry in entries[1:]
        },
    }


def _interval(values: Sequence[float]) -> dict[str, float]:
    found = paired_difference(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}
