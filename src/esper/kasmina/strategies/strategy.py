"""Grafting strategies: how alpha moves. Alpha itself is explicit state of the seed, so a pause simply holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esper.config import GraftConfig
from esper.kasmina.registry import Registry


@dataclass(frozen=True, kw_only=True)
class GraftContext:
    """What a strategy may look at in one real step.

    ``alpha`` now; ``ramped`` steps in which alpha has moved so far; ``weights`` the host's weights at the site.
    """

    alpha: float
    ramped: int
    weights: tuple[Tensor, ...]
    memory: dict[str, Any]
    """The strategy's own state for this seed group, kept by the caller; starts empty."""


@dataclass(frozen=True)
class Move:
    """The next alpha, and why it was held (``None`` when it moved)."""

    alpha: float
    held_by: str | None = None


class Strategy(ABC):
    """Stateless; whatever it must remember it puts into ``context.memory``."""

    @abstractmethod
    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        """Alpha for the next step, in [0, 1]."""


STRATEGIES: Registry[Strategy] = Registry("strategy")
