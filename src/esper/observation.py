"""Turn the state of a run into what a controller sees: plain arrays, one snapshot of all sites."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from esper.kasmina.blueprints import BLUEPRINTS, Cost
from esper.kasmina.defaults import default_blueprint
from esper.kasmina.execution import Kasmina
from esper.kasmina.site import Site
from esper.protocol import SITE_FEATURES, CohortView, Lifecycle, Observation, Verdict

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
) -> Observation:
    """Build the observation. Synchronises with the device once a site (telemetry)."""
    names = tuple(kasmina.sites)
    free = kasmina.table.num_free_chunks(step)
    refused = np.array([site.refused is not None for site in kasmina.sites.values()])
    chunks = np.array([site.info.num_chunks for site in kasmina.sites.values()])
    grown = np.array([kasmina.units(name) for name in names], dtype=np.int64)
    rows, energies = _site_rows(kasmina, free / chunks, grown, verdicts, step)
    pressing = _pressing(energies)
    costs = [_unit_cost(site) for site in kasmina.sites.values()]
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
        site_names=names,
        sites=rows,
        hidden=np.array([site.info.hidden_features for site in kasmina.sites.values()], dtype=np.int64),
        grown=grown,
        eligible=(free == chunks) & ~kasmina.table.has_seeds() & ~refused,
        chunk_site=pressing[0],
        chunk_index=pressing[1],
        chunk_pressure=pressing[2],
        alive=tuple(_view(kasmina, number, step) for number in kasmina.cohorts),
        verdicts=tuple(verdicts),
        stopped=stopped,
        unit_params=np.array([cost.params for cost in costs], dtype=np.float64),
        unit_flops=np.array([cost.flops_per_row for cost in costs]) * np.array(list(kasmina.rows_per_step.values())),
    )


def _unit_cost(site: Site) -> Cost:
    """What one more unit over all columns costs with the site kind's default blueprint."""
    blueprint = BLUEPRINTS[default_blueprint(site.info.kind)]
    return blueprint.cost(site.geometry, units=1, columns=site.info.out_features, reads=site.reads)


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


def _site_rows(
    kasmina: Kasmina, free_share: np.ndarray, grown: np.ndarray, verdicts: Sequence[Verdict], step: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    table = np.full((len(kasmina.sites), len(SITE_FEATURES)), np.nan)
    column = {name: index for index, name in enumerate(SITE_FEATURES)}
    energies: list[np.ndarray] = []
    sensors = [column[name] for name in ("activation_mean", "activation_var", "gradient_energy")]
    for row, (name, site) in enumerate(kasmina.sites.items()):
        info = site.info
        table[row, column["is_span"]] = info.kind.is_span
        table[row, column["is_conv"]] = info.kind.is_conv
        table[row, column["log_in"]] = math.log(info.in_features)
        table[row, column["log_out"]] = math.log(info.out_features)
        if info.hidden_features:
            table[row, column["log_hidden"]] = math.log(info.hidden_features)
            table[row, column["grown_share"]] = grown[row] / info.hidden_features
        table[row, column["free_chunk_share"]] = free_share[row]
        assert site.telemetry is not None
        snapshot = site.telemetry.snapshot()
        energies.append(snapshot[2])
        table[row, sensors] = snapshot.mean(axis=1)
        past = [verdict for verdict in verdicts if name in verdict.sites]
        if past:
            table[row, column["last_gain"]] = past[-1].gain
        kept = [verdict.step for verdict in past if verdict.state is Lifecycle.FOSSILIZED]
        if kept:
            table[row, column["steps_since_growth"]] = step - kept[-1]
    return table, energies


def _pressing(energies: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chunks with the highest gradient energy, strongest first; silent chunks (NaN) are left out.

    A million chunks are ordinary: the cut is found without sorting them.
    """
    flat = np.concatenate(energies)
    known = np.isfinite(flat)
    if flat.size > NUM_PRESSING:
        cut = np.partition(np.where(known, flat, -np.inf), -NUM_PRESSING)[-NUM_PRESSING]
        known &= flat >= cut
    candidates = np.flatnonzero(known)
    order = candidates[np.argsort(-flat[candidates], kind="stable")][:NUM_PRESSING]
    offsets = np.concatenate(([0], np.cumsum([len(energy) for energy in energies])))
    site = np.searchsorted(offsets, order, side="right") - 1
    return site.astype(np.int64), (order - offsets[site]).astype(np.int64), flat[order].astype(np.float64)
