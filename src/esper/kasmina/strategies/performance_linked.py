"""``performance_linked``: ramp on only while the training loss with the branch is not worse than it was before.

The signal is the training loss given to ``grower.step``, read in every real step: it costs nothing and answers within
the ramp (held-out losses come every ``held_out_every`` steps, a whole ramp apart).

    before = level of the least-squares line through the losses before the graft, at its last step
    after  = mean of the last ``performance_window`` losses since
    worse:   after - before > performance_band * standard error of that difference

The line keeps a falling loss from raising the bar, and nothing is extrapolated beyond its last step: a host that
improves faster than the branch harms is not held (the judgement on held-out data is there for that). The standard error
takes the losses' scatter about the line for their noise. Worse, not finite, or not yet known, alpha is held, for at
most ``pause_duration`` steps at a stretch.
"""

from __future__ import annotations

import math

import numpy as np

from esper.config import GraftConfig
from esper.kasmina.strategies.bounded_pause import hold_or_ramp
from esper.kasmina.strategies.strategy import STRATEGIES, GraftContext, Move, Strategy

MIN_BEFORE = 8
"""Fewest losses from which level and scatter are read; with fewer the strategy waits, at the alpha there is."""
_ROUNDING = 1e-6
"""Share of the level below which a rise of a loss without any scatter is float32 rounding."""


@STRATEGIES.register("performance_linked")
class PerformanceLinked(Strategy):
    needs_losses = True

    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        return hold_or_ramp(context, config, self._obstacle(context, config))

    @staticmethod
    def _obstacle(context: GraftContext, config: GraftConfig) -> str | None:
        latest = context.losses[-1] if context.losses else math.nan
        before: list[float] | None = context.memory.get("before")
        if before is None:  # the first look: at alpha 0, unless a command has put this strategy in charge later
            before = context.memory["before"] = [loss for loss in context.losses if math.isfinite(loss)]
            enough = len(before) >= MIN_BEFORE
        elif not math.isfinite(latest):
            return f"training loss {latest}"
        elif len(before) < MIN_BEFORE:
            before.append(latest)
            enough = len(before) >= MIN_BEFORE
        else:
            after: list[float] = context.memory.setdefault("after", [])
            after.append(latest)
            del after[: -config.performance_window]
            return _worse(before, after, config.performance_band)
        return None if enough else f"{len(before)} losses before the graft, {MIN_BEFORE} are needed"


def _worse(before: list[float], after: list[float], band: float) -> str | None:
    level, error, scatter = _level(before)
    rise = float(np.mean(after)) - level
    allowed = max(band * math.hypot(error, scatter / math.sqrt(len(after))), _ROUNDING * abs(level))
    if rise <= allowed:
        return None
    return f"training loss {rise:.3g} above {level:.4g}, more than {allowed:.3g}"


def _level(losses: list[float]) -> tuple[float, float, float]:
    """Least-squares line at the last loss: its value, the standard error of that, and the scatter about the line."""
    values = np.asarray(losses)
    time = np.arange(len(values)) - (len(values) - 1) / 2
    spread = float(time @ time)
    slope = float(time @ values) / spread
    residual = values - values.mean() - slope * time
    scatter = math.sqrt(float(residual @ residual) / (len(values) - 2))
    error = scatter * math.sqrt(1 / len(values) + float(time[-1]) ** 2 / spread)
    return float(values.mean() + slope * time[-1]), error, scatter
