"""The heuristic controller: grow evenly, one cohort at a time, and stop when it no longer pays.

Even allocation over all spans is the rule because it was measured to be better than following raw gradient energy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.protocol import Command, Germinate, Lifecycle, Observation, SeedPlan, Stop
from esper.tamiyo.allocation import (
    Ints,
    UnitCosts,
    affordable_share,
    asked_widths,
    column,
    fit_widths,
    growth_for,
    room,
    unit_costs,
)
from esper.tamiyo.exploration import STEADY, Variation, draw_variation, pressing_chunks
from esper.tamiyo.registry import register_controller
from esper.tamiyo.stopping import reason_to_stop

_MAX_REFUSALS = 3
"""Germinations in a row that came to nothing before growth stops."""
_MIN_SHARE = 0.1
"""After the first cohort, a smaller share of the asked size than this is not worth another one."""

_FIRST = 100
"""Steps before the first germination where neither the configuration nor the length of the run says."""
_EARLIEST, _LATEST, _STEPS_LEFT = 0.1, 0.4, 700
"""Else as late as leaves new units so many steps to learn, between these shares of the run (decision 0024) ..."""
_LATEST_STEP = 2000
"""... and no later than 40% of the longest run that was measured."""
_GROWTH, _MOST_GROWTH, _SHARE = 0.5, 4.0, 0.5
"""Times the width, where the configuration states no growth: half, or where that adds less than this share of the
host's FLOPs so much as does, up to four times (decision 0025)."""
_LAST_FIRST_SHARE = 0.6
"""As long as nothing was kept growth is tried until here: so that a first cohort may begin late."""

_STATE_KEYS = ("germinations", "cohorts_when_asked", "refusals", "asked_at")


@dataclass(frozen=True, kw_only=True)
class Temper:
    """How a temper changes what the configuration states."""

    growth: float
    threshold: float
    extra_patience: int
    most_patience: int | None = None
    explores: bool = False


class _Crowd(NamedTuple):
    """How many seeds share a site's units, and which share of them is grafted."""

    seeds: int
    keep_share: float

    def of(self, width: int) -> tuple[int, int | None]:
        """Seeds for ``width`` units, and how many of them to keep (``None``: all)."""
        seeds = min(self.seeds, width)
        keep = max(1, math.ceil(self.keep_share * seeds))
        return seeds, keep if keep < seeds else None


TEMPERS = {
    "conservative": Temper(growth=0.5, threshold=2.0, extra_patience=0, most_patience=1),
    "balanced": Temper(growth=1.0, threshold=1.0, extra_patience=0),
    "aggressive": Temper(growth=1.5, threshold=0.5, extra_patience=1),
    "exploratory": Temper(growth=1.0, threshold=1.0, extra_patience=0, explores=True),
}


