"""``grad_norm_gated``: ramp on only while the gradient at the site has about its usual size.

The signal is the L2 norm of the gradient of the host's weights at the site as the optimizer gets it (unscaled, clipped,
accumulated), taken in every real step of GRAFTING.

    low <= norm / median of the last ``grad_norm_window`` norms before it <= high,   (low, high) = ``grad_norm_band``

The first norm has nothing to be compared with and passes. Norms outside the band enter the median as well, so that a
new regime becomes the usual one; one that is missing or not finite does not. Outside the band alpha is held, for at
most ``pause_duration`` steps at a stretch.
"""

from __future__ import annotations

import math
import statistics

from esper.config import GraftConfig
from esper.kasmina.strategies.bounded_pause import hold_or_ramp
from esper.kasmina.strategies.strategy import STRATEGIES, GraftContext, Move, Strategy


@STRATEGIES.register("grad_norm_gated")
class GradNormGated(Strategy):
    needs_gradients = True

    def advance(self, context: GraftContext, config: GraftConfig) -> Move:
        return hold_or_ramp(context, config, self._obstacle(context, config))

    @staticmethod
    def _obstacle(context: GraftContext, config: GraftConfig) -> str | None:
        norm = context.gradient_norm
        if norm is None or not math.isfinite(norm):
            return "no gradient at the site" if norm is None else f"gradient norm {norm}"
        norms: list[float] = context.memory.setdefault("norms", [])
        usual = statistics.median(norms) if norms else norm
        norms.append(norm)
        del norms[: -config.grad_norm_window]
        low, high = config.grad_norm_band
        if low * usual <= norm <= high * usual:
            return None
        return f"gradient norm {norm:.3g} outside {low * usual:.3g} to {high * usual:.3g}"
