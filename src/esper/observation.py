"""Turn the state of a run into what a controller sees: plain arrays, one snapshot of all sites."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.errors import CONTAINED
from esper.kasmina.blueprints import BLUEPRINTS, Cost, refusal_of
from esper.kasmina.defaults import default_blueprint
from esper.kasmina.execution import Kasmina
from esper.kasmina.germination import offers
from esper.kasmina.reading import Reading
from esper.kasmina.site import Site
from esper.kasmina.telemetry import Blocks
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

    fixed: _Fixed
    rows: npt.NDArray[np.float64]
    """Site features; NaN where sensors tell."""
    added_flops: float
    told: dict[str, Any]
    """Fields of the observation."""

    def complete(
        self,
        blocks: Blocks,
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
        """The observation, once. ``blocks`` are what the sensors of all sites said, ``losses`` the mean of the latest
        training losses and its noise."""
        for numbers, block in blocks:
            self.rows[numbers, _SENSORS] = np.add.reduce(block, axis=2) / block.shape[2]
        pressing = self.fixed.pressure.of(blocks)
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
    standing = _standing(kasmina, fixed, step)
    refused = [site.refused is not None for site in kasmina.sites.values()]
    rows_per_step = np.array(list(kasmina.rows_per_step.values()))
    told: dict[str, Any] = {
        "step": step,
        "params": standing.params,
        "host_params": kasmina.host_params,
        "site_names": fixed.names,
        "hidden": fixed.hidden.copy(),
        "grown": standing.grown.copy(),
        "eligible": standing.eligible & ~np.array(refused) if any(refused) else standing.eligible.copy(),
        "alive": tuple(_view(kasmina, number, step) for number in kasmina.cohorts),
        "verdicts": verdicts.told(),
        "untold": verdicts.num_untold,
        "unit_params": standing.unit_params.copy(),
        "unit_flops": standing.unit_flops * rows_per_step,
        "fit_explained": standing.fits[0].copy(),
        "fit_error": standing.fits[1].copy(),
        "alternatives": fixed.alternatives,
        "alternative_params": standing.others[0].copy(),
        "alternative_flops": standing.others[1] * rows_per_step[:, None],
        "kinds": fixed.kinds,
        "offers": fixed.offers,
        "family": kasmina.family,
        "optimizer": kasmina.optimizer_family,
    }
    added_flops = 0.0 if kasmina.at_rest else kasmina.added_flops_per_step()
    return Frame(fixed, _site_rows(fixed, standing, verdicts, step), added_flops, told)


def observe(kasmina: Kasmina, *, step: int, verdicts: Verdicts, **settings: Any) -> Observation:
    """Build the observation now; ``settings`` are those of :meth:`Frame.complete`. Waits for the device once."""
    reading = Reading((), (), (), kasmina.readout)
    return prepare(kasmina, step=step, verdicts=verdicts).complete(reading.blocks, **settings)


def _unit_cost(site: Site) -> Cost:
    """What one more unit over all columns costs with the site kind's default blueprint."""
    blueprint = BLUEPRINTS[default_blueprint(site.info.kind)]
    return blueprint.cost(site.geometry, units=1, columns=site.info.out_features, reads=site.reads)


def _alternative_costs(kasmina: Kasmina, fixed: _Fixed) -> npt.NDArray[np.float64]:
    """``(2, S, B)``: parameters, and forward FLOPs a row, of one more unit of what is not the default.

    They change only when a site reads more than before; until then the last ones are returned.
    """
    reads = tuple(kasmina.sites[fixed.names[row]].reads for row, _ in fixed.sits)
    if reads in fixed.priced:
        return fixed.priced[reads]
    fixed.priced.clear()
    found = fixed.priced[reads] = np.full((2, len(fixed.names), len(fixed.alternatives)), np.nan)
    for row, index in fixed.sits:
        site = kasmina.sites[fixed.names[row]]
        blueprint = BLUEPRINTS[fixed.alternatives[index]]
        try:
            cost = blueprint.cost(site.geometry, units=1, columns=site.info.out_features, reads=site.reads)
        except CONTAINED:  # a blueprint of the user's that nobody may ever name; naming it is refused with the reason
            continue
        found[:, row, index] = cost.params, cost.flops_per_row
    return found


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


@dataclass(frozen=True)
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
    pressure: _Pressure
    priced: dict[tuple[int, ...], npt.NDArray[np.float64]] = field(
        default_factory=dict[tuple[int, ...], npt.NDArray[np.float64]]
    )


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
            sits=sits, pressure=_Pressure(),
        )  # fmt: skip
    return found


