"""Small fits on which the kernel must agree with its reference before it is used on a device."""

from __future__ import annotations

import torch

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.fit import loop, triton
from esper.kasmina.ops.graft import Seats

_CASES = (
    # rows, features, seeds, columns, hidden units, rows of a step, programs a group
    (90, 33, 4, 3, 5, 70, 1),
    (90, 40, 3, 4, 8, 100, 2),
    (60, 24, 1, 20, 17, 40, 1),
)
_EPS = 1e-2
"""As large as gradients are here. With a tiny one Adam divides every gradient by its own size, and where that is next
to nothing the last bits decide about a whole step."""


def check(device: torch.device) -> None:
    """Two steps of scattered seeds, alone with their rows or sharing them among programs.

    The reference computes in float64: in float32 it would follow the host's choice of matrix precision (TF32), which
    the kernel does not.

    Raises
    ------
    DisagreementError
        The results differ.
    """
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(device)

    for rows, features, seeds, width, units, batch, blocks in _CASES:
        columns = torch.randperm(features, generator=source)[: seeds * width].view(seeds, width)
        seats = Seats.of(columns, features, device)
        y, target = draw(rows, features), draw(rows, features)
        got = [draw(seeds, units, width), draw(seeds, units), draw(seeds, width, units)]
        exact = [value.double() for value in got]
        draws = torch.randint(rows, (2, batch), generator=source)
        triton.fit(*got, seats.columns, y, target, draws, 0.1, _EPS, runs=seats.runs, blocks=blocks)
        loop(*exact, seats, y.double(), target.double(), draws, 0.1, _EPS)
        dispatch.agree("fit", zip(got, exact, strict=True), 1e-4)
