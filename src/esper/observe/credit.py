"""What was claimed of cohorts against what they turned out to be worth; pure functions of a run's events."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper.observe.history import Cohort, SeedRun
from esper.observe.scores import mean_interval, student_quantile
from esper.protocol import EffectScored


@dataclass(frozen=True, slots=True)
class Claim:
    """One accepted cohort: the gain measured when it was accepted, and the gain found otherwise (loss units)."""

    cohort: int
    source: str
    """``twin audit``, ``on/off audit`` or ``twin``: the strongest there is."""
    claimed: float
    found: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """A least-squares line with the 95% interval of its slope; NaN where there are too few points."""

    slope: float
    low: float
    high: float
    intercept: float
    num: int


@dataclass(frozen=True, slots=True)
class Effect:
    """How much more the held-out loss fell where cohorts were grafted than where they were withheld (Welch)."""

    gain: float
    low: float
    high: float
    num_grafted: int
    num_withheld: int


def claims(cohorts: Iterable[Cohort]) -> list[Claim]:
    """Accepted cohorts with something to compare with, oldest first."""
    found: list[Claim] = []
    for cohort in cohorts:
        accepted = next((j for j in cohort.judgements if j.stage == "evaluate" and j.accepted), None)
        claim = _strongest(cohort, accepted.gain) if accepted is not None else None
        if claim is not None and math.isfinite(claim.claimed) and math.isfinite(claim.found):
            found.append(claim)
    return found


def _strongest(cohort: Cohort, claimed: float) -> Claim | None:
    for audited in sorted(cohort.audits, key=lambda event: event.source != "twin"):
        name = "twin audit" if audited.source == "twin" else "on/off audit"
        return Claim(cohort.cohort, name, claimed, audited.gain, audited.gain_low, audited.gain_high)
    if cohort.twin is None:
        return None
    return Claim(
        cohort.cohort, "twin", claimed, cohort.twin.credit, cohort.twin.credit_low, cohort.twin.credit_high
    )  # fmt: skip


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """Ordinary least squares of ``ys`` on ``xs`` (same length), with Student's interval for the slope.

    A slope below 1 says that claims are larger than what is found, which noise in the claims alone brings about too.
    """
    num = len(xs)
    centre = math.fsum(xs) / num if num else 0.0
    spread = math.fsum((x - centre) ** 2 for x in xs)
    if num < 2 or spread == 0:
        return Line(math.nan, math.nan, math.nan, math.nan, num)
    height = math.fsum(ys) / num
    slope = math.fsum((x - centre) * (y - height) for x, y in zip(xs, ys, strict=True)) / spread
    intercept = height - slope * centre
    if num == 2:
        return Line(slope, math.nan, math.nan, intercept, num)
    left = math.fsum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    half = student_quantile(num - 2) * math.sqrt(left / (num - 2) / spread)
    return Line(slope, slope - half, slope + half, intercept, num)


def grafting_effect(effects: Iterable[EffectScored]) -> Effect | None:
    """Difference of the mean falls of the held-out loss, with Welch's 95% interval; ``None`` if nothing was drawn.

    The draw decides alone who is grafted, so the difference is an unbiased estimate of what grafting a ready cohort
    does to the held-out loss within the window.
    """
    falls: tuple[list[float], list[float]] = ([], [])
    for event in effects:
        falls[event.withheld].append(event.loss_before - event.loss_after)
    if not any(falls):
        return None
    grafted, withheld = (mean_interval(values) for values in falls)
    errors = [_squared_error(values) for values in falls]
    gain = grafted.mean - withheld.mean
    total = errors[0] + errors[1]
    if not total > 0:  # NaN with fewer than two of a kind
        return Effect(gain, math.nan, math.nan, grafted.num, withheld.num)
    parts = zip(errors, (grafted.num, withheld.num), strict=True)
    freedom = total**2 / sum(error**2 / (num - 1) for error, num in parts)
    half = student_quantile(int(freedom)) * math.sqrt(total)
    return Effect(gain, gain - half, gain + half, grafted.num, withheld.num)


def _squared_error(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return math.nan
    mean = math.fsum(finite) / len(finite)
    return math.fsum((value - mean) ** 2 for value in finite) / (len(finite) - 1) / len(finite)


def effects_of(runs: Iterable[SeedRun]) -> list[EffectScored]:
    """All windows of some runs."""
    return [cohort.effect for run in runs for cohort in run.cohorts.values() if cohort.effect is not None]
