"""Isolated fit: many small seeds trained for many steps on captured rows, each on its own columns."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.fit import reference
from esper.kasmina.ops.graft import Seats
from esper.kasmina.ops.graft import reference as branches

LARGEST = 64
"""Most columns or hidden units a seed may have in the kernel ..."""
MOST_PRODUCTS = 1024
"""... and most of both multiplied: weights and moments of more do not stay in registers. On an H100 seeds of 16 by 16
are fitted 11 times as fast as by the reference, seeds of 64 by 64 at three quarters of its speed (docs/speed.md)."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of captured rows that the kernel converts as it reads them."""


def takes(y: Tensor, target: Tensor, w1: Tensor) -> bool:
    """Whether the kernel runs for rows ``y`` and ``target`` ``(N, F)`` and seeds of the sizes of ``w1 (S, H, K)``."""
    hidden, columns = w1.shape[1:]
    fits = (
        max(hidden, columns) <= LARGEST
        and hidden * columns <= MOST_PRODUCTS
        and y.dim() == 2
        and w1.dtype == torch.float32
    )
    return fits and y.dtype in DTYPES and target.dtype in DTYPES and dispatch.runs_triton("fit", y)


@torch.no_grad()
def fit(
    w1: Tensor, b1: Tensor, w2: Tensor, seats: Seats, y: Tensor, target: Tensor, draws: Tensor, lr: float,
    eps: float = 1e-8,
) -> None:  # fmt: skip
    """Train every seed s in place: Adam on the mean of ``(W2_s silu(W1_s y[:, c_s] + b1_s) - target[:, c_s])^2``.

    Parameters
    ----------
    w1, b1, w2:
        ``(S, H, K)``, ``(S, H)``, ``(S, K, H)``, fp32.
    y, target:
        ``(N, F)``; a seed reads and is compared at its own columns ``c_s`` only. The mean is over a step's rows and all
        ``S*K`` columns, so that a seed learns as in a fit of them all.
    draws:
        ``(steps, B)`` integers, on the CPU or beside ``y``: the rows of each step.
    lr, eps:
        Adam's, with betas 0.9 and 0.999.

    A step of gradients that are not finite changes nothing: in the kernel for the group of seeds that has them, in the
    reference on a GPU for all. The kernel is one launch for all steps, and nothing waits for the device.
    """
    if takes(y, target, w1):
        from esper.kasmina.ops.fit import triton

        triton.fit(w1, b1, w2, seats.columns, y, target, draws, lr, eps, runs=seats.runs)
    else:
        loop(w1, b1, w2, seats, y, target, draws, lr, eps)


def loop(
    w1: Tensor, b1: Tensor, w2: Tensor, seats: Seats, y: Tensor, target: Tensor, draws: Tensor, lr: float,
    eps: float = 1e-8,
) -> None:  # fmt: skip
    """The same by the reference, in the type of the parameters."""
    params = [value.detach().requires_grad_() for value in (w1, b1, w2)]
    ones = torch.ones(w1.shape[0], device=w1.device, dtype=w1.dtype)

    def branch(x: Tensor) -> Tensor:
        return branches.project(branches.hidden(x.to(w1.dtype), params[0], params[1]), params[2], ones)

    x, wanted = (rows.index_select(1, seats.flat) for rows in (y, target))
    reference.fit(branch, params, ones, x, wanted.to(w1.dtype), draws, lr, eps)
