"""Turn the state of a run into what a controller sees: plain arrays, one snapshot of all sites."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper.kasmina.blueprints import BLUEPRINTS, Cost
from esper.kasmina.defaults import default_blueprint
from esper.kasmina.execution import Kasmina
from esper.kasmina.germination import offers
from esper.kasmina.reading import Reading
from esper.kasmina.site import Site
from esper.kasmina.telemetry import Sensed
from esper.protocol import SITE_FEATURES, CohortView, Observation
from esper.verdicts import Verdicts

_COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}
_SENSORS = slice(_COLUMN["activation_mean"], _COLUMN["gradient_energy"] + 1)
"""Mean, variance and gradient energy stand side by side, as in a snapshot."""
NUM_PRESSING = 64
"""Chunks listed as pressing; a controller that wants more can read the telemetry itself."""


@dataclass(frozen=True)
class Frame:
    """An observation without what the sensors, the losses and the run's settings say."""

    kasmina: Kasmina
    fixed: _Fixed
    rows: npt.NDArray[np.float64]
    """Site features; NaN where sensors tell."""
    added_flops: float
    told: dict[str, Any]
    """Fields of the observation."""

    def complete(
        self,
        sensed: Sensed,
        *,
        total_steps: int | None,
        held_out: float,
        held_out_initial: float,
        host_flops: float,
        budget_params: int | None,
        budget_flops: float | None,
        stopped: str | None,
        losses: tuple[float, float] = (math.nan, math.nan),
        lr_share: float = math.nan,
        price: float = math.nan,
    ) -> Observation:
        """The observation, once; ``losses`` are the mean of the latest training losses and its noise."""
        sensed.publish()
        self.rows[:, _SENSORS] = sensed.means()
        pressing = self.fixed.pressing(sensed.energies(), self.kasmina.table.offsets)
        return Observation(
            total_steps=total_steps,
            held_out=held_out,
            held_out_initial=held_out_initial,
            budget_params=budget_params,
            flops_per_step=host_flops + self.added_flops,
            host_flops_per_step=host_flops,
            budget_flops=budget_flops,
            sites=self.rows,
            chunk_site=pressing[0].copy(),
            chunk_index=pressing[1].copy(),
            chunk_pressure=pressing[2].copy(),
            stopped=stopped,
            train_loss=losses[0],
            loss_noise=losses[1],
            lr_share=lr_share,
            price=price,
            **self.told,
        )


def prepare(kasmina: Kasmina, *, step: int, verdicts: Verdicts) -> Frame:
    """All of an observation that can be made without waiting for the device; it holds as long as nothing changes."""
    fixed = _fixed(kasmina)
    free = kasmina.table.num_free_chunks(step)
    refused = np.array([site.refused is not None for site in kasmina.sites.values()])
    grown = np.array([kasmina.units(name) for name in fixed.names], dtype=np.int64)
    prices, fits = _prices(kasmina, fixed), _fits(kasmina, fixed)
    rows_per_step = np.array(list(kasmina.rows_per_step.values()))
    told: dict[str, Any] = {
        "step": step,
        "params": kasmina.params,
        "host_params": kasmina.host_params,
        "site_names": fixed.names,
        "hidden": fixed.hidden.copy(),
        "grown": grown,
        "eligible": (free == fixed.chunks) & ~kasmina.table.has_seeds() & ~refused,
        "alive": tuple(_view(kasmina, number, step) for number in kasmina.cohorts),
        "verdicts": verdicts.told(),
        "untold": verdicts.num_untold,
        "unit_params": prices.params.copy(),
        "unit_flops": prices.flops_per_row * rows_per_step,
        "fit_explained": fits[0],
        "fit_error": fits[1],
        "alternatives": fixed.alternatives,
        "alternative_params": prices.others[0].copy(),
        "alternative_flops": prices.others[1] * rows_per_step[:, None],
        "kinds": fixed.kinds,
        "offers": fixed.offers,
        "family": kasmina.family,
        "optimizer": kasmina.optimizer_family,
    }
    rows = _site_rows(fixed, free / fixed.chunks, grown, verdicts, step)
    return Frame(kasmina, fixed, rows, kasmina.added_flops_per_step(), told)


