"""Turn the state of a run into what a controller sees: plain arrays, one snapshot of all sites."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from esper.kasmina.blueprints import BLUEPRINTS, Cost
from esper.kasmina.defaults import default_blueprint
from esper.kasmina.execution import Kasmina
from esper.kasmina.site import Site
from esper.kasmina.telemetry import snapshots
from esper.protocol import SITE_FEATURES, CohortView, Lifecycle, Observation, Verdict

_COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}
_SENSORS = slice(_COLUMN["activation_mean"], _COLUMN["gradient_energy"] + 1)
"""Mean, variance and gradient energy stand side by side, as in a snapshot."""
NUM_PRESSING = 64
"""Chunks listed as pressing; a controller that wants more can read the telemetry itself."""


def observe(
    kasmina: Kasmina,
    *,
    step: int,
    total_steps: int | None,
    held_out: float,
    held_out_initial: float,
    host_flops: float,
    budget_params: int | None,
    budget_flops: float | None,
    verdicts: Sequence[Verdict],
    stopped: str | None,
    losses: tuple[float, float] = (math.nan, math.nan),
    lr_share: float = math.nan,
    price: float = math.nan,
) -> Observation:
    """Build the observation. Waits for the device once (telemetry).

    ``losses`` are the mean of the latest training losses and its noise.
    """
    fixed = _fixed(kasmina)
    free = kasmina.table.num_free_chunks(step)
    refused = np.array([site.refused is not None for site in kasmina.sites.values()])
    grown = np.array([kasmina.units(name) for name in fixed.names], dtype=np.int64)
    rows, energies = _site_rows(kasmina, fixed, free / fixed.chunks, grown, verdicts, step)
    pressing = _pressing(energies)
    costs = [_unit_cost(site) for site in kasmina.sites.values()]
    others, fits = _alternative_costs(kasmina, fixed), _fits(kasmina, fixed)
    rows_per_step = np.array(list(kasmina.rows_per_step.values()))
    return Observation(
        step=step,
        total_steps=total_steps,
        held_out=held_out,
        held_out_initial=held_out_initial,
        params=kasmina.params,
        host_params=kasmina.host_params,
        budget_params=budget_params,
        flops_per_step=host_flops + kasmina.added_flops_per_step(),
        host_flops_per_step=host_flops,
        budget_flops=budget_flops,
        site_names=fixed.names,
        sites=rows,
        hidden=fixed.hidden.copy(),
        grown=grown,
        eligible=(free == fixed.chunks) & ~kasmina.table.has_seeds() & ~refused,
        chunk_site=pressing[0],
        chunk_index=pressing[1],
        chunk_pressure=pressing[2],
        alive=tuple(_view(kasmina, number, step) for number in kasmina.cohorts),
        verdicts=tuple(verdicts),
        stopped=stopped,
        unit_params=np.array([cost.params for cost in costs], dtype=np.float64),
        unit_flops=np.array([cost.flops_per_row for cost in costs]) * rows_per_step,
        train_loss=losses[0],
        loss_noise=losses[1],
        lr_share=lr_share,
        price=price,
        fit_explained=fits[0],
        fit_error=fits[1],
        alternatives=fixed.alternatives,
        alternative_params=others[0].copy(),
        alternative_flops=others[1] * rows_per_step[:, None],
    )


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
        cost = blueprint.cost(site.geometry, units=1, columns=site.info.out_features, reads=site.reads)
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
    rows: npt.NDArray[np.float64]
    """Site features as long as nothing has grown; NaN where sensors tell."""
    alternatives: tuple[str, ...]
    """Blueprints that can sit on some site besides its default one."""
    sits: tuple[tuple[int, int], ...]
    """Row and alternative that go together."""
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
        found = _known[kasmina] = _Fixed(tuple(kasmina.sites), chunks, hidden, rows, *_alternatives(kasmina))
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
    kasmina: Kasmina,
    fixed: _Fixed,
    free_share: npt.NDArray[np.float64],
    grown: npt.NDArray[np.int64],
    verdicts: Sequence[Verdict],
    step: int,
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float32]]]:
    table = fixed.rows.copy()
    table[:, _COLUMN["free_chunk_share"]] = free_share
    if grown.any():
        spans = fixed.hidden > 0
        table[spans, _COLUMN["grown_share"]] = grown[spans] / fixed.hidden[spans]
    sensed = snapshots([site.telemetry for site in kasmina.sites.values() if site.telemetry is not None])
    for row, (name, snapshot) in enumerate(zip(fixed.names, sensed, strict=True)):
        table[row, _SENSORS] = np.add.reduce(snapshot, axis=1) / snapshot.shape[1]
        past = [verdict for verdict in verdicts if name in verdict.sites]
        if past:
            table[row, _COLUMN["last_gain"]] = past[-1].gain
        kept = [verdict.step for verdict in past if verdict.state is Lifecycle.FOSSILIZED]
        if kept:
            table[row, _COLUMN["steps_since_growth"]] = step - kept[-1]
    return table, [snapshot[2] for snapshot in sensed]


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
