"""Controllers against each other on the same episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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

Decide = Callable[[Sight, Observation], Action]
"""Plays one episode."""


class Player(Protocol):
    """Plays any number of episodes side by side."""

    def begin(self, row: int, number: int) -> None:
        """The episode ``number`` begins in place ``row``."""
        ...

    def act(self, sights: Sequence[Sight], observations: Sequence[Observation]) -> list[Action]:
        """One action for each place."""
        ...


class EachAlone:
    """A player that knows how to play one episode.

    Parameters
    ----------
    make:
        Builds what plays an episode, from its number.
    """

    def __init__(self, make: Callable[[int], Decide]) -> None:
        self._make = make
        self._places: dict[int, Decide] = {}

    def begin(self, row: int, number: int) -> None:
        """Somebody new plays there."""
        self._places[row] = self._make(number)

    def act(self, sights: Sequence[Sight], observations: Sequence[Observation]) -> list[Action]:
        """Each looks for itself."""
        pairs = enumerate(zip(sights, observations, strict=True))
        return [self._places[row](sight, observation) for row, (sight, observation) in pairs]


class Following:
    """A policy: its likeliest action, or one drawn from it."""

    def __init__(self, policy: Policy, *, sampled: bool = False) -> None:
        self._policy = policy
        self._generator = torch.Generator().manual_seed(0) if sampled else None

    def begin(self, row: int, number: int) -> None:
        """A policy remembers nothing."""

    def act(self, sights: Sequence[Sight], observations: Sequence[Observation]) -> list[Action]:
        """All at once."""
        with torch.inference_mode():
            found = self._policy(self._policy.collate(sights), generator=self._generator)
        return [Action(*row) for row in found.actions.tolist()]


def never() -> Player:
    """Grows nothing."""
    return EachAlone(lambda number: lambda sight, observation: WAIT)


def uniform() -> Player:
    """Each factor uniformly among its valid values."""

    def make(number: int) -> Decide:
        rng = np.random.default_rng([7, number])
        return lambda sight, observation: draw(sight.masks, rng)

    return EachAlone(make)


def obeying(make: Callable[[int], Controller]) -> Player:
    """Any controller, as nearly as actions can say what it asks for; ``make`` builds one for an episode."""

    def make_one(number: int) -> Decide:
        controller = make(number)
        return lambda sight, observation: nearest(controller.decide(observation), observation, sight.masks)

    return EachAlone(make_one)


def named(name: str, config: TamiyoConfig | None = None) -> Player:
    """``never``, ``random``, or a registered controller with its default settings (from the first step on).

    Raises
    ------
    UnknownNameError
        No controller of that name.
    """
    if name in _SIMPLE:
        return _SIMPLE[name]()
    settings = config or TamiyoConfig(first=0)
    make_controller(name, settings)  # an unknown name is an error before anything is played
    return obeying(lambda number: make_controller(name, settings, seed=number))


_SIMPLE: dict[str, Callable[[], Player]] = {"never": never, "random": uniform}


def play(environment: HostEnvironment, player: Player, num_episodes: int, *, seed: int) -> list[float]:
    """Returns of the first ``num_episodes`` episodes to begin, in the order in which they begin.

    With a fixed horizon that order, and every episode, follows from the seed alone: players can be paired.
    """
    environment.reset(seed)
    numbers = list(range(environment.num))
    for row in numbers:
        player.begin(row, row)
    earned: dict[int, float] = dict.fromkeys(numbers, 0.0)
    returns: dict[int, float] = {}
    upcoming = environment.num
    while not all(number in returns for number in range(num_episodes)):
        actions = player.act(environment.look(), environment.observations())
        stepped = environment.step(np.array(actions, dtype=np.int64))
        for row, number in enumerate(numbers):
            earned[number] += float(stepped.rewards[row])
            if stepped.terminated[row] or stepped.truncated[row]:
                returns[number] = earned.pop(number)
                numbers[row], earned[upcoming] = upcoming, 0.0
                player.begin(row, upcoming)
                upcoming += 1
    return [returns[number] for number in range(num_episodes)]


@dataclass(frozen=True)
class Entry:
    """One contestant's returns, episode by episode."""

    name: str
    returns: list[float]


def contest(environment: HostEnvironment, players: dict[str, Player], num_episodes: int, *, seed: int) -> list[Entry]:
    """Let every player play the same episodes.

    Raises
    ------
    ConfigError
        Fewer than two episodes: nothing could be said of them.
    """
    if num_episodes < 2:
        raise ConfigError(f"a contest takes at least 2 episodes, got {num_episodes}; use 200")
    return [Entry(name, play(environment, player, num_episodes, seed=seed)) for name, player in players.items()]


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