def _alternatives(kasmina: Kasmina) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    pairs = [
        (row, name)
        for row, site in enumerate(kasmina.sites.values())
        for name in BLUEPRINTS
        if site.info.kind in BLUEPRINTS[name].kinds
        and name != default_blueprint(site.info.kind)
        and refusal_of(name, site.geometry) is None
    ]
    names = tuple(sorted({name for _, name in pairs}))
    return names, tuple((row, names.index(name)) for row, name in pairs)


@dataclass(frozen=True)
class _Standing:
    """What of an observation stays the same while nothing is alive and nothing has been grown."""

    changes: int
    """Of the execution layer, when this was made."""
    settled: bool
    """No chunk rests any more: it holds in later steps as well."""
    grown: npt.NDArray[np.int64]
    rows: npt.NDArray[np.float64]
    """Site features without what cohorts and sensors have told."""
    eligible: npt.NDArray[np.bool_]
    params: int
    unit_params: npt.NDArray[np.float64]
    unit_flops: npt.NDArray[np.float64]
    others: npt.NDArray[np.float64]
    fits: npt.NDArray[np.float64]


_stood: weakref.WeakKeyDictionary[Kasmina, _Standing] = weakref.WeakKeyDictionary()


def _standing(kasmina: Kasmina, fixed: _Fixed, step: int) -> _Standing:
    found = _stood.get(kasmina) if kasmina.at_rest else None
    if found is not None and found.settled and found.changes == kasmina.num_changes:
        return found
    free = kasmina.table.num_free_chunks(step)
    costs = [_unit_cost(site) for site in kasmina.sites.values()]
    grown = np.array([kasmina.units(name) for name in fixed.names], dtype=np.int64)
    found = _stood[kasmina] = _Standing(
        changes=kasmina.num_changes,
        settled=step >= int(kasmina.table.embargo_until.max(initial=0)),
        grown=grown,
        rows=_standing_rows(fixed, grown, free / fixed.chunks),
        eligible=(free == fixed.chunks) & ~kasmina.table.has_seeds(),
        params=kasmina.params,
        unit_params=np.array([cost.params for cost in costs], dtype=np.float64),
        unit_flops=np.array([cost.flops_per_row for cost in costs]),
        others=_alternative_costs(kasmina, fixed),
        fits=_fits(kasmina, fixed),
    )
    return found


def _standing_rows(
    fixed: _Fixed, grown: npt.NDArray[np.int64], free_share: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    rows = fixed.rows.copy()
    rows[:, _COLUMN["free_chunk_share"]] = free_share
    spans = fixed.hidden > 0
    if grown.any():
        rows[spans, _COLUMN["grown_share"]] = grown[spans] / fixed.hidden[spans]
    return rows


def _site_rows(fixed: _Fixed, standing: _Standing, verdicts: Verdicts, step: int) -> npt.NDArray[np.float64]:
    """All but what sensors tell."""
    table = standing.rows.copy()
    if verdicts.last_gain or verdicts.last_growth:
        for row, name in enumerate(fixed.names):
            table[row, _COLUMN["last_gain"]] = verdicts.last_gain.get(name, math.nan)
            table[row, _COLUMN["steps_since_growth"]] = step - verdicts.last_growth.get(name, math.nan)
    return table


class _Pressure:
    """The pressing chunks: looked for again when a gradient energy has changed."""

    def __init__(self) -> None:
        self._seen: list[bytes] = []
        self._found = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))

    def of(self, blocks: Blocks) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        energies = [block[:, 2].tobytes() for _, block in blocks]  # as bits: a NaN is what it was before
        if energies != self._seen:
            found = {int(n): one[2] for numbers, block in blocks for n, one in zip(numbers, block, strict=True)}
            self._seen, self._found = energies, _pressing([found[number] for number in range(len(found))])
        return self._found


def _pressing(
    energies: list[npt.NDArray[np.float32]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The chunks with the highest gradient energy, strongest first; silent chunks (NaN) are left out.

    A million chunks are ordinary: the cut is found without sorting them.
    """
    flat = np.concatenate(energies)
    known = np.isfinite(flat)
    if not known.any():
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    if flat.size > NUM_PRESSING:
        cut = np.partition(np.where(known, flat, -np.inf), -NUM_PRESSING)[-NUM_PRESSING]
        known &= flat >= cut
    candidates = np.flatnonzero(known)
    order = candidates[np.argsort(-flat[candidates], kind="stable")][:NUM_PRESSING]
    offsets = np.concatenate(([0], np.cumsum([len(energy) for energy in energies])))
    site = np.searchsorted(offsets, order, side="right") - 1
    return site.astype(np.int64), (order - offsets[site]).astype(np.int64), flat[order].astype(np.float64)