@register_controller("heuristic")
class HeuristicController:
    """Even growth with a stopping rule.

    At each decision point, in this order:

    1. Stop when ``patience`` cohorts in a row were rejected or gained too little for their cost
       (:func:`esper.tamiyo.stopping.reason_to_stop`), or when ``last_share`` of the planned steps is over (0.6 as long
       as nothing was kept). Without ``total_steps`` only the verdicts and the budget end growth.
    2. Wait before ``first``, for ``spacing`` steps after the last germination, while a cohort is anywhere between
       GERMINATED and EVALUATING, and while the held-out loss that verdicts are measured by, or the model's present
       cost under a ceiling, is unknown.
    3. Germinate one cohort over all eligible spans. Layers get low-rank branches when no span is eligible and no
       cohort is alive (spans are then absent, full or under embargo: something else is tried meanwhile).
       Spans ask for ``growth`` times the host's width. Where none is stated and the length of the run is known, for
       what adds half of the host's FLOPs, between half and four times the width, and of that for no more than a span
       can use at once, but at least half (decision 0025).
    4. Widths are trimmed evenly to the budget; when nothing worthwhile fits, stop.

    A germination that shows up neither alive nor ended by the next decision was refused by a gate. The next one asks
    for half as much; three refusals in a row stop growth.

    The exploratory temper draws size, start, strategy, a subset of sites and now and then the pressing chunks alone
    from ``(seed, number of the germination)``.

    Parameters
    ----------
    config:
        Temper, growth, timing and thresholds.
    seed:
        Starts the exploratory temper's own generator.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int = 0) -> None:
        temper = TEMPERS[config.temper]
        self._patience, self._temper = config.patience, temper
        self.growth = (_GROWTH if config.growth is None else config.growth) * temper.growth
        self._is_stated = config.growth is not None
        self.threshold = config.min_gain_per_cost * temper.threshold
        self._first, self._last_share = config.first, config.last_share
        self._spacing, self._compound = config.spacing, config.compound
        self._asked_at: int | None = None
        self._crowd = _Crowd(config.seeds_per_site, config.keep_share)
        self._explores = temper.explores
        self._seed = seed
        self._germinations = 0
        self._cohorts_when_asked: int | None = None
        self._refusals = 0

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return nothing, one ``Germinate`` or one ``Stop``."""
        if observation.stopped is not None:
            return ()
        self._note_refusal(observation)
        reason = self._reason_to_stop(observation)
        if reason is not None:
            return (Stop(reason=reason),)
        if not self._may_germinate(observation):
            return ()
        rows = self._candidates(observation)
        return self._germinate(observation, rows) if rows.size else ()

    def waits(self, step: int, *, total_steps: int | None, num_ended: int) -> bool:
        """Return whether nothing has been tried yet and ``first`` is still to come."""
        untried = self._asked_at is None and num_ended == 0
        return untried and step < self._first_step(total_steps) and not self._is_late(step, total_steps, kept=False)

    def patience(self, total_steps: int | None) -> int:
        """Failures in a row that end growth."""
        usual = (2 if total_steps is None else 1) if self._patience is None else self._patience
        patience, most = usual + self._temper.extra_patience, self._temper.most_patience
        return patience if most is None else min(patience, most)

    def state(self) -> dict[str, Any]:
        """Return counters as plain values."""
        return {
            "germinations": self._germinations,
            "cohorts_when_asked": self._cohorts_when_asked,
            "refusals": self._refusals,
            "asked_at": self._asked_at,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`; raises ``ConfigError`` if keys are missing or unknown."""
        if set(state) != set(_STATE_KEYS):
            raise ConfigError(
                f"a heuristic controller's state must have the keys {sorted(_STATE_KEYS)}, got {sorted(state)}; "
                "load it into the controller that saved it"
            )
        self._germinations = state["germinations"]
        self._cohorts_when_asked = state["cohorts_when_asked"]
        self._refusals = state["refusals"]
        self._asked_at = state["asked_at"]

    def _note_refusal(self, observation: Observation) -> None:
        if self._cohorts_when_asked is None:
            return
        arrived = len(observation.alive) + observation.num_ended > self._cohorts_when_asked
        self._refusals = 0 if arrived else self._refusals + 1
        self._cohorts_when_asked = None

    def _reason_to_stop(self, observation: Observation) -> str | None:
        if math.isfinite(observation.held_out):
            patience = self.patience(observation.total_steps)
            reason = reason_to_stop(observation.verdicts, observation.held_out, self.threshold, patience)
            if reason is not None:
                return reason
        total = observation.total_steps
        kept = any(verdict.state == Lifecycle.FOSSILIZED for verdict in observation.verdicts)
        if self._is_late(observation.step, total, kept=kept):
            share = self._late_share(kept)
            why = "a cohort was kept, and more would not pay back" if kept else "too late to pay back"
            return f"{why}: step {observation.step} is past {share:.0%} of {total} planned steps"
        if self._refusals >= _MAX_REFUSALS:
            return f"germination refused {self._refusals} times in a row; the refused events name the gate"
        return None

    def _may_germinate(self, observation: Observation) -> bool:
        if observation.step < self._first_step(observation.total_steps):
            return False
        if self._asked_at is not None and observation.step - self._asked_at < self._spacing:
            return False
        if observation.verdicts and not math.isfinite(observation.held_out):
            return False
        if any(map(math.isnan, room(observation))):
            return False
        return not any(Lifecycle.GERMINATED <= view.state <= Lifecycle.EVALUATING for view in observation.alive)

    def _first_step(self, total_steps: int | None) -> int:
        if self._first is not None:
            return self._first
        if total_steps is None:
            return _FIRST
        step = max(_EARLIEST * total_steps, min(_LATEST * total_steps, total_steps - _STEPS_LEFT))
        return min(_LATEST_STEP, round(step))

    def _late_share(self, kept: bool) -> float:
        return self._last_share if kept else max(self._last_share, _LAST_FIRST_SHARE)

    def _is_late(self, step: int, total_steps: int | None, *, kept: bool) -> bool:
        return total_steps is not None and step > self._late_share(kept) * total_steps

    def _is_lean(self, observation: Observation) -> bool:
        """Nothing but the length of a run says whether more units would pay back."""
        return not self._is_stated and observation.total_steps is not None

    def _asked(self, observation: Observation, *, compound: bool, size: float) -> Ints:
        """Width of each site ``(S,)``, ``size`` times what is usual; the same whichever of the spans a cohort is on."""
        lean, growth = self._is_lean(observation), np.full(len(observation.hidden), self.growth)
        wanted = growth_for(_SHARE, observation, compound=compound)
        if lean and wanted > _GROWTH:  # never where it is unknown (NaN)
            growth[column(observation, "is_span") == 1] *= min(wanted, _MOST_GROWTH) / _GROWTH
        return asked_widths(observation, growth * size * 0.5**self._refusals, compound=compound, lean=lean)

    def _note_asked(self, observation: Observation) -> None:
        self._germinations += 1
        self._asked_at = observation.step
        self._cohorts_when_asked = len(observation.alive) + observation.num_ended

    def _candidates(self, observation: Observation) -> npt.NDArray[np.int64]:
        is_span = column(observation, "is_span") == 1
        spans = np.flatnonzero(observation.eligible & is_span)
        if spans.size or observation.alive:
            return spans
        return np.flatnonzero(observation.eligible & ~is_span)

    def _germinate(self, observation: Observation, rows: npt.NDArray[np.int64]) -> tuple[Command, ...]:
        variation = STEADY
        if self._explores:
            variation = draw_variation(rows.size, self._seed, self._germinations)
            rows = rows[variation.keep]
        asked = self._asked(observation, compound=self._compound, size=variation.growth)[rows]
        costs = UnitCosts(*(unit[rows] for unit in unit_costs(observation)))
        left = room(observation)
        widths = fit_widths(asked, costs, left)
        leftover = bool(observation.verdicts) and affordable_share(asked, costs, left) < _MIN_SHARE
        if leftover or not widths.any():
            return (Stop(reason=budget_reached(observation)),)
        is_span = column(observation, "is_span")[rows] == 1
        plans = _plans(observation, rows[widths > 0], widths[widths > 0], variation, self._crowd)
        self._note_asked(observation)
        return (Germinate(seeds=plans, reason=_describe(plans, self._explores, bool(is_span[0]))),)


def _plans(
    observation: Observation,
    rows: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    variation: Variation,
    crowd: _Crowd,
) -> tuple[SeedPlan, ...]:
    is_span, is_conv = column(observation, "is_span") == 1, column(observation, "is_conv") == 1
    pressing = pressing_chunks(observation, rows) if variation.pressing_only else {}
    plans: list[SeedPlan] = []
    for row, width in zip(rows.tolist(), widths.tolist(), strict=True):
        if pressing and row not in pressing:
            continue
        # The isolated fit to the gradient was measured to hurt on convolutions: there it is not even tried.
        start = "random_zero" if is_conv[row] and variation.start is not None else variation.start
        if not is_span[row]:  # which starts a layer's branch can take is known where its blueprint is chosen
            start = None
        seeds, keep = crowd.of(width)
        plans.append(
            SeedPlan(
                site=observation.site_names[row],
                chunks=pressing.get(row, ()),
                blueprint=None,
                width=width // seeds,
                start=start,
                strategy=variation.strategy,
                seeds=seeds,
                keep=keep,
            )
        )
    return tuple(plans)


def _describe(plans: tuple[SeedPlan, ...], explores: bool, on_spans: bool) -> str:
    widths = [(plan.width or 0) * plan.seeds for plan in plans]
    size = f"+{min(widths)}" if min(widths) == max(widths) else f"+{min(widths)} to +{max(widths)}"
    what = "units" if on_spans else "ranks"
    sites = "1 site" if len(plans) == 1 else f"{len(plans)} sites"
    seeds = f" in up to {max(plan.seeds for plan in plans)} seeds" if any(plan.seeds > 1 for plan in plans) else ""
    return f"{'exploring' if explores else 'even growth over'} {sites}: {size} {what} each{seeds}"


def budget_reached(observation: Observation) -> str:
    """Why a controller stops that finds no room for another cohort."""
    parts: list[str] = []
    if observation.budget_params is not None:
        parts.append(f"{observation.params} of {observation.budget_params} parameters")
    if observation.budget_flops is not None:
        parts.append(f"{observation.flops_per_step:.4g} of {observation.budget_flops:.4g} forward FLOPs a step")
    return f"budget reached: {' and '.join(parts)} used, and the next cohort needs more than is left"
