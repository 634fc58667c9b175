"""Isolated training: fit stacked branches to targets on captured rows. A pure function, testable without a Grower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from esper.kasmina.capture import Rows
from esper.kasmina.geometry import Geometry
from esper.kasmina.ops import fit as fit_op
from esper.kasmina.ops.fit import reference
from esper.kasmina.ops.graft import Seats


class Fittable(Protocol):
    """What can be fitted: a :class:`~esper.kasmina.bank.Bank`, or anything else with parameters and a branch."""

    geometry: Geometry
    params: dict[str, Tensor]
    alpha: Tensor
    columns: Tensor | None

    @property
    def flops_per_row(self) -> float: ...

    @property
    def own_seats(self) -> Seats | None: ...

    def pick(self, x: Tensor, y: Tensor) -> Tensor: ...

    def set_learning(self, learning: bool) -> None: ...

    def branch(
        self, x: Tensor, *, alpha: Tensor | None = None, training: bool, generator: torch.Generator | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class FitReport:
    """How well a fit holds on rows of batches it never saw.

    ``explained`` is the share of the target's energy explained (negative when worse than nothing); ``t_statistic``
    tests the branch's inner product with the target, clustered by sequence or image; ``flops`` is what the fit cost.
    """

    explained: float
    t_statistic: float
    flops: float


def fit(
    bank: Fittable, rows: Rows, target: Tensor, *, steps: int, batch_rows: int, lr: float, generator: torch.Generator
) -> float:
    """Train ``bank`` in place towards ``target`` by mean squared error with Adam, all slots at once.

    ``target`` has the shape of ``rows.y``; a slot sees its own columns only. Minibatches are drawn from ``generator``
    (a CPU generator), and dropout is off: the target is a function of x. Returns the FLOPs spent.

    Nothing in it waits for the device: all draws are uploaded at once.
    """
    bank.set_learning(True)
    total, size = rows.x.shape[0], _minibatch(bank, rows, batch_rows)
    draws = torch.randint(total, (steps, size), generator=generator)
    seats, params = bank.own_seats, bank.params
    if seats is not None:
        fit_op.fit(params["w1"], params["b1"], params["w2"], seats, rows.y, target, draws, lr)
    else:
        ones = torch.ones_like(bank.alpha)

        def branch(x: Tensor) -> Tensor:
            return bank.branch(x, alpha=ones, training=True, generator=None)

        read = bank.pick(rows.x, rows.y)
        reference.fit(branch, list(params.values()), bank.alpha, read, _columns(bank, target), draws, lr)
    bank.set_learning(False)
    return steps * step_flops(bank, rows, batch_rows)


def step_flops(bank: Fittable, rows: Rows, batch_rows: int) -> float:
    """What one step of :func:`fit` costs: a forward, and a backward at twice its cost."""
    positions = max(1, rows.positions // max(1, rows.x.shape[0]))
    return 3.0 * _minibatch(bank, rows, batch_rows) * positions * bank.flops_per_row


def _minibatch(bank: Fittable, rows: Rows, batch_rows: int) -> int:
    """Rows (images) of one step."""
    total = rows.x.shape[0]
    if not bank.geometry.kind.channels_first:
        return min(total, batch_rows)
    return min(total, max(1, batch_rows // max(1, rows.positions // max(1, total))))


@torch.no_grad()
def check(bank: Fittable, rows: Rows, target: Tensor, *, batch_rows: int) -> FitReport:
    """Measure a fitted bank on rows of other batches than it was trained on."""
    ones = torch.ones_like(bank.alpha)
    wanted = _columns(bank, target)
    residual, energy = 0.0, 0.0
    products: list[Tensor] = []
    positions = max(1, rows.positions // max(1, rows.x.shape[0]))
    size = max(1, batch_rows // positions) if bank.geometry.kind.channels_first else batch_rows
    for start in range(0, rows.x.shape[0], size):
        part = slice(start, start + size)
        read = bank.pick(rows.x[part], rows.y[part]).float()
        out = bank.branch(read, alpha=ones, training=False, generator=None)
        residual += float((out - wanted[part]).square().sum())
        energy += float(wanted[part].square().sum())
        products.append((out * wanted[part]).flatten(1).sum(1))
    explained = 1.0 - residual / energy if energy > 0 else float("nan")
    flops = float(rows.positions) * bank.flops_per_row
    return FitReport(explained, clustered_t(torch.cat(products), rows.cluster), flops)


def clustered_t(values: Tensor, cluster: Tensor) -> float:
    """t statistic of the mean of per-cluster sums; NaN with fewer than two clusters or no spread.

    Rows of one sequence or image are not independent, so they count as one observation (Liang & Zeger 1986).
    """
    unique, inverse = torch.unique(cluster, return_inverse=True)
    if unique.numel() < 2:
        return float("nan")
    sums = torch.zeros(unique.numel(), device=values.device, dtype=torch.float64)
    sums.index_add_(0, inverse, values.double())
    spread = sums.std() / unique.numel() ** 0.5
    return float(sums.mean() / spread) if float(spread) > 0 else float("nan")


def _columns(bank: Fittable, target: Tensor) -> Tensor:
    if bank.columns is None:
        return target.float()
    flat = bank.columns.reshape(-1).to(target.device)
    return target.index_select(bank.geometry.feature_axis, flat).float()
