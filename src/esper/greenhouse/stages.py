"""One function a state, as in :mod:`esper.stages`: what a cohort of one host needs to leave it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from esper.config import FitConfig
from esper.evidence.acceptance import UNJUDGED
from esper.evidence.paired import PairedResult
from esper.evidence.shrinkage import shrink_gains
from esper.fitting import FEWEST_STEPS
from esper.greenhouse.control import compared, switched_off
from esper.greenhouse.family import units_stream
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.isolated import Report, Units, drawn, fit, fit_rows, tiny
from esper.greenhouse.layout import live
from esper.greenhouse.life import Capture, Cohort, Seed
from esper.kasmina.gates import stability_gate
from esper.kasmina.lifecycle import is_active, learns_from_task
from esper.kasmina.strategies.fixed_ramp import ramp
from esper.protocol import Lifecycle, Verdict


def advance(hosts: Hosts, host: int) -> None:
    """Give every cohort of one host its turn, after a training step."""
    for cohort in list(hosts.lives[host].cohorts.values()):
        _STAGES[cohort.state](hosts, host, cohort)


def finish(hosts: Hosts) -> None:
    """End of training: what was accepted becomes permanent if it still holds, everything else leaves."""
    for host, life in enumerate(hosts.lives):
        life.stopped = life.stopped or "end of training"
        for cohort in [c for c in life.cohorts.values() if c.state is Lifecycle.FINE_TUNING]:
            decide_hold(hosts, host, cohort)
        for cohort in list(life.cohorts.values()):
            if bool(is_active(int(cohort.state))):
                end(hosts, host, cohort, Lifecycle.ROLLED_BACK, "training ended before it was judged")
            else:
                _remove(hosts, host, cohort)
    hosts.measure(range(len(hosts)))


# ----------------------------------------------------------------------------------------------------- the states


def _germinated(hosts: Hosts, host: int, cohort: Cohort) -> None:
    life, capture = hosts.lives[host], hosts.config.capture
    waiting = [site for site in cohort.seeds if site in life.captures]
    if all(len(life.captures[site].x) >= capture.batches for site in waiting):
        _move(hosts, host, cohort, Lifecycle.TRAINING)
    elif hosts.step_count - cohort.entered >= capture.timeout:
        end(hosts, host, cohort, Lifecycle.CANCELLED, "capture: out of time")


def _training(hosts: Hosts, host: int, cohort: Cohort) -> None:
    life = hosts.lives[host]
    for site, seed in cohort.seeds.items():
        capture = life.captures.pop(site, None)
        if capture is not None:
            life.fitted.add(site)
        if not _prepare(hosts, host, cohort, site, seed, capture):
            end(hosts, host, cohort, Lifecycle.CULLED, "sanity: no captured batch can be used")
            return
    _move(hosts, host, cohort, Lifecycle.GRAFTING)
    cohort.grafted = True
    if all(seed.preserves_function for seed in cohort.seeds.values()):
        _set_alpha(hosts, host, cohort, 1.0)
    else:
        _choose_scale(hosts, host, cohort)


def _grafting(hosts: Hosts, host: int, cohort: Cohort) -> None:
    graft, spent = hosts.config.graft, hosts.step_count - cohort.entered
    reached = cohort.alpha >= 1.0 - 1e-6
    if reached and spent >= graft.ramp_steps + graft.settle_steps:
        _move(hosts, host, cohort, Lifecycle.STABILIZATION)
    elif spent >= graft.timeout:
        end(hosts, host, cohort, Lifecycle.CULLED, "out of time: ramp")
    elif not reached:
        alpha = ramp(graft.ramp, (cohort.ramped + 1) / graft.ramp_steps)
        if alpha > cohort.alpha:
            cohort.ramped += 1
            _set_alpha(hosts, host, cohort, alpha)


def _stabilization(hosts: Hosts, host: int, cohort: Cohort) -> None:
    graft, spent = hosts.config.graft, hosts.step_count - cohort.entered
    window = np.array(hosts.lives[host].losses)
    if stability_gate(window, steps=spent, min_steps=graft.stabilize_steps).passed:
        _move(hosts, host, cohort, Lifecycle.EVALUATING)
    elif spent >= graft.timeout:
        end(hosts, host, cohort, Lifecycle.CULLED, "out of time: stability")


def _evaluating(hosts: Hosts, host: int, cohort: Cohort) -> None:
    if hosts.config.evidence.accept == "always":
        _move(hosts, host, cohort, Lifecycle.FINE_TUNING)
        return
    differences, calibration = compared(hosts, host, cohort)
    further = _another_look_fits(hosts)
    look = hosts.lives[host].evidence.evaluate(cohort.number, differences, calibration, further=further)
    _note_gain(hosts, host, cohort, look.result)
    if look.gate.passed:
        _move(hosts, host, cohort, Lifecycle.FINE_TUNING)
    elif look.undecided:
        _move(hosts, host, cohort, Lifecycle.GRAFTING)
    else:
        end(hosts, host, cohort, Lifecycle.CULLED, look.gate.reason)


def _another_look_fits(hosts: Hosts) -> bool:
    graft = hosts.config.graft
    needed = graft.ramp_steps + graft.settle_steps + graft.stabilize_steps + graft.fine_tune_steps
    return hosts.step_count + needed < hosts.total_steps


def _fine_tuning(hosts: Hosts, host: int, cohort: Cohort) -> None:
    if hosts.step_count - cohort.entered >= hosts.config.graft.fine_tune_steps:
        decide_hold(hosts, host, cohort)


def decide_hold(hosts: Hosts, host: int, cohort: Cohort) -> None:
    """Make a fine-tuned cohort permanent if its gain still holds, remove it otherwise."""
    life = hosts.lives[host]
    if hosts.config.evidence.accept == "always":
        _fossilise(hosts, host, cohort, UNJUDGED.reason)
        return
    _, gate = life.evidence.hold(
        switched_off(hosts, host, cohort), held_out=life.held_out, flops_share=cohort.added_flops_share
    )
    if gate.passed:
        _fossilise(hosts, host, cohort, gate.reason)
    else:
        end(hosts, host, cohort, Lifecycle.CULLED, gate.reason)


def _fading(hosts: Hosts, host: int, cohort: Cohort) -> None:
    cohort.fading += 1
    left = max(0.0, 1.0 - cohort.fading / max(1, hosts.config.graft.cull_steps))
    _set_alpha(hosts, host, cohort, cohort.fading_from * left)
    if left == 0.0:
        _remove(hosts, host, cohort)


_STAGES: dict[Lifecycle, Callable[[Hosts, int, Cohort], None]] = {
    Lifecycle.GERMINATED: _germinated,
    Lifecycle.TRAINING: _training,
    Lifecycle.GRAFTING: _grafting,
    Lifecycle.STABILIZATION: _stabilization,
    Lifecycle.EVALUATING: _evaluating,
    Lifecycle.FINE_TUNING: _fine_tuning,
    Lifecycle.CULLED: _fading,
    Lifecycle.CANCELLED: _fading,
}


# ----------------------------------------------------------------------------------------------------- ends


def end(hosts: Hosts, host: int, cohort: Cohort, target: Lifecycle, reason: str) -> None:
    """Bring a cohort to an end; what is in the forward pass fades out, or leaves at once on a rollback."""
    in_forward = cohort.grafted and cohort.alpha > 0
    _move(hosts, host, cohort, target)
    _add_verdict(hosts, host, cohort, reason)
    cohort.fading_from = cohort.alpha
    for site in cohort.seeds:
        hosts.lives[host].captures.pop(site, None)
    if target is Lifecycle.ROLLED_BACK or not in_forward:
        _remove(hosts, host, cohort)


def _remove(hosts: Hosts, host: int, cohort: Cohort) -> None:
    life = hosts.lives[host]
    for site, seed in cohort.seeds.items():
        hosts.network.uproot(host, site, seed.places)
        life.embargo[site] = hosts.step_count + hosts.config.graft.embargo
    del life.cohorts[cohort.number]


def _fossilise(hosts: Hosts, host: int, cohort: Cohort, reason: str) -> None:
    """Units join their site's annex; a seed on the site behind reads them from here on."""
    life = hosts.lives[host]
    cohort.state = Lifecycle.FOSSILIZED
    _add_verdict(hosts, host, cohort, reason)
    del life.cohorts[cohort.number]
    for site, seed in cohort.seeds.items():
        hosts.network.keep(host, site, seed.places)
        life.grown[site] += seed.units
        behind = hosts.body.behind(site)
        reader = None if behind is None else life.seed_on(behind)
        if reader is not None:
            reader.reads += seed.units
    hosts.network.refresh(host)