def observe(kasmina: Kasmina, *, step: int, verdicts: Verdicts, **settings: Any) -> Observation:
    """Build the observation now; ``settings`` are those of :meth:`Frame.complete`. Waits for the device once."""
    reading = Reading((), (), (), kasmina.panel)
    return prepare(kasmina, step=step, verdicts=verdicts).complete(reading.sensed, **settings)


def _prices(kasmina: Kasmina, fixed: _Fixed) -> _Prices:
    """What one more unit costs; it changes only when a site reads more than before, until then it is known."""
    reads = tuple([site.reads for site in kasmina.sites.values()])
    if reads in fixed.priced:
        return fixed.priced[reads]
    fixed.priced.clear()
    costs = [_unit_cost(site, default_blueprint(site.info.kind)) for site in kasmina.sites.values()]
    others = np.full((2, len(fixed.names), len(fixed.alternatives)), np.nan)
    for row, index in fixed.sits:
        cost = _unit_cost(kasmina.sites[fixed.names[row]], fixed.alternatives[index])
        others[:, row, index] = cost.params, cost.flops_per_row
    found = fixed.priced[reads] = _Prices(
        params=np.array([cost.params for cost in costs], dtype=np.float64),
        flops_per_row=np.array([cost.flops_per_row for cost in costs]),
        others=others,
    )
    return found


def _unit_cost(site: Site, blueprint: str) -> Cost:
    """What one more unit over all columns costs."""
    return BLUEPRINTS[blueprint].cost(site.geometry, units=1, columns=site.info.out_features, reads=site.reads)


def _fits(kasmina: Kasmina, fixed: _Fixed) -> npt.NDArray[np.float64]:
    """``(2, S)``: what the fit of the seeds alive on each site explained on other batches, and its standard error."""
    found = np.full((2, len(fixed.names)), np.nan)
    rows = {name: row for row, name in enumerate(fixed.names)} if kasmina.cohorts else {}
    for cohort in kasmina.cohorts.values():
        for name, member in cohort.members.items():
            explained, t = member.report.explained, member.report.t_statistic
            if math.isfinite(explained):
                error = abs(explained / t) if math.isfinite(t) and t != 0 else math.nan
                found[:, rows[name]] = explained, error
    return found


def _view(kasmina: Kasmina, number: int, step: int) -> CohortView:
    cohort = kasmina.cohorts[number]
    return CohortView(
        cohort=number,
        state=cohort.state,
        steps_in_state=cohort.entered if cohort.paused else step - cohort.entered,
        sites=cohort.sites,
        num_seeds=cohort.num_seeds,
        alpha=cohort.alpha,
        added_params=cohort.added_params,
    )


class _Prices(NamedTuple):
    """Of one more unit on each site: parameters and forward FLOPs a row, ``(S,)``, with the site kind's default
    blueprint; ``(2, S, B)`` the same of what is not the default."""

    params: npt.NDArray[np.float64]
    flops_per_row: npt.NDArray[np.float64]
    others: npt.NDArray[np.float64]


_Pressing = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]


@dataclass
class _Fixed:
    """What of an observation stays the same as long as the sites do."""

    names: tuple[str, ...]
    chunks: npt.NDArray[np.int64]
    hidden: npt.NDArray[np.int64]
    kinds: tuple[str, ...]
    offers: tuple[tuple[tuple[str, str], ...], ...]
    rows: npt.NDArray[np.float64]
    """Site features as long as nothing has grown; NaN where sensors tell."""
    alternatives: tuple[str, ...]
    """Blueprints that can sit on some site besides its default one."""
    sits: tuple[tuple[int, int], ...]
    """Row and alternative that go together."""
    priced: dict[tuple[int, ...], _Prices] = field(default_factory=dict[tuple[int, ...], _Prices])
    """By what the sites read."""
    _pressed: tuple[npt.NDArray[np.float32], _Pressing] | None = None

    def pressing(self, energies: npt.NDArray[np.float32], offsets: npt.NDArray[np.int64]) -> _Pressing:
        """The pressing chunks; energies change only where a site has captured, until then they are known."""
        if self._pressed is None or not np.array_equal(energies.view(np.int32), self._pressed[0].view(np.int32)):
            self._pressed = energies, _pressing(energies, offsets)
        return self._pressed[1]


