"""What came of a cohort, in the units that are compared: shares of the held-out loss, and of the model's FLOPs."""

from __future__ import annotations

import math

from esper.protocol import Lifecycle

TARGETS = ("efficiency", "gain", "kept")
"""Gain per cost, gain, and whether the cohort was kept."""

_BOUND = 3.0
"""Gain per cost is cut off here: a cohort that costs next to nothing must not outweigh all others."""
_LEAST_COST = 1e-3
"""Share of the model's FLOPs below which a cohort counts as costing that much."""


_UNIT = 0.05
_CUT = "training ended"
"""How the reason of a cohort begins that the end of the training took out."""


def gain_share(gain: float | None, held_out: float | None) -> float | None:
    """A gain as a share of the held-out loss, or ``None`` where that is unknown."""
    if gain is None or held_out is None or not (math.isfinite(gain) and math.isfinite(held_out)) or held_out == 0:
        return None
    return gain / abs(held_out)


def targets(
    state: Lifecycle, gain: float | None, cost: float | None, reason: str = ""
) -> tuple[float, float, float] | None:
    """Values by :data:`TARGETS`, or ``None`` where a cohort says nothing about worth.

    What was not kept has gained nothing, whatever was measured on the way. A cohort that a person or the end of the
    training took out tells nothing, nor does a kept one whose gain or cost is unknown.

    Parameters
    ----------
    gain:
        Of a kept cohort, as a share of the held-out loss.
    cost:
        Forward FLOPs it adds, as a share of the model's.
    reason:
        Why it ended.
    """
    if reason.startswith(_CUT):
        return None
    if state in (Lifecycle.CULLED, Lifecycle.ROLLED_BACK):
        return 0.0, 0.0, 0.0
    if state is not Lifecycle.FOSSILIZED or gain is None or cost is None:
        return None
    if not (math.isfinite(gain) and math.isfinite(cost)) or cost < 0:
        return None
    return max(-_BOUND, min(_BOUND, gain / max(cost, _LEAST_COST))), gain, 1.0


def compressed(value: float) -> float:
    """What the model is taught of a gain or a gain per cost: nearly linear below 0.05, logarithmic above.

    Most cohorts gain next to nothing and a few gain very much; a linear model of the plain numbers would tell of those
    few only. The order stays.
    """
    return math.copysign(math.log1p(abs(value) / _UNIT), value)
