"""What a policy learns in: many episodes side by side, and the names such environments go by."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError, UnknownNameError
from esper.protocol import Observation
from esper.tamiyo.actions import Scope
from esper.tamiyo.sight import Sight

X = TypeVar("X")
"""What an actor decides on: a :class:`~esper.tamiyo.sight.Sight`, or whatever another environment shows."""
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stepped(Generic[X]):
    """What became of one action in each of N episodes.

    Attributes
    ----------
    rewards:
        ``(N,)`` float64.
    terminated, truncated:
        ``(N,)`` bool: the episode has come to its end (nothing follows), or was only cut short.
    last:
        By episode, what was to be seen when it was cut short: its value stands for the rest.
    """

    rewards: Floats
    terminated: Bools
    truncated: Bools
    last: Mapping[int, X] = field(default_factory=dict[int, X])


class VectorEnvironment(Protocol[X]):
    """N episodes side by side; one that has ended begins anew at once.

    Everything that happens follows from the seed and the actions.
    """

    @property
    def num(self) -> int:
        """N."""
        ...

    def reset(self, seed: int) -> None:
        """Begin all episodes anew, with a random stream that starts from ``seed``."""
        ...

    def look(self) -> list[X]:
        """What is to be seen now, one an episode; looking twice shows the same."""
        ...

    def step(self, actions: Ints) -> Stepped[X]:
        """Act once in each episode; ``actions (N, H)``."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`load` needs, as plain values and arrays."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on exactly from what :meth:`state` returned."""
        ...


class HostEnvironment(VectorEnvironment[Sight], Protocol):
    """Episodes that are training runs of hosts which can grow."""

    @property
    def scope(self) -> Scope:
        """What may be done in it."""
        ...

    @property
    def families(self) -> tuple[str, ...]:
        """Kinds of hosts in it."""
        ...

    @property
    def best(self) -> float | None:
        """The mean return of the best possible policy, where it is known."""
        ...

    def observations(self) -> list[Observation]:
        """The same look, as any controller sees it."""
        ...


class EnvironmentFactory(Protocol):
    """Builds an environment; usually its class."""

    def __call__(self, num: int) -> HostEnvironment: ...


_FAMILIES = (
    "teacher", "spirals", "tabular", "deep", "flat", "checkers", "waves", "shells", "textures", "grammar", "planted",
    "null", "teacher_long", "spirals_long", "tabular_long", "checkers_long", "waves_long", "shells_long",
    "teacher_1000", "spirals_1000", "tabular_1000", "teacher_5000", "spirals_5000", "tabular_5000",
)  # fmt: skip
_HOSTS = ("", *(f"/{family}" for family in _FAMILIES))
_HOMES = {
    "planted": "esper.learning.planted",
    **{f"greenhouse{family}": "esper.greenhouse.field" for family in _HOSTS},
}
"""Modules that register an environment of that name, imported when it is first asked for."""
_PLAYED_ONLY = "greenhouse/"
"""Names that begin so draw tasks of evaluation."""
_FACTORIES: dict[str, EnvironmentFactory] = {}

F = TypeVar("F", bound=EnvironmentFactory)


def register_environment(name: str) -> Callable[[F], F]:
    """Class decorator: file an environment under ``name``; a taken name raises ``ConfigError``."""

    def decorator(factory: F) -> F:
        known = _FACTORIES.get(name)
        if known is not None and getattr(known, "__qualname__", known) != getattr(factory, "__qualname__", factory):
            raise ConfigError(f"environment names must be unique, got {name!r} twice; choose another name")
        _FACTORIES[name] = factory
        return factory

    return decorator


def known_environments() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted({*_HOMES, *_FACTORIES}))


def is_played_only(name: str) -> bool:
    """Whether the environment called ``name`` draws tasks of evaluation, which nothing may be trained on."""
    return name.startswith(_PLAYED_ONLY)


def find_environment(name: str) -> EnvironmentFactory:
    """What builds the environment called ``name``.

    Raises
    ------
    UnknownNameError
        No environment of that name; the message lists the known and the near ones.
    """
    if name not in _FACTORIES and name in _HOMES:
        importlib.import_module(_HOMES[name])
    if name not in _FACTORIES:
        known = known_environments()
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UnknownNameError(f"no environment is called {name!r}; {hint}known: {', '.join(known)}")
    return _FACTORIES[name]


def make_environment(name: str, num: int) -> HostEnvironment:
    """``num`` episodes side by side of the environment called ``name``; :meth:`reset` it before use.

    Raises
    ------
    UnknownNameError
        No environment of that name; the message lists the known and the near ones.
    """
    factory = find_environment(name)
    if num < 1:
        raise ConfigError(f"an environment has at least one episode at a time, got {num}; use 16")
    return factory(num)
