"""``fixed_ramp``: alpha rises from 0 to 1 over ``ramp_steps`` steps, linearly, along a cosine or a sigmoid."""

from __future__ import annotations

import math

from esper.config import GraftConfig
from esper.kasmina.strategies.strategy import STRATEGIES, GraftContext, Move, Strategy


def ramp(shape: str, progress: float) -> float:
    """Value of the ramp at ``progress`` in [0, 1]; 0 at 0 and exactly 1 at 1 for every shape."""
    progress = min(1.0, max(0.0, progress))
    if shape == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * progress)
    if shape == "sigmoid":
        low, high = 1 / (1 + math.exp(6)), 1 / (1 + math.exp(-6))
        return (1 / (1 + math.exp(6 - 12 * progress)) - low) / (high - low)
    return progress


@STRATEGIES.register("fixed_ramp")
class FixedRamp(Strategy):
    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        return Move(ramp(config.ramp, (context.ramped + 1) / config.ramp_steps))
