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
    losses: tuple[float, ...] = ()
    """Training losses of the last steps (``graft.stabilize_window`` of them at most), oldest first; only for a strategy
    that ``needs_losses``."""
    gradient_norm: float | None = None
    """L2 norm of the gradient of the host's weights at the site, as the optimizer got it in this step (unscaled,
    clipped); only for a strategy that ``needs_gradients``, ``None`` where there was none."""


@dataclass(frozen=True)
class Move:
    """The next alpha, and why it was held (``None`` when it moved)."""

    alpha: float
    held_by: str | None = None


class Strategy(ABC):
    """Stateless; whatever it must remember it puts into ``context.memory``."""

    needs_losses: bool = False
    """Whether the context is to hold losses. Reading them waits for the device once a step."""
    needs_gradients: bool = False
    """Whether the context is to hold the gradient norm, which is then taken in every step of GRAFTING."""

    @abstractmethod
    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        """Alpha for the next step, in [0, 1]. What is not above the present alpha holds it: alpha never falls."""


STRATEGIES: Registry[Strategy] = Registry("strategy")


def checked(move: object, name: str) -> Move:
    """What the strategy ``name`` has returned, with alpha as a number of Python's own.

    Raises
    ------
    TypeError, ValueError
        It is no :class:`Move`, or its alpha does not lie in [0, 1].
    """
    if not isinstance(move, Move):
        raise TypeError(f"a strategy must return a Move, got {type(move).__name__} from {name}; say Move(alpha)")
    alpha = float(move.alpha)
    if not 0 <= alpha <= 1:  # NaN is refused as well
        raise ValueError(f"a strategy's alpha must lie in [0, 1], got {alpha} from {name}; clamp it there")
    return Move(alpha, move.held_by)
