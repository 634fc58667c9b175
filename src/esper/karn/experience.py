"""What the reports of a snapshot say: rows for the model, and how each design has done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper.karn.design import content_name
from esper.karn.report import FieldReport
from esper.karn.snapshot import Snapshot
from esper.worth import FEATURE_NAMES, TARGETS, LinearPosterior, compressed, encode, prior_precision

PRIOR_STRENGTH = 4.0
PRIOR_SHAPE, PRIOR_RATE = 2.0, 0.5
"""Noise of about 0.7, and weights of half that: chosen on 200 reports of small hosts, by what was predicted best of
hosts left out (docs/decisions/0017)."""

Floats = npt.NDArray[np.float64]


def rows(reports: Iterable[FieldReport]) -> tuple[Floats, Floats]:
    """``(N, D)`` features and ``(N, K)`` values of the reports that say something, in their order: the targets, gains
    compressed.

    A cohort over several sites is one row, the mean of its sites' by their shares of the parameters: its gain per cost
    is that mean of theirs, if gains add up.
    """
    features: list[Floats] = []
    values: list[tuple[float, ...]] = []
    for report in reports:
        if report.targets is None or not report.placements:
            continue
        features.append(sum((p.share * encode(p.place, p.choice) for p in report.placements), np.zeros(_NUM)))
        efficiency, gain, kept = report.targets
        values.append((compressed(efficiency), compressed(gain), kept))
    return np.array(features).reshape(-1, _NUM), np.array(values).reshape(-1, len(TARGETS))


_NUM = len(FEATURE_NAMES)


def posterior(reports: Iterable[FieldReport]) -> LinearPosterior:
    """What is known of worth after these reports."""
    known = LinearPosterior(
        prior_precision(PRIOR_STRENGTH), num_targets=len(TARGETS), shape=PRIOR_SHAPE, rate=PRIOR_RATE
    )
    known.update(*rows(reports))
    return known


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a design has done so far."""

    num: int
    """Reports that say something of its worth."""
    kept: int
    efficiency: float
    """Mean gain per cost, one report of zero added: few reports count for less."""
    cost: float
    """Mean share of the model's FLOPs that its cohorts added; its own part of them."""


def standings(snapshot: Snapshot) -> dict[str, Standing]:
    """By the names of designs; only those that were used."""
    known = {design.name for design in snapshot.designs}
    seen: dict[str, list[tuple[float, bool, float]]] = {}
    for report in snapshot.reports:
        told = report.targets
        if told is None:
            continue
        parts: dict[str, float] = {}
        for part in report.placements:
            name = part.design if part.design in known else content_name(part.place.kind, part.choice)
            parts[name] = parts.get(name, 0.0) + part.share
        for name, part_share in parts.items():
            cost = part_share * (report.added_flops_share or 0.0)
            seen.setdefault(name, []).append((told[0], report.kept, cost))
    return {
        name: Standing(
            num=len(told), kept=sum(kept for _, kept, _ in told),
            efficiency=sum(value for value, _, _ in told) / (len(told) + 1),
            cost=sum(cost for _, _, cost in told) / len(told),
        )
        for name, told in seen.items()
    }  # fmt: skip
