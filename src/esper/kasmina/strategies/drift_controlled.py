"""``drift_controlled``: ramp on, but pause while the host's weights at the site drift.

    drift = ||w - ema|| / ||ema||,  ema = 0.9 ema + 0.1 w  each step

Above ``drift_threshold`` alpha is held, for at most ``pause_duration`` steps at a stretch (a host that never settles
would otherwise hold the graft for ever; the next step then moves once).
"""

from __future__ import annotations

from esper.config import GraftConfig
from esper.kasmina.strategies.fixed_ramp import ramp
from esper.kasmina.strategies.strategy import STRATEGIES, GraftContext, Move, Strategy

_DECAY = 0.9


@STRATEGIES.register("drift_controlled")
class DriftControlled(Strategy):
    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        drift = self._drift(context)
        paused = int(context.memory.get("paused", 0))
        if drift > config.drift_threshold and paused < config.pause_duration:
            context.memory["paused"] = paused + 1
            return Move(context.alpha, f"drift {drift:.3g} above {config.drift_threshold:g}")
        context.memory["paused"] = 0
        return Move(ramp(config.ramp, (context.ramped + 1) / config.ramp_steps))

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
