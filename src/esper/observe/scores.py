"""Arms compared: means over seeds with Student intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from esper.observe.history import RunHistory
from esper.protocol import ArmFinished

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; the normal's beyond the table.
_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL_QUANTILE = 1.960

ARM_LABELS = {
    "grown": "grown",
    "static_small": "small, no growth",
    "static_final": "final shape from scratch",
    "static_equal_flops": "same FLOPs",
    "random_growth": "random growth",
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval over seeds; the bounds are NaN with fewer than two seeds."""

    mean: float
    low: float
    high: float
    num: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def has_bounds(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True, slots=True)
class ArmScore:
    """One arm over all seeds that finished."""

    arm: str
    score_name: str
    score: Interval
    loss: Interval
    params: Interval
    flops: Interval
    seconds: Interval
    per_seed: dict[int, float]
    advantage: Interval | None
    """Main arm's score minus this one's, paired by seed; ``None`` for the main arm or without common seeds."""

    @property
    def label(self) -> str:
        return arm_label(self.arm)


def arm_label(arm: str) -> str:
    """A name for people; unknown arms keep theirs."""
    return ARM_LABELS.get(arm, arm)


def student_quantile(freedom: int) -> float:
    """The 97.5% quantile of Student's t for at least one degree of freedom; the normal's beyond 30."""
    return _T_QUANTILES[max(freedom, 1) - 1] if freedom <= len(_T_QUANTILES) else _NORMAL_QUANTILE


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student 95% interval of the finite values; NaN where there is nothing to say."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(finite) / len(finite)
    if len(finite) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in finite) / (len(finite) - 1)
    half = student_quantile(len(finite) - 1) * math.sqrt(variance / len(finite))
    return Interval(mean, mean - half, mean + half, len(finite))


def arm_scores(history: RunHistory) -> list[ArmScore]:
    """Arms with at least one finished seed, the main arm first, the others in the order they appeared."""
    finished = {
        arm: {seed: run.finished for seed, run in seeds.items() if run.finished is not None}
        for arm, seeds in history.arms.items()
    }
    main = history.main_arm
    arms = [arm for arm in finished if finished[arm]]
    arms.sort(key=lambda arm: arm != main)
    reference = finished.get(main, {}) if main is not None else {}
    return [_arm_score(arm, finished[arm], None if arm == main else reference) for arm in arms]


def _arm_score(arm: str, runs: dict[int, ArmFinished], reference: dict[int, ArmFinished] | None) -> ArmScore:
    ends = list(runs.values())
    advantage = None
    if reference is not None:
        common = [seed for seed in runs if seed in reference]
        if common:
            advantage = mean_interval([reference[seed].score - runs[seed].score for seed in common])
    return ArmScore(
        arm=arm,
        score_name=ends[-1].score_name,
        score=mean_interval([end.score for end in ends]),
        loss=mean_interval([end.loss for end in ends]),
        params=mean_interval([float(end.params) for end in ends]),
        flops=mean_interval([end.flops for end in ends]),
        seconds=mean_interval([end.seconds for end in ends]),
        per_seed={seed: end.score for seed, end in runs.items()},
        advantage=advantage,
    )
