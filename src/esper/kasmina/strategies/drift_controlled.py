"""``drift_controlled``: ramp on, but pause while the host's weights at the site drift.

    drift = ||w - ema|| / ||ema||,  ema = 0.9 ema + 0.1 w  each step

Above ``drift_threshold`` alpha is held, for at most ``pause_duration`` steps at a stretch.
"""

from __future__ import annotations

from esper.config import GraftConfig
from esper.kasmina.strategies.bounded_pause import hold_or_ramp
from esper.kasmina.strategies.strategy import STRATEGIES, GraftContext, Move, Strategy

_DECAY = 0.9


@STRATEGIES.register("drift_controlled")
class DriftControlled(Strategy):
    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        drift = self._drift(context)
        drifts = drift > config.drift_threshold
        obstacle = f"drift {drift:.3g} above {config.drift_threshold:g}" if drifts else None
        return hold_or_ramp(context, config, obstacle)

    @staticmethod
    def _drift(context: GraftContext) -> float:
        """Relative distance from the running average; 0 at the first look."""
        averages = context.memory.get("ema")
        if averages is None:
            context.memory["ema"] = [weight.detach().float().clone() for weight in context.weights]
            return 0.0
        gap, size = 0.0, 0.0
        for average, weight in zip(averages, context.weights, strict=True):
            current = weight.detach().float()
            gap += float((current - average).square().sum())
            size += float(average.square().sum())
            average.mul_(_DECAY).add_(current, alpha=1 - _DECAY)
        return (gap / size) ** 0.5 if size > 0 else 0.0
