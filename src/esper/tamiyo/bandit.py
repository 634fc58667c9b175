"""The bandit: contextual Thompson sampling over sites, what grows there and how much of it.

A Bayesian linear model tells gain per cost from a place and a choice. At each decision its weights are drawn once;
every eligible site gets the choice that is worth most under the draw, and all sites whose choice is worth its price
germinate as one cohort. What came of it is a row more for the model (Agrawal & Goyal 2013, arXiv:1209.3352).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.protocol import Command, Germinate, Observation, SeedPlan, Stop
from esper.tamiyo.allocation import MIN_WIDTH, UnitCosts, fit_widths, room, unit_costs
from esper.tamiyo.heuristic import HeuristicController, budget_reached
from esper.tamiyo.registry import register_controller
from esper.worth import (
    FEATURE_NAMES,
    Choice,
    LinearPosterior,
    Place,
    compressed,
    encode,
    gain_share,
    places,
    prior_precision,
    reference_width,
    targets,
)

SIZES = (0.5, 1.0, 2.0)
"""Sizes tried on a site, as multiples of what the configuration states."""
_HOPE = compressed(0.05)
"""Gain per cost of what nothing is known of: worth a try under the usual thresholds."""
_PRIOR_STRENGTH, _PRIOR_RATE = 4.0, 0.5
_MOST_WAIT_SHARE, _WAIT = 0.05, 50
"""After a draw that found nothing worth its price the next one comes after this share of the run, or so many steps."""
_KEYS = ("pace", "rows", "values", "pending", "draws", "wait_until", "prior_rows")

Floats = npt.NDArray[np.float64]


class _Pick(NamedTuple):
    """What should grow on one site."""

    row: int
    choice: Choice
    features: Floats
    width: int


class _Pending(msgspec.Struct):
    """A cohort that was asked for and has not ended."""

    features: list[float]
    after: int
    """Largest number of a cohort when it was asked for."""
    cohort: int | None = None


@register_controller("bandit")
class BanditController(HeuristicController):
    """Learns in the run, and from earlier ones where it is given them, what is worth its cost where.

    Budget, pace and end are the heuristic controller's: ``first``, ``spacing``, one cohort at a time, ``patience``,
    ``last_share``. What it decides itself is whether anything is worth its price now (``min_gain_per_cost``), which
    sites take part, what grows on each and at half, once or twice the size that ``growth`` states.

    Parameters
    ----------
    config:
        ``seeds_per_site`` and ``keep_share`` are not used.
    seed:
        Starts its own generator.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._earlier = LinearPosterior(prior_precision(_PRIOR_STRENGTH), rate=_PRIOR_RATE)
        """What other runs have taught."""
        self._known = copy.deepcopy(self._earlier)
        """That, and what this run has."""
        self._rows: list[list[float]] = []
        self._values: list[float] = []
        self._pending: list[_Pending] = []
        self._draws = 0
        self._wait_until = 0
        self._prior_rows = 0

    def learn(self, features: Floats, values: Floats) -> None:
        """Take up what other runs have found, before this one begins: ``(N, D)`` and ``(N, K)`` as in ``esper.worth``.

        Raises
        ------
        ConfigError
            This run has begun.
        """
        if self._draws or self._rows:
            raise ConfigError(f"a bandit is taught before its run begins, got {self._draws} decisions; build a new one")
        if len(features):
            self._earlier.update(features, values[:, :1] - _HOPE)
            self._known = copy.deepcopy(self._earlier)
            self._prior_rows += len(features)

    def waits(self, step: int, *, total_steps: int | None, num_ended: int) -> bool:
        """As long as the heuristic does: until ``first``."""
        return super().waits(step, total_steps=total_steps, num_ended=num_ended)

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return nothing, one ``Germinate`` or one ``Stop``; learns from the cohorts that have ended."""
        self._take_up(observation)
        if observation.stopped is None and observation.step < self._wait_until:
            return ()
        return super().decide(observation)

    def state(self) -> dict[str, Any]:
        """Counters, and what was learnt in this run, as plain values."""
        return {
            "pace": super().state(), "rows": self._rows, "values": self._values,
            "pending": [msgspec.to_builtins(entry) for entry in self._pending], "draws": self._draws,
            "wait_until": self._wait_until, "prior_rows": self._prior_rows,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state`; raises ``ConfigError`` if it does not fit or earlier runs taught it something else."""
        if set(state) != set(_KEYS) or state["prior_rows"] != self._prior_rows:
            raise ConfigError(
                f"a bandit's state must have the keys {sorted(_KEYS)} and {self._prior_rows} rows of earlier runs, got "
                f"{sorted(state)} and {state.get('prior_rows')}; load it into one that was taught the same"
            )
        try:
            pending = [msgspec.convert(entry, _Pending) for entry in state["pending"]]
            known = copy.deepcopy(self._earlier)
            _see(known, state["rows"], state["values"])
        except (msgspec.ValidationError, IndexError) as error:
            raise ConfigError(f"a bandit's state must be what state() returned, got {error}; begin anew") from error
        super().load(state["pace"])
        self._known = known
        self._rows, self._values = [list(row) for row in state["rows"]], list(state["values"])
        self._pending, self._draws, self._wait_until = pending, state["draws"], state["wait_until"]

    # ---------------------------------------------------------------------------------------------- learning

    def _take_up(self, observation: Observation) -> None:
        """Give cohorts their numbers, and learn from those that have ended."""
        numbers = [view.cohort for view in observation.alive] + [verdict.cohort for verdict in observation.verdicts]
        ends = {verdict.cohort: verdict for verdict in observation.verdicts}
        left: list[_Pending] = []
        for entry in self._pending:
            if entry.cohort is None:
                entry.cohort = min((number for number in numbers if number > entry.after), default=None)
            if entry.cohort is None:
                continue  # refused by a gate
            end = ends.get(entry.cohort)
            if end is None:
                left.append(entry)
                continue
            gain = gain_share(end.gain_shrunken, observation.held_out)
            told = targets(end.state, gain, end.added_flops_share, end.reason)
            if told is not None:
                value = compressed(told[0])
                _see(self._known, [entry.features], [value])
                self._rows.append(entry.features)
                self._values.append(value)
        self._pending = left

    # ---------------------------------------------------------------------------------------------- choosing

    def _candidates(self, observation: Observation) -> npt.NDArray[np.int64]:
        """All eligible sites; the model tells spans and layers apart."""
        return np.flatnonzero(observation.eligible)

    def _germinate(self, observation: Observation, rows: npt.NDArray[np.int64]) -> tuple[Command, ...]:
        draw = self._known.sample(np.random.default_rng([self._seed, self._draws]))[:, 0]
        self._draws += 1
        around = places(observation)
        base = self._asked(observation, compound=False, size=1.0)
        picks: list[_Pick] = []
        best, price = -math.inf, compressed(self.threshold)
        for row in rows.tolist():
            options = list(_options(observation, row, around[row], int(base[row])))
            worths = [_HOPE + float(option.features @ draw) for option in options]
            at = int(np.argmax(worths))
            best = max(best, worths[at])
            if worths[at] >= price:
                picks.append(options[at])
        if not picks:
            total = observation.total_steps
            pause = _WAIT if total is None else max(1, math.ceil(_MOST_WAIT_SHARE * total))
            self._wait_until = observation.step + pause
            return ()
        return self._ask(observation, picks, best - price)

    def _ask(self, observation: Observation, picks: Sequence[_Pick], margin: float) -> tuple[Command, ...]:
        chosen = np.array([pick.row for pick in picks], dtype=np.int64)
        costs = UnitCosts(*(unit[chosen] for unit in unit_costs(observation)))
        widths = fit_widths(np.array([pick.width for pick in picks], dtype=np.int64), costs, room(observation))
        if not widths.any():
            return (Stop(reason=budget_reached(observation)),)
        grown = [(pick, int(width)) for pick, width in zip(picks, widths.tolist(), strict=True) if width > 0]
        weights = np.array([width * float(unit) for width, unit in zip(widths, costs.params, strict=True) if width > 0])
        weights = weights / weights.sum() if np.isfinite(weights).all() and weights.sum() > 0 else np.full(
            len(grown), 1 / len(grown)
        )  # fmt: skip
        features = sum(
            (w * pick.features for w, (pick, _) in zip(weights, grown, strict=True)), np.zeros(len(FEATURE_NAMES))
        )
        known = [view.cohort for view in observation.alive] + [verdict.cohort for verdict in observation.verdicts]
        self._pending.append(_Pending(features=features.tolist(), after=max(known, default=-1)))
        self._note_asked(observation)
        plans = tuple(
            SeedPlan(
                site=observation.site_names[pick.row], blueprint=pick.choice.blueprint or None,
                start=pick.choice.start or None, width=width,
            )
            for pick, width in grown
        )  # fmt: skip
        sites = "1 site" if len(plans) == 1 else f"{len(plans)} sites"
        seen = self._prior_rows + len(self._values)
        reason = f"{sites}: up to {margin:.2g} above its price by draw {self._draws}, after {seen} cohorts"
        return (Germinate(seeds=plans, reason=reason),)


def _see(known: LinearPosterior, rows: Sequence[Sequence[float]], values: Sequence[float]) -> None:
    if len(rows) or len(values):
        known.update(np.array(rows, dtype=np.float64), np.array(values, dtype=np.float64)[:, None] - _HOPE)


def _options(observation: Observation, row: int, place: Place, asked: int) -> list[_Pick]:
    """Everything that can be on a site, at several sizes; where nobody tells what can, the site's defaults."""
    inputs, outputs = (0 if value is None else round(math.exp(value)) for value in (place.log_in, place.log_out))
    reference = reference_width(inputs, outputs, int(observation.hidden[row]))
    widths = dict.fromkeys(max(min(MIN_WIDTH, asked), round(size * asked)) for size in SIZES)
    pairs = observation.offers[row] if observation.offers else (("", ""),)
    picks: list[_Pick] = []
    for blueprint, start in pairs:
        for width in widths:
            choice = Choice(blueprint=blueprint, start=start, growth=width / reference)
            picks.append(_Pick(row, choice, encode(place, choice), width))
    return picks
