"""``gradmax`` (also ``gradient_svd``): new units whose first gradient is as large as it can be.

GradMax (Evci et al. 2022, arXiv:2201.05125). In-weights are zero, so the function is preserved; then the gradient of
the in-weights is ``W_out^T E[dL/dy x^T]`` times the activation's slope at 0, and among orthogonal out-weights of a
given norm it is largest for the top left singular vectors of that correlation. The vectors get the norm that the
host's own units have over as many columns (the published code's ``mean_norm``). For convolutions the correlation is
taken over unfolded patches, one row for each output channel and tap of the tail.

**Rank cap**: one direction a singular vector, so a seed has at most ``min(columns * taps of the tail, features read *
taps of the head)`` units. Where the rows carry fewer directions than that, the rest start random in, zero out.

On activations with a kink at 0 (ReLU) exact zeros get no gradient at all; as in the published code's ``epsilon``,
in-weights are then tiny and random: a ten-thousandth of the host's.
"""

from __future__ import annotations

import functools

import torch

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.geometry import Geometry
from esper.kasmina.starts.correlation import (
    blocks,
    by_slot,
    correlate,
    has_kink,
    rank_cap,
    refusal,
    taps,
    unit_inputs,
    write_units,
)
from esper.kasmina.starts.start import STARTS, HostUnits, Start, StartReport

EPSILON = 1e-4
"""In-weights on activations with a kink, as a share of the host's own."""
_RELATIVE_RANK = 1e-5
"""Singular values below this share of the largest are rounding."""


@STARTS.register("gradient_svd")  # the family's name stands for its first member
@STARTS.register("gradmax")
class GradMax(Start):
    needs_rows = True
    preserves_function = True
    sanity = "none"

    def refusal(self, blueprint: str, geometry: Geometry) -> str | None:
        return refusal("gradmax", blueprint, geometry)

    def max_units(self, geometry: Geometry, *, columns: int, reads: int) -> int | None:
        return rank_cap(geometry, columns=columns, reads=reads, constant=False)

    @torch.no_grad()
    def prepare(
        self,
        bank: Bank,
        rows: Rows | None,
        config: FitConfig,
        generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:
        geometry = bank.geometry
        if rows is None or rows.x.shape[0] == 0:
            bank.scale_output(0.0)
            return StartReport()
        parts = (
            correlate(unit_inputs(rows.x[part], geometry, constant=False), rows.g[part], geometry)
            for part in blocks(rows.x, geometry)
        )
        matrix = by_slot(functools.reduce(torch.add, parts) / rows.positions, bank)
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        num = min(bank.units, values.shape[1])
        chosen = values[:, :num] > _RELATIVE_RANK * values[:, :1]
        _, tail = taps(geometry)
        size = geometry.tail_std * (matrix.shape[1]) ** 0.5  # K columns times T taps
        write_units(bank, left[:, :, :num] * size, chosen)
        _shrink_inputs(bank, chosen, EPSILON if has_kink(geometry) else 0.0)
        head = matrix.shape[2]
        flops = 2.0 * rows.positions * head * geometry.out_features * tail
        return StartReport(flops=flops)


def _shrink_inputs(bank: Bank, chosen: torch.Tensor, factor: float) -> None:
    """Multiply the in-weights of chosen units; the rest stay random beside out-weights of zero."""
    w1 = bank.params["w1"]
    scale = torch.ones(w1.shape[:2], device=w1.device)
    scale[:, : chosen.shape[1]] = torch.where(chosen, factor, 1.0)
    w1.mul_(scale.view(*scale.shape, *[1] * (w1.dim() - 2)))
