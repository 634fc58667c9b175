"""Strategies of selection: each gives every candidate a number, and the largest is proposed.

A strategy is a function and a registration. What it sees are the candidates' features and what is known of worth; all
randomness comes from the generator it is given.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError, UnknownNameError
from esper.worth import TARGETS, LinearPosterior

Floats = npt.NDArray[np.float64]
_EFFICIENCY, _GAIN, _KEPT = (TARGETS.index(name) for name in ("efficiency", "gain", "kept"))


@dataclass(frozen=True)
class Candidates:
    """What there is to choose from at one place."""

    features: Floats
    """``(N, D)``."""
    known: LinearPosterior
    draw: Floats
    """``(D, K)``: one draw of the weights, the same for all places of a decision."""

    @property
    def drawn(self) -> Floats:
        """``(N, K)``: worth under the draw (Thompson sampling)."""
        return self.features @ self.draw

    @property
    def predicted(self) -> tuple[Floats, Floats]:
        """Mean and deviation, ``(N, K)`` each."""
        return self.known.predict(self.features)


Strategy = Callable[[Candidates], Floats]
_STRATEGIES: dict[str, Strategy] = {}


def selection(name: str) -> Callable[[Strategy], Strategy]:
    """Decorator: file a strategy under ``name``; a taken name raises ``ConfigError``."""

    def decorator(strategy: Strategy) -> Strategy:
        if name in _STRATEGIES:
            raise ConfigError(f"names of selections must be unique, got {name!r} twice; choose another")
        _STRATEGIES[name] = strategy
        return strategy

    return decorator


def selections() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(_STRATEGIES))


def find_selection(name: str) -> Strategy:
    """The strategy called ``name``.

    Raises
    ------
    UnknownNameError
        There is none; near and known names are told.
    """
    if name not in _STRATEGIES:
        near = difflib.get_close_matches(name, _STRATEGIES, n=2)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UnknownNameError(f"no selection is called {name!r}; {hint}known: {', '.join(selections())}")
    return _STRATEGIES[name]


@selection("performance")
def performance(candidates: Candidates) -> Floats:
    """The largest gain, whatever it costs, by a draw."""
    return candidates.drawn[:, _GAIN]


@selection("efficiency")
def efficiency(candidates: Candidates) -> Floats:
    """The largest gain per cost, by a draw."""
    return candidates.drawn[:, _EFFICIENCY]


@selection("stability")
def stability(candidates: Candidates) -> Floats:
    """What is most likely kept, as far as is known; nothing is tried out."""
    return candidates.predicted[0][:, _KEPT]


@selection("risk")
def risk(candidates: Candidates) -> Floats:
    """Gain per cost that can be counted on: one deviation below what is expected."""
    mean, deviation = candidates.predicted
    return mean[:, _EFFICIENCY] - deviation[:, _EFFICIENCY]


@selection("novelty")
def novelty(candidates: Candidates) -> Floats:
    """What is known least."""
    return candidates.predicted[1][:, _EFFICIENCY]


@selection("hybrid")
def hybrid(candidates: Candidates) -> Floats:
    """Mean rank by gain, gain per cost and acceptance, all by one draw."""
    drawn = candidates.drawn
    return sum((_ranks(drawn[:, column]) for column in (_EFFICIENCY, _GAIN, _KEPT)), np.zeros(len(drawn)))


def _ranks(values: Floats) -> Floats:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64)