def _add_verdict(hosts: Hosts, host: int, cohort: Cohort, reason: str) -> None:
    life, names = hosts.lives[host], hosts.site_names
    gain, low, high = cohort.gain
    if math.isfinite(gain) and cohort.gain_error > 0:
        life.looks.append((gain, cohort.gain_error))
    life.evidence.forget(cohort.number)
    life.verdicts.append(
        Verdict(
            cohort=cohort.number, step=hosts.step_count, state=cohort.state,
            sites=tuple(names[site] for site in cohort.seeds), gain=gain, gain_low=low, gain_high=high,
            added_params=cohort.added_params, added_flops_share=cohort.added_flops_share, reason=reason,
            gain_shrunken=cohort.gain_shrunken,
        )
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- how


def _move(hosts: Hosts, host: int, cohort: Cohort, target: Lifecycle) -> None:
    cohort.state, cohort.entered = target, hosts.step_count
    for site in cohort.seeds:
        hosts.network.learns[host, live(site)] = float(bool(learns_from_task(int(target))))


def _set_alpha(hosts: Hosts, host: int, cohort: Cohort, alpha: float) -> None:
    cohort.alpha = alpha
    for site, seed in cohort.seeds.items():
        hosts.network.set_alpha(host, site, seed.places, alpha)


def _prepare(hosts: Hosts, host: int, cohort: Cohort, site: int, seed: Seed, capture: Capture | None) -> bool:
    """First weights of one seed: random with an output of zero, or fitted where that is affordable and holds; returns
    whether there was anything to fit and to check it on, where that was tried."""
    stream = units_stream(hosts.specs[host], cohort.number, site)
    units = hosts.given_units.get((host, cohort.number, site))
    if units is None:
        units = drawn(seed.units, seed.reads, seed.columns, _stds(hosts, host, site), stream, hosts.body.taps(site))
    units = units.to(hosts.dtype)
    seed.preserves_function = True
    report = None if capture is None else _fitted(hosts, host, cohort, site, units, capture, stream)
    if report is not None:
        if not (math.isfinite(report.explained) or math.isfinite(report.t_statistic)):
            return False
        hosts.lives[host].ledger.add("fit", report.flops)
        seed.explained, seed.t_statistic = report.explained, report.t_statistic
        seed.preserves_function = not report.t_statistic >= hosts.config.fit.min_t
    if seed.preserves_function:
        units.w2.zero_()
    hosts.network.write(host, site, seed.places, units)
    return True


def _fitted(
    hosts: Hosts, host: int, cohort: Cohort, site: int, units: Units, capture: Capture, stream: torch.Generator
) -> Report | None:
    """Make the seed's units from what was captured; ``None`` where that is not affordable."""
    seed = cohort.seeds[site]
    capture.x = [F.pad(x, (0, seed.reads - x.shape[1])) for x in capture.x]
    if seed.start == "tiny":
        hidden = hosts.hidden_flops(host, site)
        return tiny(units, capture, hosts.network.units_of(host, site), hosts.config.fit, hidden_flops=hidden)
    config = _affordable(hosts, host, cohort, seed, capture)
    return None if config is None else fit(units, capture, config, steps=config.steps, generator=stream)


def _affordable(hosts: Hosts, host: int, cohort: Cohort, seed: Seed, capture: Capture) -> FitConfig | None:
    config = hosts.config.fit
    if config.max_share is None:
        return config
    training = 3.0 * hosts.flops(host, hosts.family.batch_rows)
    left = (hosts.total_steps - hosts.step_count) * training * (1.0 + cohort.added_flops_share)
    one = 3.0 * fit_rows(capture, config) * seed.flops_per_row
    steps = min(config.steps, int(config.max_share * left / len(cohort.seeds) / max(1.0, one)))
    return replace(config, steps=steps) if steps >= min(FEWEST_STEPS, config.steps) else None


def _stds(hosts: Hosts, host: int, site: int) -> tuple[float, float]:
    """Deviations of the host's own weights at both ends of a site."""
    weights, span, own = hosts.network.weights, hosts.body.spans[site], hosts.lives[host].widths[site]
    head = weights[span.head][0][host, :own, : hosts.own_inputs_of(host, site)]
    tail = weights[span.tail][0][host, : hosts.outputs_of(host, site), :own]
    return _std(head), _std(tail)


def _std(weight: torch.Tensor) -> float:
    value = float(weight.float().std()) if weight.numel() > 1 else 0.0
    return value if 0 < value < math.inf else 0.02


def _choose_scale(hosts: Hosts, host: int, cohort: Cohort) -> None:
    """Size of fitted branches by real held-out losses on calibration batches; zero if none helps."""
    calibration = list(hosts.lives[host].evidence.splits.calibration)
    tried = [0.0, *hosts.config.fit.scales]
    values: list[float] = []
    for alpha in tried:
        for site, seed in cohort.seeds.items():
            hosts.network.set_alpha(host, site, seed.places, alpha)
        values.append(float(hosts.batch_losses([host], calibration).mean()))
    hosts.count_evaluations(host, len(tried) * len(calibration))
    best, least = 0.0, values[0]
    for scale, loss in zip(tried[1:], values[1:], strict=True):
        if math.isfinite(loss) and loss < least:
            best, least = scale, loss
    for site, seed in cohort.seeds.items():
        hosts.network.scale_output(host, site, seed.places, best)
    _set_alpha(hosts, host, cohort, 1.0 if best == 0.0 else cohort.alpha)


def _note_gain(hosts: Hosts, host: int, cohort: Cohort, result: PairedResult) -> None:
    cohort.gain, cohort.gain_error = (result.mean, result.low, result.high), result.standard_error
    cohort.gain_shrunken = result.mean
    if math.isfinite(result.mean) and cohort.gain_error > 0:
        looks = [*hosts.lives[host].looks, (result.mean, cohort.gain_error)]
        cohort.gain_shrunken = float(shrink_gains([gain for gain, _ in looks], [size for _, size in looks])[-1])
