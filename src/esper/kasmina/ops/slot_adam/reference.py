"""Reference for the slot optimizer: plain PyTorch, one parameter after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from esper.kasmina.ops.slot_adam import Rates, Stacks


def step(stacks: Stacks, rates: Rates, learning: Tensor | None, inverse_scale: float) -> None:
    """One update in place; arguments as of :func:`esper.kasmina.ops.slot_adam.step`."""
    steps = stacks.steps
    finite = torch.isfinite(torch.stack([gradient.sum() for gradient in stacks.gradients]).sum())
    stacks.bad_steps.add_(~finite)
    mask = finite.to(steps.dtype) * (torch.ones_like(steps) if learning is None else learning)
    steps.add_(mask)
    warm = (steps / max(1, rates.warmup_steps)).clamp(max=1.0)
    lr = rates.lr * warm * mask
    for number, gradient in enumerate(stacks.gradients):
        shape = (-1, *[1] * (gradient.dim() - 1))
        gradient = torch.where(finite, gradient.float() * inverse_scale, 0.0)
        second = stacks.seconds[number] if stacks.seconds else None
        _update(
            stacks.values[number], gradient, stacks.firsts[number], second, rates,
            lr.view(shape), mask.view(shape), steps.view(shape),
        )  # fmt: skip


def _update(
    value: Tensor, gradient: Tensor, first: Tensor, second: Tensor | None, rates: Rates, lr: Tensor, mask: Tensor,
    steps: Tensor,
) -> None:  # fmt: skip
    if second is None:
        gradient = gradient + rates.weight_decay * value
        first.copy_(torch.where(mask > 0, rates.momentum * first + gradient, first))
        direction = gradient + rates.momentum * first if rates.nesterov else first
        value.sub_(lr * direction)
        return
    if rates.rule == "adam":
        gradient = gradient + rates.weight_decay * value
    else:
        value.mul_(1.0 - lr * rates.weight_decay)
    beta1, beta2 = rates.betas
    first.add_((gradient - first) * ((1.0 - beta1) * mask))
    second.add_((gradient.square() - second) * ((1.0 - beta2) * mask))
    counted = steps.clamp(min=1.0)
    root = (second / (1.0 - beta2**counted)).sqrt_().add_(rates.eps)
    value.sub_(lr / (1.0 - beta1**counted) * first / root)
