"""Summaries over paired seeds: means, intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from esper.evidence.paired import paired_difference
from esper.runs.arms import Trained


def summarise(results: dict[str, list[Trained]], lr_trials: dict[str, dict[float, float]]) -> dict[str, Any]:
    """What ``--json`` writes: arms with means and per-seed values, cohorts, why growth stopped, paired contrasts."""
    grown = results["grown"]
    arms = {arm: _arm(runs, lr_trials.get(arm, {})) for arm, runs in results.items()}
    keys = ("germinated", "accepted", "culled", "cancelled", "rolled_back")
    return {
        "arms": arms,
        "cohorts": {key: sum(run.cohorts.get(key, 0) for run in grown) for key in keys},
        "stopped_because": grown[0].stopped,
        "stopped_because_per_seed": [run.stopped for run in grown],
        "grown_minus": {arm: _contrast(grown, runs) for arm, runs in results.items() if arm != "grown"},
    }


def _arm(runs: Sequence[Trained], trials: dict[float, float]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "score": _mean([run.score for run in runs]),
        "loss": _mean([run.loss for run in runs]),
        "params": round(_mean([run.params for run in runs])),
        "flops": _mean([run.flops for run in runs]),
        "seconds": _mean([run.seconds for run in runs]),
        "lr": runs[0].cell.lr,
        "score_per_seed": [run.score for run in runs],
        "loss_per_seed": [run.loss for run in runs],
        "flops_per_seed": [run.flops for run in runs],
        "params_per_seed": [run.params for run in runs],
        "widths_per_seed": [list(run.widths) for run in runs],
        "score_interval": interval([run.score for run in runs]),
        "loss_interval": interval([run.loss for run in runs]),
        "lr_trials": {f"{lr:g}": loss for lr, loss in trials.items()},
    }
    if runs[0].flops_parts:
        parts = runs[0].flops_parts
        result["flops_parts"] = {part: _mean([run.flops_parts[part] for run in runs]) for part in parts}
    return result


def _contrast(grown: Sequence[Trained], other: Sequence[Trained]) -> dict[str, Any]:
    """Paired differences by seed, grown minus control: score (higher is better), loss (lower is better)."""
    pairs = list(zip(grown, other, strict=True))
    scores = [a.score - b.score for a, b in pairs]
    losses = [a.loss - b.loss for a, b in pairs]
    return {
        "score": _plain(_mean(scores)),
        "score_interval": interval(scores),
        "loss": _plain(_mean(losses)),
        "loss_interval": interval(losses),
        "flops_ratio": _mean([a.flops / b.flops for a, b in pairs]),
    }


def interval(values: Sequence[float]) -> list[float | None]:
    """95% Student interval of the mean; unknown (``None``) with one value."""
    result = paired_difference(values)
    return [_plain(result.low), _plain(result.high)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
