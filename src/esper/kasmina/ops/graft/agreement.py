"""A small problem on which the graft kernels must agree with their reference before they are used on a device."""

from __future__ import annotations

import torch

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.graft import Seats, reference, triton


def check(device: torch.device) -> None:
    """Scattered seeds of 3 columns, one of 20, and chunks of 4 with what lies between, both ways.

    The reference computes in float64: in float32 it would follow the host's choice of matrix precision (TF32), which
    the kernels do not.

    Raises
    ------
    DisagreementError
        The results differ.
    """
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(device)

    for rows, features, seeds, width, units in (
        (40, 33, 7, 3, 5), (9, 24, 1, 20, 17), (40, 48, 5, 4, 5), (40, 48, 8, 4, 20),
    ):  # fmt: skip
        if width == 4:
            side_by_side = torch.arange(seeds)  # groups of three end where no vector of 16 bytes does
            anywhere = torch.randperm(features // width, generator=source)[:seeds].sort().values
            chosen = side_by_side if units == 20 else anywhere
            columns = chosen[:, None] * width + torch.arange(width)
        else:
            columns = torch.randperm(features, generator=source)[: seeds * width].view(seeds, width)
        seats = Seats.of(columns, features, device)
        y, g, alpha = draw(rows, features), draw(rows, features), draw(seeds)
        w1, b1, w2 = draw(seeds, units, width), draw(seeds, units), draw(seeds, width, units)
        copy = seats.rising
        out, gy = (torch.empty_like(t) if copy else t.clone() for t in (y, g))
        read = y.new_empty(rows, seeds * width)
        triton.forward(y, out, read, w1, b1, w2, alpha, seats.columns, runs=seats.runs, copy=copy)
        found = triton.backward(
            g, read, gy, w1, b1, w2, alpha, seats.columns, seats.own,
            runs=seats.runs, read_runs=seats.own_runs, weights=True, copy=copy,
        )  # fmt: skip
        exact = (w1.double(), b1.double(), w2.double(), alpha.double())
        gx, g1, gb, g2 = reference.gradients(g[:, seats.flat].double(), y[:, seats.flat].double(), *exact)
        pairs = [
            (out, reference.graft(y.double(), *exact, seats.flat)),
            (gy, g.double().index_add(1, seats.flat, gx)),
            (found, torch.cat([g1.flatten(), g2.flatten(), gb.flatten()])),
        ]
        dispatch.agree("graft", pairs, 1e-4)