_known: weakref.WeakKeyDictionary[Kasmina, _Fixed] = weakref.WeakKeyDictionary()


def _fixed(kasmina: Kasmina) -> _Fixed:
    found = _known.get(kasmina)
    if found is None:
        infos = [site.info for site in kasmina.sites.values()]
        rows = np.full((len(infos), len(SITE_FEATURES)), np.nan)
        for row, info in enumerate(infos):
            rows[row, _COLUMN["is_span"]] = info.kind.is_span
            rows[row, _COLUMN["is_conv"]] = info.kind.is_conv
            rows[row, _COLUMN["log_in"]] = math.log(info.in_features)
            rows[row, _COLUMN["log_out"]] = math.log(info.out_features)
            if info.hidden_features:
                rows[row, _COLUMN["log_hidden"]] = math.log(info.hidden_features)
                rows[row, _COLUMN["grown_share"]] = 0.0
        chunks = np.array([info.num_chunks for info in infos], dtype=np.int64)
        hidden = np.array([info.hidden_features for info in infos], dtype=np.int64)
        alternatives, sits = _alternatives(kasmina)
        found = _known[kasmina] = _Fixed(
            names=tuple(kasmina.sites), chunks=chunks, hidden=hidden, kinds=tuple(str(info.kind) for info in infos),
            offers=tuple(offers(site) for site in kasmina.sites.values()), rows=rows, alternatives=alternatives,
            sits=sits,
        )  # fmt: skip
    return found


def _alternatives(kasmina: Kasmina) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    pairs = [
        (row, name)
        for row, site in enumerate(kasmina.sites.values())
        for name in BLUEPRINTS
        if site.info.kind in BLUEPRINTS[name].kinds
        and name != default_blueprint(site.info.kind)
        and BLUEPRINTS[name].refusal(site.geometry) is None
    ]
    names = tuple(sorted({name for _, name in pairs}))
    return names, tuple((row, names.index(name)) for row, name in pairs)


def _site_rows(
    fixed: _Fixed,
    free_share: npt.NDArray[np.float64],
    grown: npt.NDArray[np.int64],
    verdicts: Verdicts,
    step: int,
) -> npt.NDArray[np.float64]:
    table = fixed.rows.copy()
    table[:, _COLUMN["free_chunk_share"]] = free_share
    if grown.any():
        spans = fixed.hidden > 0
        table[spans, _COLUMN["grown_share"]] = grown[spans] / fixed.hidden[spans]
    last_gain, last_growth = verdicts.last_gain, verdicts.last_growth
    if last_gain:
        table[:, _COLUMN["last_gain"]] = [last_gain.get(name, math.nan) for name in fixed.names]
    if last_growth:
        table[:, _COLUMN["steps_since_growth"]] = [step - last_growth.get(name, math.nan) for name in fixed.names]
    return table


def _pressing(flat: npt.NDArray[np.float32], offsets: npt.NDArray[np.int64]) -> _Pressing:
    """The chunks with the highest gradient energy, strongest first; silent chunks (NaN) are left out.

    A million chunks are ordinary: the cut is found without sorting them.
    """
    known = np.isfinite(flat)
    if not known.any():
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    if flat.size > NUM_PRESSING:
        cut = np.partition(np.where(known, flat, -np.inf), -NUM_PRESSING)[-NUM_PRESSING]
        known &= flat >= cut
    candidates = np.flatnonzero(known)
    order = candidates[np.argsort(-flat[candidates], kind="stable")][:NUM_PRESSING]
    site = np.searchsorted(offsets, order, side="right") - 1
    return site.astype(np.int64), (order - offsets[site]).astype(np.int64), flat[order].astype(np.float64)
