"""What a cohort of a stacked host is compared with: as :class:`esper.evidence.judge.Judge` with either control."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.evidence.acceptance import Differences
from esper.evidence.control import ridge, ridge_flops, sums_of
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.layout import Weights
from esper.greenhouse.life import Cohort


def switched_off(hosts: Hosts, host: int, cohort: Cohort) -> Differences:
    """Held-out losses without minus with the cohort: batches run, and count, as they are asked for."""
    return _between(hosts, host, _without(hosts, host, cohort))


def compared(hosts: Hosts, host: int, cohort: Cohort) -> tuple[Differences, list[float]]:
    """The configured control's differences, and those on the calibration batches.

    ``projected``: the better (on calibration batches) of switching off and letting the host's layers stand in.
    """
    calibration = list(hosts.lives[host].evidence.splits.calibration)
    alphas = _without(hosts, host, cohort)
    is_plain = hosts.config.evidence.control == "plain"
    stand_in = None if is_plain else _stand_in(hosts, host, cohort, calibration)
    if stand_in is None:
        differences = _between(hosts, host, alphas)
        return differences, differences(calibration)
    present = hosts.batch_losses([host], calibration)[0]
    off = hosts.batch_losses([host], calibration, alphas)[0]
    stood_in = hosts.batch_losses([host], calibration, alphas, stand_in)[0]
    hosts.count_evaluations(host, 3 * len(calibration))
    is_better = bool(stood_in.mean() < off.mean())
    gaps = (stood_in if is_better else off) - present
    return _between(hosts, host, alphas, stand_in if is_better else None), gaps.tolist()


def _without(hosts: Hosts, host: int, cohort: Cohort) -> list[Tensor]:
    alphas = [alpha[[host]].clone() for alpha in hosts.network.alphas]
    for site, seed in cohort.seeds.items():
        alphas[site][0, seed.places] = 0.0
    return alphas


def _between(hosts: Hosts, host: int, alphas: list[Tensor], weights: Weights | None = None) -> Differences:
    def differences(indices: Sequence[int]) -> list[float]:
        hosts.count_evaluations(host, 2 * len(indices))
        without = hosts.batch_losses([host], indices, alphas, weights)
        return (without - hosts.batch_losses([host], indices))[0].tolist()

    return differences


def _stand_in(hosts: Hosts, host: int, cohort: Cohort, calibration: list[int]) -> Weights | None:
    """The host's weights ``(1, ...)`` with what its layers could take over of the cohort; ``None``: not finite."""
    network, body = hosts.network, hosts.body
    weights = [(weight[[host]].clone(), bias[[host]].clone()) for weight, bias in network.weights]
    x = hosts.held_out_rows(host, calibration)
    run = body.forward(weights, x[None], [alpha[[host]] for alpha in network.alphas])
    most = len(calibration) * -(-hosts.config.evidence.projection_rows // len(calibration))
    found: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for site, seed in cohort.seeds.items():
        tail, columns, reads = body.spans[site].tail, hosts.outputs_of(host, site), network.kept_places(host, site)
        written = weights[tail][0][0][:columns, seed.places].flatten(1)
        delta = body.tail_rows(run, site, 0, seed.places)[:most] @ written.t()
        phi = body.tail_rows(run, site, 0, reads)[:most]
        sums = sums_of(phi.double(), delta.double())
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            return None
        found.append((tail, reads, *ridge(len(phi), sums)))
        hosts.lives[host].ledger.add("evidence", ridge_flops(len(phi), phi.shape[1], columns))
    for tail, reads, weight, bias in found:
        target, offset = weights[tail]
        rows = weight.shape[0]
        target[0, :rows, reads] += weight.view(rows, len(reads), *target.shape[3:]).to(target.dtype)
        offset[0, :rows] += bias.to(offset.dtype)
    return weights
