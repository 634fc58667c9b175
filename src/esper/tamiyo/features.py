"""What a learned controller reads of an observation: numbers without units, each with a flag for *missing*.

Nothing here changes when the loss is multiplied by a constant, when steps are counted in other units, or (but for the
order of the rows) when sites come in another order. So what was learned on small hosts can be asked about large ones.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError
from esper.protocol import CohortView, Lifecycle, Observation, Verdict
from esper.tamiyo.allocation import asked_widths, column, unit_costs

Floats = npt.NDArray[np.float32]

GLOBAL_FEATURES = (
    "progress",  # share of the planned steps
    "params_used",  # of what the ceiling leaves above the host
    "flops_used",
    "params_grown",  # log of now over the host alone
    "flops_grown",
    "loss_drop",  # log of the held-out loss over the first one
    "slope_short",  # d log(loss) / d (step / now) over the last few decision points
    "slope_long",
    "gap",  # log of the held-out over the training loss
    "lr_share",
    "loss_noise",
    "price",  # log of the smallest gain per cost worth having
    "on_trial",  # log(1 + cohorts alive and not decided yet)
    "kept",  # log(1 + cohorts that became permanent)
    "failed",  # log(1 + cohorts that were removed)
    "failed_in_row",  # log(1 + removed ones since the last permanent one)
    "since_verdict",  # share of the steps so far since the last cohort ended
)
"""What is told of the run as a whole."""

SITE_FEATURES = (
    "is_span",
    "is_conv",
    "log_in",  # widths: log(features) / log(1024)
    "log_width",
    "log_out",
    "fill",  # log of the inner width now over the host's
    "free_share",  # of the site's chunks
    "energy",  # log of the gradient energy over the mean of all sites
    "fit_gain",  # share of the gradient's energy that an isolated fit explained on other batches
    "fit_error",
    "last_gain",  # of the last cohort judged here, as a share of the held-out loss
    "last_error",
    "last_kept",
    "cost_params",  # log of what growth by one host's width costs, as a share of the model now
    "cost_flops",
    "age",  # share of the steps so far since the site last grew
    "eligible",
    "live",  # holds seeds on trial
    "stage",  # GERMINATED 0 to FINE_TUNING 1
    "alpha",
    "wait",  # steps in that state, as a share of the steps so far
)
"""What is told of each site."""

GLOBAL_COLUMNS = (*GLOBAL_FEATURES, *(f"{name}.missing" for name in GLOBAL_FEATURES))
SITE_COLUMNS = (*SITE_FEATURES, *(f"{name}.missing" for name in SITE_FEATURES))
VERSION = 1
"""Raised when a column changes its meaning; names that come or go are seen without it."""
LIMIT = 10.0
"""Values lie within this of zero."""

_LOG_UNIT = math.log(1024)
_LEAST_PRICE = 1e-4
_SHORT, _LONG = 4, 16
"""Decision points behind the two slopes."""
_COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}
_UNDECIDED = range(Lifecycle.GERMINATED, Lifecycle.FINE_TUNING)
_FIRST, _LAST = int(Lifecycle.GERMINATED), int(Lifecycle.FINE_TUNING)


@dataclass(frozen=True)
class Features:
    """One look: ``world (len(GLOBAL_COLUMNS),)`` and ``sites (S, len(SITE_COLUMNS))``, both float32 and finite."""

    world: Floats
    sites: Floats


class FeatureReader:
    """Turns the observations of one run, in their order, into :class:`Features`.

    It remembers what an observation does not hold: earlier losses (for slopes), and what the last fit on a site found.
    """

    def __init__(self) -> None:
        self._losses: deque[tuple[int, float]] = deque(maxlen=_LONG)
        """Step and log(loss) at decision points."""
        self._fits: dict[str, tuple[float, float]] = {}

    def read(self, observation: Observation) -> Features:
        """Look once; call it once a decision point."""
        self._remember(observation)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return Features(
                world=_flagged(np.array(self._world(observation), dtype=np.float64)),
                sites=_flagged(self._sites(observation)),
            )

    def state(self) -> dict[str, Any]:
        """What is remembered, as JSON-ready plain values."""
        return {
            "losses": [list(point) for point in self._losses],
            "fits": {name: list(fit) for name, fit in self._fits.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; raises ``ConfigError`` and changes nothing if it does not fit."""
        try:
            losses = [(int(step), float(loss)) for step, loss in state["losses"]]
            fits = {str(name): (float(gain), float(error)) for name, (gain, error) in state["fits"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"a feature reader's state must hold 'losses' and 'fits', got {error!r}; load what state() returned"
            ) from error
        self._losses.clear()
        self._losses.extend(losses)
        self._fits = fits

    def _remember(self, observation: Observation) -> None:
        loss = observation.train_loss if math.isfinite(observation.train_loss) else observation.held_out
        if math.isfinite(loss) and loss > 0 and (not self._losses or self._losses[-1][0] < observation.step):
            self._losses.append((observation.step, math.log(loss)))
        explained, errors = observation.fit_explained, observation.fit_error
        if explained is not None and errors is not None:
            for row in np.flatnonzero(np.isfinite(explained)).tolist():
                self._fits[observation.site_names[row]] = (float(explained[row]), float(errors[row]))

    def _slope(self, num: int) -> float:
        """Least-squares slope of log(loss) over step / now; NaN with fewer than three points."""
        points = np.array(list(self._losses)[-num:], dtype=np.float64)
        if len(points) < 3:
            return math.nan
        x = points[:, 0] / points[-1, 0]
        x = x - x.mean()
        return float((x * points[:, 1]).sum() / np.square(x).sum())

    def _world(self, observation: Observation) -> list[float]:
        total, budget = observation.total_steps, observation.budget_params
        kept, failed, in_row = _record(observation.verdicts)
        since = observation.step - observation.verdicts[-1].step if observation.verdicts else math.nan
        values = {
            "progress": observation.step / total if total else math.nan,
            "params_used": math.nan if budget is None else _used(observation.params, observation.host_params, budget),
            "flops_used": (
                math.nan
                if observation.budget_flops is None
                else _used(observation.flops_per_step, observation.host_flops_per_step, observation.budget_flops)
            ),
            "params_grown": _log(observation.params / max(observation.host_params, 1)),
            "flops_grown": _log_ratio(observation.flops_per_step, observation.host_flops_per_step),
            "loss_drop": _log_ratio(observation.held_out, observation.held_out_initial),
            "slope_short": self._slope(_SHORT),
            "slope_long": self._slope(_LONG),
            "gap": _log_ratio(observation.held_out, observation.train_loss),
            "lr_share": observation.lr_share,
            "loss_noise": observation.loss_noise,
            "price": _log(max(observation.price, _LEAST_PRICE)) if observation.price >= 0 else math.nan,
            "on_trial": math.log1p(sum(view.state in _UNDECIDED for view in observation.alive)),
            "kept": math.log1p(kept),
            "failed": math.log1p(failed),
            "failed_in_row": math.log1p(in_row),
            "since_verdict": since / max(observation.step, 1),
        }
        return [values[name] for name in GLOBAL_FEATURES]

    def _sites(self, observation: Observation) -> npt.NDArray[np.float64]:
        table = np.full((len(observation.site_names), len(SITE_FEATURES)), np.nan)
        now = max(observation.step, 1)
        energy = column(observation, "gradient_energy")
        width = (observation.hidden + observation.grown).astype(np.float64)
        has_width = observation.hidden > 0
        for name, values in (
            ("is_span", column(observation, "is_span")),
            ("is_conv", column(observation, "is_conv")),
            ("log_in", column(observation, "log_in") / _LOG_UNIT),
            ("log_out", column(observation, "log_out") / _LOG_UNIT),
            ("log_width", np.where(has_width, np.log(width) / _LOG_UNIT, np.nan)),
            ("fill", np.where(has_width, np.log(width / observation.hidden), np.nan)),
            ("free_share", column(observation, "free_chunk_share")),
            ("energy", _relative(energy)),
            ("age", column(observation, "steps_since_growth") / now),
            ("eligible", observation.eligible.astype(np.float64)),
            *_costs(observation),
        ):
            table[:, _COLUMN[name]] = values
        rows = {name: row for row, name in enumerate(observation.site_names)}
        self._tell_fits(table, rows)
        _tell_verdicts(table, rows, observation.verdicts, observation.held_out)
        _tell_alive(table, rows, observation.alive, now)
        return table

    def _tell_fits(self, table: npt.NDArray[np.float64], rows: dict[str, int]) -> None:
        for name, fit in self._fits.items():
            if name in rows:
                table[rows[name], [_COLUMN["fit_gain"], _COLUMN["fit_error"]]] = fit


def _flagged(values: npt.NDArray[np.float64]) -> Floats:
    """Values and their flags side by side on the last axis; what is not a number becomes 0 with the flag 1."""
    missing = np.isnan(values)
    known = np.clip(np.where(missing, 0.0, values), -LIMIT, LIMIT)
    return np.concatenate([known, missing], axis=-1).astype(np.float32)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _log_ratio(value: float, unit: float) -> float:
    """NaN unless both are positive: losses may be negative, and then their ratio says nothing."""
    return math.log(value) - math.log(unit) if value > 0 and unit > 0 else math.nan


def _used(now: float, host: float, ceiling: float) -> float:
    return (now - host) / (ceiling - host) if ceiling > host else 1.0


def _relative(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log of each value over the mean of those that are known."""
    known = np.isfinite(values)
    if not known.any():
        return np.full(values.shape, np.nan)
    mean = values[known].mean()
    return np.where(known, np.log(values / mean), np.nan) if mean > 0 else np.where(known, 0.0, np.nan)


def _costs(observation: Observation) -> list[tuple[str, npt.NDArray[np.float64]]]:
    width, unit = asked_widths(observation, 1.0), unit_costs(observation)
    return [
        ("cost_params", np.log(width * unit.params / max(observation.params, 1))),
        ("cost_flops", np.log(width * unit.flops / observation.flops_per_step)),
    ]


def _record(verdicts: Sequence[Verdict]) -> tuple[int, int, int]:
    """Cohorts kept, removed, and removed since the last one that was kept; cancelled ones say nothing."""
    kept = failed = in_row = 0
    for verdict in verdicts:
        if verdict.state is Lifecycle.FOSSILIZED:
            kept, in_row = kept + 1, 0
        elif verdict.state is not Lifecycle.CANCELLED:
            failed, in_row = failed + 1, in_row + 1
    return kept, failed, in_row


def _tell_verdicts(
    table: npt.NDArray[np.float64], rows: dict[str, int], verdicts: Sequence[Verdict], held_out: float
) -> None:
    told: set[str] = set()
    unit = abs(held_out) if held_out != 0 else math.nan
    for verdict in reversed(verdicts):
        for name in verdict.sites:
            if name in rows and name not in told:
                gain = verdict.gain_shrunken if math.isfinite(verdict.gain_shrunken) else verdict.gain
                table[rows[name], _COLUMN["last_gain"]] = gain / unit
                table[rows[name], _COLUMN["last_error"]] = (verdict.gain_high - verdict.gain_low) / 2 / unit
                table[rows[name], _COLUMN["last_kept"]] = verdict.state is Lifecycle.FOSSILIZED
                told.add(name)
        if len(told) == len(rows):
            return


def _tell_alive(table: npt.NDArray[np.float64], rows: dict[str, int], alive: Sequence[CohortView], now: int) -> None:
    table[:, _COLUMN["live"]] = 0.0
    for view in alive:
        if not _FIRST <= view.state <= _LAST:
            continue
        held = [rows[name] for name in view.sites if name in rows]
        table[held, _COLUMN["live"]] = 1.0
        table[held, _COLUMN["stage"]] = (view.state - _FIRST) / (_LAST - _FIRST)
        table[held, _COLUMN["alpha"]] = view.alpha
        table[held, _COLUMN["wait"]] = view.steps_in_state / now
