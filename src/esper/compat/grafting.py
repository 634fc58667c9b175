"""Strategies in the plan's form: an object for each graft that is asked for the next alpha.

They run as :class:`~esper.kasmina.strategies.Strategy` of the one registry, under the names that ``GraftConfig`` and
commands use.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from esper.config import GraftConfig
from esper.errors import ConfigError
from esper.kasmina.strategies import STRATEGIES, GraftContext, Move, Strategy, checked
from esper.plugins import register_strategy

_logger = logging.getLogger("esper.compat")

GraftingConfig = GraftConfig
"""The settings of all strategies: :class:`esper.GraftConfig` itself."""


@dataclass(frozen=True, kw_only=True)
class GraftingContext:
    """What a strategy sees in one real step: the plan's view of :class:`~esper.kasmina.strategies.GraftContext`."""

    current_alpha: float
    ramp_rate: float
    """Rise of alpha in one step of the plain ramp: 1 / ``ramp_steps``."""
    model_weights: Tensor
    """``(P,)`` float32 copy of the host's weights at the site, end to end."""


class BaseGraftingStrategy(ABC):
    """One graft's strategy: made with the settings when the graft begins on a site, then asked once a real step."""

    def __init__(self, config: GraftingConfig) -> None:
        self.config = config

    @abstractmethod
    def update(self, context: GraftingContext) -> float:
        """Alpha for the next step, in [0, 1]. What is not above ``context.current_alpha`` holds it there."""


class _Adapted(Strategy):
    """Keeps the object of a graft in the graft's memory."""

    made_of: ClassVar[type[BaseGraftingStrategy]]

    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        strategy = context.memory.get("strategy")
        if strategy is None:
            strategy = context.memory["strategy"] = self.made_of(config)
        weights = [weight.detach().float().flatten() for weight in context.weights]
        alpha = float(
            strategy.update(
                GraftingContext(
                    current_alpha=context.alpha, ramp_rate=1 / config.ramp_steps, model_weights=torch.cat(weights)
                )
            )
        )
        name = self.made_of.__name__
        asked = checked(Move(alpha), f"{name}.update")
        return asked if alpha > context.alpha else Move(context.alpha, f"{name} waits")


class _Registered(Mapping[str, type]):
    """The classes behind the registered names, as they are now."""

    def __getitem__(self, name: str) -> type:
        cls = type(STRATEGIES[name])
        return cls.made_of if issubclass(cls, _Adapted) else cls

    def __iter__(self) -> Iterator[str]:
        return iter(STRATEGIES)

    def __len__(self) -> int:
        return sum(1 for _ in STRATEGIES)


C = TypeVar("C", bound="type[BaseGraftingStrategy] | type[Strategy]")


class GraftingStrategyRegistry:
    """Esper's registry of strategies under the plan's name."""

    strategies: ClassVar[Mapping[str, type]] = _Registered()
    """Every strategy's class by name, the built-in ones included; a live view."""

    @classmethod
    def register(cls, name: str) -> Callable[[C], C]:
        """Class decorator for a :class:`BaseGraftingStrategy` (or a :class:`~esper.plugins.Strategy`).

        As in the plan, whose own example takes the name of a built-in strategy, a :class:`BaseGraftingStrategy` takes
        the place of whatever had its name: from then on, everywhere in this process. Logger ``esper.compat`` says so.

        Raises
        ------
        ConfigError
            There is no name, the class is neither, or leaves out what it must define, or a
            :class:`~esper.plugins.Strategy` asks for a name that is taken.
        """
        file = register_strategy(name)

        def decorator(strategy: C) -> C:
            adapted = _adapted(strategy)
            if name in STRATEGIES and issubclass(adapted, _Adapted):
                _say_replaced(name, cls.strategies[name], strategy)
                STRATEGIES.replace(name, adapted)
            else:
                file(adapted)
            return strategy

        return decorator


def _say_replaced(name: str, old: type, new: type) -> None:
    if (old.__module__, old.__qualname__) != (new.__module__, new.__qualname__):  # not a notebook cell run twice
        _logger.warning("strategy %r is %s.%s from now on, no longer %s.%s", name, new.__module__, new.__qualname__,
                        old.__module__, old.__qualname__)  # fmt: skip


def _adapted(strategy: Any) -> type[Strategy]:
    if not (isinstance(strategy, type) and issubclass(strategy, BaseGraftingStrategy)):
        return strategy  # register_strategy says what is wrong with anything that is no Strategy
    if strategy.__abstractmethods__:
        raise ConfigError(f"a grafting strategy must define update(context), {strategy.__qualname__} leaves it out")
    names = {"made_of": strategy, "__module__": strategy.__module__, "__qualname__": strategy.__qualname__}
    return type(strategy.__name__, (_Adapted,), names)
