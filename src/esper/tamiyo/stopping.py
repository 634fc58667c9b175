"""When growth has stopped paying: a pure function of the cohorts that ended."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esper.protocol import Lifecycle, Verdict


def gain_per_cost(verdict: Verdict, held_out: float) -> float:
    """Return a kept cohort's gain, as a share of ``|held_out|`` (loss units), over the share of FLOPs it added.

    NaN where either is unknown or the cost is not positive.
    """
    cost = verdict.added_flops_share
    if not (math.isfinite(held_out) and held_out != 0 and math.isfinite(cost) and cost > 0):
        return math.nan
    return verdict.gain / abs(held_out) / cost


def reason_to_stop(verdicts: Sequence[Verdict], held_out: float, threshold: float, patience: int) -> str | None:
    """Return why growth should stop, or ``None`` to go on.

    Counts back from the latest cohort while cohorts failed: removed by a gate or the guard (CULLED, ROLLED_BACK), or
    kept with a gain per cost under ``threshold`` (an unknown one counts as under it). ``patience`` failures in a row
    stop growth. Cancelled cohorts say nothing about worth: they neither count nor interrupt the row.

    Parameters
    ----------
    verdicts:
        Oldest first; as many as a run tells (all that were kept, of the others the newest thousand).
    held_out:
        Held-out loss now, the unit of relative gains.
    threshold:
        Smallest acceptable :func:`gain_per_cost`.
    patience:
        Failures in a row before growth stops; at least 1.
    """
    rejected: list[Verdict] = []
    ratios: list[float] = []
    for verdict in reversed(verdicts):
        if verdict.state == Lifecycle.CANCELLED:
            continue
        if verdict.state != Lifecycle.FOSSILIZED:
            rejected.append(verdict)
            continue
        ratio = gain_per_cost(verdict, held_out)
        if ratio >= threshold:
            break
        ratios.append(ratio)
    num_failed = len(rejected) + len(ratios)
    if num_failed < patience:
        return None
    row = "1 cohort" if num_failed == 1 else f"{num_failed} cohorts in a row"
    if not rejected:
        return f"gain per cost below threshold: {_best(ratios)} < {threshold:.3g} for {row}"
    last = rejected[0].reason or "no reason given"
    if not ratios:
        return f"{row} rejected (last: {last})"
    return (
        f"{row} did not pay: {len(rejected)} rejected (last: {last}), "
        f"{len(ratios)} with gain per cost {_best(ratios)} < {threshold:.3g}"
    )


def _best(ratios: Sequence[float]) -> str:
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return f"{max(known):.2g}" if known else "unknown"
