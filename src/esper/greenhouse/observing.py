"""One host of a stack as a controller sees it: the observation that a grower on the same host would give."""

from __future__ import annotations

import math

import numpy as np

from esper.greenhouse.germination import eligible
from esper.greenhouse.hosts import Hosts
from esper.protocol import SITE_FEATURES, CohortView, Lifecycle, Observation

_COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}


def observe(hosts: Hosts, host: int) -> Observation:
    """Look at one host at a decision point. The pressing chunks are left out: a seed takes a whole site here."""
    life, batch, sites = hosts.lives[host], hosts.family.batch_rows, hosts.num_sites
    spans = hosts.body.spans
    features = [(hosts.inputs_of(host, site), hosts.outputs_of(host, site)) for site in range(sites)]
    losses = np.array(life.losses if life.early is None else life.early, dtype=np.float64)
    mean = float(losses.mean()) if losses.size else math.nan
    noise = float(losses.std(ddof=1)) / abs(mean) if losses.size > 1 and mean != 0 else math.nan
    share = 0.5 + 0.5 * math.cos(math.pi * max(0, hosts.step_count - 1) / hosts.total_steps)
    fits = _fits(hosts, host)
    return Observation(
        step=hosts.step_count,
        total_steps=hosts.total_steps,
        held_out=life.held_out,
        held_out_initial=life.held_out_initial,
        params=hosts.params(host),
        host_params=hosts.params(host, own=True),
        budget_params=hosts.config.budget.params,
        flops_per_step=hosts.flops(host, batch),
        host_flops_per_step=hosts.host_flops(host, batch),
        budget_flops=None,
        site_names=hosts.site_names,
        sites=_site_rows(hosts, host),
        hidden=np.array(life.widths, dtype=np.int64),
        grown=_grown(hosts, host),
        eligible=np.array([eligible(hosts, host, site) for site in range(sites)]),
        chunk_site=np.zeros(0, np.int64),
        chunk_index=np.zeros(0, np.int64),
        chunk_pressure=np.zeros(0),
        alive=_alive(hosts, host),
        verdicts=tuple(life.verdicts),
        stopped=life.stopped,
        unit_params=np.array([span.params(1, *ends) for span, ends in zip(spans, features, strict=True)], np.float64),
        unit_flops=np.array([batch * span.flops(1, *ends) for span, ends in zip(spans, features, strict=True)]),
        train_loss=mean,
        loss_noise=noise,
        lr_share=share,
        price=hosts.config.tamiyo.min_gain_per_cost,
        fit_explained=fits[0],
        fit_error=fits[1],
    )


def _grown(hosts: Hosts, host: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    grown = np.array(hosts.lives[host].grown, dtype=np.int64)
    for cohort in hosts.lives[host].cohorts.values():
        if cohort.grafted:
            for site, seed in cohort.seeds.items():
                grown[site] += seed.units
    return grown


def _site_rows(hosts: Hosts, host: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    life = hosts.lives[host]
    table = np.full((hosts.num_sites, len(SITE_FEATURES)), np.nan)
    grown = _grown(hosts, host)
    for site, name in enumerate(hosts.site_names):
        free = life.seed_on(site) is None and life.embargo[site] <= hosts.step_count
        values = {
            "is_span": 1.0,
            "is_conv": float(hosts.body.kind.is_conv),
            "log_in": math.log(hosts.own_inputs_of(host, site)),
            "log_hidden": math.log(life.widths[site]),
            "log_out": math.log(hosts.outputs_of(host, site)),
            "grown_share": grown[site] / life.widths[site],
            "free_chunk_share": float(free),
        }
        if site in life.sensed:
            values["activation_mean"], values["activation_var"] = life.sensed[site]
        if site in life.fitted:
            values["gradient_energy"] = 1.0  # captured gradients are scaled to it
        past = [verdict for verdict in life.verdicts if name in verdict.sites]
        if past:
            values["last_gain"] = past[-1].gain
        kept = [verdict.step for verdict in past if verdict.state is Lifecycle.FOSSILIZED]
        if kept:
            values["steps_since_growth"] = hosts.step_count - kept[-1]
        for column, value in values.items():
            table[site, _COLUMN[column]] = value
    return table


def _alive(hosts: Hosts, host: int) -> tuple[CohortView, ...]:
    names = hosts.site_names
    return tuple(
        CohortView(
            cohort=cohort.number, state=cohort.state, steps_in_state=hosts.step_count - cohort.entered,
            sites=tuple(names[site] for site in cohort.seeds), num_seeds=len(cohort.seeds), alpha=cohort.alpha,
            added_params=cohort.added_params,
        )
        for cohort in hosts.lives[host].cohorts.values()
    )  # fmt: skip


def _fits(hosts: Hosts, host: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``(2, S)``: what fits of live seeds explained, and its standard error."""
    found = np.full((2, hosts.num_sites), np.nan)
    for cohort in hosts.lives[host].cohorts.values():
        for site, seed in cohort.seeds.items():
            if math.isfinite(seed.explained):
                t = seed.t_statistic
                found[:, site] = seed.explained, abs(seed.explained / t) if math.isfinite(t) and t != 0 else np.nan
    return found
