"""What a controller is, and the names they go by."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeVar, runtime_checkable

from esper.config import TamiyoConfig
from esper.errors import ConfigError, UnknownNameError
from esper.protocol import Command, Observation


class Controller(Protocol):
    """Maps an observation to commands, once a decision point.

    A controller is deterministic given its configuration, its state and the observation. Commands are requests: a gate
    may refuse any of them, and a refusal shows only in what the next observation holds.
    """

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return the commands for this decision point, in the order they should be applied; none is ordinary."""
        ...

    def state(self) -> dict[str, Any]:
        """Return everything that :meth:`load` needs, as JSON-ready plain values."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned; raises ``ConfigError`` and changes nothing if it does not fit."""
        ...


@runtime_checkable
class Noting(Protocol):
    """A controller that has something to tell the user now and then, such as why another one decides in its place."""

    def notes(self) -> tuple[str, ...]:
        """Return what is to be told since the last call, oldest first; each text is told once a run."""
        ...


@runtime_checkable
class Waiting(Protocol):
    """A controller that can tell beforehand when it will do nothing, so that nothing has to be observed for it."""

    def waits(self, step: int, *, total_steps: int | None, num_ended: int) -> bool:
        """Return whether ``decide`` would return nothing at ``step`` and remember nothing, whatever it is shown, if
        nothing is alive then and ``num_ended`` cohorts have ended; it follows from its configuration and state."""
        ...


def waits_of(controller: Controller) -> Callable[..., bool] | None:
    """``waits`` of a controller, or ``None`` if it has none, or only that of a class above the one that defines
    ``decide``: what a subclass decides in its own way, its parent cannot foretell."""
    if "decide" in getattr(controller, "__dict__", {}) or not _foretells(type(controller)):
        return None
    return getattr(controller, "waits", None)


@cache
def _foretells(kind: type) -> bool:
    return next(("waits" in vars(base) for base in kind.__mro__ if {"waits", "decide"} & vars(base).keys()), False)


class ControllerFactory(Protocol):
    """Builds a controller; usually its class."""

    def __call__(self, config: TamiyoConfig, *, seed: int) -> Controller: ...


_FACTORIES: dict[str, ControllerFactory] = {}

F = TypeVar("F", bound=ControllerFactory)


def register_controller(name: str) -> Callable[[F], F]:
    """Class decorator: file a controller under ``name``; a taken name raises ``ConfigError``.

    A class (or function) that is defined anew, as by a notebook cell run twice, takes the place of the old one.
    """
    if not isinstance(name, str) or not name:  # pyright: ignore[reportUnnecessaryIsInstance]  # used without a name
        raise ConfigError(f"a controller is registered under a name, got {name!r}; write the decorator with ('name')")

    def decorator(factory: F) -> F:
        if name in _FACTORIES and not _is_redefined(_FACTORIES[name], factory):
            raise ConfigError(f"controller names must be unique, got {name!r} twice; choose another name")
        _FACTORIES[name] = factory
        return factory

    return decorator


def _is_redefined(old: ControllerFactory, new: ControllerFactory) -> bool:
    places = {(getattr(item, "__module__", None), getattr(item, "__qualname__", item)) for item in (old, new)}
    return old is not new and len(places) == 1


def known_controllers() -> tuple[str, ...]:
    """Return all registered names, sorted."""
    return tuple(sorted(_FACTORIES))


def make_controller(name: str, config: TamiyoConfig, *, seed: int = 0) -> Controller:
    """Build the controller called ``name``; ``seed`` starts its own generator, if it has one.

    Raises
    ------
    UnknownNameError
        No controller of that name; the message lists the known and the near ones.
    """
    if name not in _FACTORIES:
        near = difflib.get_close_matches(name, _FACTORIES, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UnknownNameError(f"no controller is called {name!r}; {hint}known: {', '.join(known_controllers())}")
    return _FACTORIES[name](config, seed=seed)
