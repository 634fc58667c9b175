"""What a cohort of a stacked host is compared with: as :class:`esper.evidence.judge.Judge` with either control."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.evidence.acceptance import Differences
from esper.evidence.control import ridge, ridge_flops, sums_of
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.life import Cohort
from esper.greenhouse.stack import Weights, forward


def switched_off(hosts: Hosts, host: int, cohort: Cohort) -> Differences:
    """Held-out losses without minus with the cohort: all batches at once, counted as they are asked for."""
    present = hosts.batch_losses([host])[0]
    return _between(hosts, host, hosts.batch_losses([host], _without(hosts, host, cohort))[0], present)


def compared(hosts: Hosts, host: int, cohort: Cohort) -> tuple[Differences, list[float]]:
    """The configured control's differences, and those on the calibration batches.

    ``projected``: the better (on calibration batches) of switching off and letting the host's layers stand in.
    """
    calibration = list(hosts.lives[host].evidence.splits.calibration)
    present, alphas = hosts.batch_losses([host])[0], _without(hosts, host, cohort)
    off = hosts.batch_losses([host], alphas)[0]
    is_plain = hosts.config.evidence.control == "plain"
    stand_in = None if is_plain else _stand_in(hosts, host, cohort, calibration)
    if stand_in is None:
        differences = _between(hosts, host, off, present)
        return differences, differences(calibration)
    stood_in = hosts.batch_losses([host], alphas, stand_in)[0]
    hosts.count_evaluations(host, 3 * len(calibration))
    chosen = stood_in if stood_in[calibration].mean() < off[calibration].mean() else off
    return _between(hosts, host, chosen, present), (chosen - present)[calibration].tolist()


def _without(hosts: Hosts, host: int, cohort: Cohort) -> list[Tensor]:
    alphas = [alpha[[host]].clone() for alpha in hosts.network.alphas]
    for site, seed in cohort.seeds.items():
        alphas[site][0, seed.places] = 0.0
    return alphas


def _between(hosts: Hosts, host: int, without: Tensor, present: Tensor) -> Differences:
    gaps = (without - present).tolist()

    def differences(indices: Sequence[int]) -> list[float]:
        hosts.count_evaluations(host, 2 * len(indices))
        return [gaps[index] for index in indices]

    return differences


def _stand_in(hosts: Hosts, host: int, cohort: Cohort, calibration: list[int]) -> Weights | None:
    """The host's weights ``(1, ...)`` with what its layers could take over of the cohort; ``None``: not finite."""
    network = hosts.network
    weights = [(weight[[host]].clone(), bias[[host]].clone()) for weight, bias in network.weights]
    x = hosts.held_out_rows(host, calibration)
    run = forward(weights, x[None], [alpha[[host]] for alpha in network.alphas])
    rows = min(len(x), len(calibration) * -(-hosts.config.evidence.projection_rows // len(calibration)))
    found: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for site, seed in cohort.seeds.items():
        weight, columns = weights[site + 1][0][0], hosts.outputs_of(host, site)
        hidden, reads = run.hidden[site + 1][0][:rows], network.read_places(host, site + 1)
        delta = hidden[:, seed.places] @ weight[:columns, seed.places].t()
        sums = sums_of(hidden[:, reads].double(), delta.double())
        if not all(bool(torch.isfinite(total).all()) for total in sums):
            return None
        found.append((site, reads, *ridge(rows, sums)))
        hosts.lives[host].ledger.add("evidence", ridge_flops(rows, reads.numel(), columns))
    for site, reads, weight, bias in found:
        tail, offset = weights[site + 1]
        tail[0, : weight.shape[0], reads] += weight.to(tail.dtype)
        offset[0, : bias.shape[0]] += bias.to(offset.dtype)
    return weights
