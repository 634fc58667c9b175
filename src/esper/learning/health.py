"""What goes wrong with learners, looked for while they learn."""

from __future__ import annotations

import math
from collections.abc import Sequence

LEAST_EXPLAINED = 0.3
PATIENCE = 20
"""Updates after which a critic must foretell something, and a policy do something."""
_RECENT = 5
_ALWAYS = 0.99


def dead_critic(explained: Sequence[float]) -> str | None:
    """What to say of a critic by its explained variances so far, oldest first; ``None`` when it lives.

    Updates whose returns hardly varied (NaN) say nothing.
    """
    known = [value for value in explained if not math.isnan(value)]
    if len(known) < PATIENCE or max(known[-_RECENT:]) >= LEAST_EXPLAINED:
        return None
    return (
        f"the critic is dead: after {len(known)} updates it explains {max(known[-_RECENT:]):.2f} of the returns' "
        f"variance at best, at least {LEAST_EXPLAINED} is needed; lower the learning rate, give it more steps an "
        "update, or learn from branches instead"
    )


def wait_collapse(waits: Sequence[float], returns: Sequence[float]) -> str | None:
    """What to say of a policy that does nothing any more, by its share of waits and its mean return an update."""
    if len(waits) < PATIENCE or min(waits[-_RECENT:]) < _ALWAYS:
        return None
    return (
        f"the policy only waits: {min(waits[-_RECENT:]):.0%} of its decisions in the last {_RECENT} updates, at a mean "
        f"return of {returns[-1]:.3g}; raise the floor under the entropy of 'operation', or start from a clone"
    )
