"""Your own strategies, blueprints, starts and controllers: a class and a decorator, then a name like any other.

::

    import esper
    from esper.plugins import GraftContext, Move, Strategy

    @esper.register_strategy("in_halves")
    class InHalves(Strategy):
        def advance(self, context: GraftContext, config: esper.GraftConfig) -> Move:
            return Move(0.5 if context.alpha < 0.5 else 1.0)

    config = esper.Config(graft=esper.GraftConfig(strategy="in_halves"))

Strategies, blueprints and starts are instantiated once, without arguments, and keep no state of their own; a
controller is made for each Grower. Register before the Grower is built: it refuses names that it does not know and
lists those it does. A class that is defined anew under its own name (a notebook cell run twice) replaces the earlier
one; any other second use of a name raises :class:`~esper.errors.ConfigError`, and so does a class that leaves out what
its family asks for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from esper.errors import ConfigError
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS, Axes, Blueprint, Cost, Parts, Port, register_module
from esper.kasmina.capture import Rows
from esper.kasmina.gates import SANITY_KINDS
from esper.kasmina.geometry import Geometry
from esper.kasmina.registry import Registry
from esper.kasmina.starts import STARTS, HostUnits, Start, StartReport
from esper.kasmina.strategies import STRATEGIES, GraftContext, Move, Strategy
from esper.tamiyo import Controller, known_controllers, register_controller

__all__ = [
    "Axes",
    "Bank",
    "Blueprint",
    "Controller",
    "Cost",
    "Geometry",
    "GraftContext",
    "HostUnits",
    "Move",
    "Parts",
    "Port",
    "Rows",
    "Start",
    "StartReport",
    "Strategy",
    "known",
    "register_blueprint",
    "register_controller",
    "register_module",
    "register_start",
    "register_strategy",
]

B = TypeVar("B", bound=Blueprint)
S = TypeVar("S", bound=Start)
T = TypeVar("T", bound=Strategy)


def register_strategy(name: str) -> Callable[[type[T]], type[T]]:
    """Class decorator for a :class:`Strategy`; choose it with ``GraftConfig(strategy=name)`` or a ``SeedPlan``."""

    file = STRATEGIES.register(name)

    def decorator(cls: type[T]) -> type[T]:
        _check(cls, Strategy, name)
        file(cls)
        return cls

    return decorator


def register_start(name: str) -> Callable[[type[S]], type[S]]:
    """Class decorator for a :class:`Start`; choose it with ``FitConfig(start=name)`` or a ``SeedPlan``."""

    file = STARTS.register(name)

    def decorator(cls: type[S]) -> type[S]:
        _check(cls, Start, name, "needs_rows", "preserves_function", "sanity")
        if cls.sanity not in SANITY_KINDS:
            raise ConfigError(
                f"a start's sanity must be one of {', '.join(SANITY_KINDS)}, got {cls.sanity!r} in {cls.__qualname__}; "
                "use 'none' for one that fits nothing"
            )
        file(cls)
        return cls

    return decorator


def register_blueprint(name: str) -> Callable[[type[B]], type[B]]:
    """Class decorator for a :class:`Blueprint`; choose it in a ``SeedPlan``."""

    file = BLUEPRINTS.register(name)

    def decorator(cls: type[B]) -> type[B]:
        _check(cls, Blueprint, name, "kinds", "axes")
        file(cls)
        return cls

    return decorator


def known() -> dict[str, tuple[str, ...]]:
    """All registered names by family, sorted."""
    families: tuple[Registry[Strategy] | Registry[Start] | Registry[Blueprint], ...] = (STRATEGIES, STARTS, BLUEPRINTS)
    return {registry.family: tuple(registry) for registry in families} | {"controller": known_controllers()}


def _check(cls: object, base: type, name: str, *attributes: str) -> None:
    family = base.__name__.lower()
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"a {family} must be a subclass of esper.plugins.{base.__name__}, got {cls!r} for {name!r}")
    left_out = sorted(getattr(cls, "__abstractmethods__", ())) if inspect.isabstract(cls) else []
    left_out += [attribute for attribute in attributes if not hasattr(cls, attribute)]
    if left_out:
        raise ConfigError(
            f"a {family} must define all that esper.plugins.{base.__name__} asks for, {cls.__qualname__} leaves out "
            f"{', '.join(left_out)}; add them"
        )
