"""Reference for the isolated fit: a step of Adam after the other, through autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.slot_adam import Rates, Stacks
from esper.kasmina.ops.slot_adam import step as slot_step


def fit(
    branch: Callable[[Tensor], Tensor], params: Sequence[Tensor], slots: Tensor, x: Tensor, wanted: Tensor,
    draws: Tensor, lr: float, eps: float = 1e-8,
) -> None:  # fmt: skip
    """Train ``params`` in place: Adam on the mean squared error between ``branch(x[rows])`` and ``wanted[rows]``.

    Parameters
    ----------
    params:
        Leaves that learn.
    slots:
        ``(S,)``: a tensor on the device, one number a slot of the bank.
    x, wanted:
        ``(N, ...)``; rows of ``x`` are converted to fp32 as they are taken.
    draws:
        ``(steps, B)`` integers on the CPU: the rows of each step.

    Nothing in the loop waits for the device: all draws are uploaded at once.
    """
    update = _optimizer(params, slots, lr, eps)
    with torch.enable_grad():
        for index in draws.to(x.device):
            loss = (branch(x[index].float()) - wanted[index]).square().mean()
            update(torch.autograd.grad(loss, params))


def _optimizer(params: Sequence[Tensor], slots: Tensor, lr: float, eps: float) -> Callable[[Sequence[Tensor]], None]:
    """What makes one step of Adam from gradients: the slots' fused optimizer where it runs, PyTorch's otherwise.

    The fused one leaves everything as it is where a gradient is not finite.
    """
    number = slots.numel()
    fusible = all(value.shape[0] == number and value.dtype == torch.float32 for value in params)
    if fusible and dispatch.runs_triton("slot_adam", slots):
        firsts, seconds = ([torch.zeros_like(value) for value in params] for _ in range(2))
        steps = torch.zeros(number, device=slots.device)
        bad_steps = torch.zeros((), dtype=torch.int64, device=slots.device)
        rates = Rates("adam", lr, 0.0, eps=eps)

        def fused(gradients: Sequence[Tensor]) -> None:
            slot_step(Stacks(params, gradients, firsts, seconds, steps, bad_steps), rates)

        return fused
    optimizer = torch.optim.Adam(params, lr, eps=eps)

    def plain(gradients: Sequence[Tensor]) -> None:
        for value, gradient in zip(params, gradients, strict=True):
            value.grad = gradient
        optimizer.step()

    return plain
