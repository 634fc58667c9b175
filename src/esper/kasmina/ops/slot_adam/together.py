# PyTorch has these operations on lists for its own optimizers; none of them has a public name.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
"""Several banks in one step, by operations on lists of tensors: the numbers of the reference, bit for bit.

A step of the reference is dozens of small operations a parameter, and Python takes longer to ask for each of them than
a CPU takes to do it. What belongs to a slot (its rate, its bias corrections) is computed once a bank, not once a
parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.kasmina.ops.slot_adam import reference

if TYPE_CHECKING:
    from esper.kasmina.ops.slot_adam import Rates, Stacks


Tensors = list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class _Slots:
    """Numbers of each bank's slots ``(S,)``: how far a slot moves, and what its gradient and moments are scaled by."""

    rate: Tensors
    decay: Tensors
    first: Tensors
    second: Tensors
    correction: Tensors


def step(banks: Sequence[Stacks], rates: Rates, inverse_scale: float) -> None:
    """As :func:`reference.step <esper.kasmina.ops.slot_adam.reference.step>` of each, all slots learning."""
    if rates.rule == "sgd" or len(banks) == 1:
        for stacks in banks:
            reference.step(stacks, rates, None, inverse_scale)
        return
    finite = torch.isfinite(torch.stack([torch.stack([g.sum() for g in bank.gradients]).sum() for bank in banks]))
    torch._foreach_add_([bank.bad_steps for bank in banks], list((~finite).unbind()))
    slots = _slots([bank.steps for bank in banks], finite, rates)
    values = [value for bank in banks for value in bank.values]
    firsts = [first for bank in banks for first in bank.firsts]
    seconds = [second for bank in banks for second in bank.seconds]
    gradients = [gradient.float() for bank in banks for gradient in bank.gradients]
    if inverse_scale != 1.0:
        gradients = torch._foreach_mul(gradients, inverse_scale)
    flags = [flag for flag, bank in zip(finite.unbind(), banks, strict=True) for _ in bank.values]
    gradients = [torch.where(flag, gradient, 0.0) for flag, gradient in zip(flags, gradients, strict=True)]
    if rates.rule == "adam":
        gradients = torch._foreach_add(gradients, torch._foreach_mul(values, rates.weight_decay))
    else:
        torch._foreach_mul_(values, _shaped(slots.decay, banks))
    change = torch._foreach_sub(gradients, firsts)
    torch._foreach_mul_(change, _shaped(slots.first, banks))
    torch._foreach_add_(firsts, change)
    change = torch._foreach_mul(gradients, gradients)
    torch._foreach_sub_(change, seconds)
    torch._foreach_mul_(change, _shaped(slots.second, banks))
    torch._foreach_add_(seconds, change)
    root = torch._foreach_div(seconds, _shaped(slots.correction, banks))
    torch._foreach_sqrt_(root)
    torch._foreach_add_(root, rates.eps)
    change = torch._foreach_mul(firsts, _shaped(slots.rate, banks))
    torch._foreach_div_(change, root)
    torch._foreach_sub_(values, change)


def _slots(steps: list[Tensor], finite: Tensor, rates: Rates) -> _Slots:
    """Count the step of every slot, and what follows from the count."""
    flags = finite.to(steps[0].dtype).unbind()
    masks = [flag.expand(count.shape) for flag, count in zip(flags, steps, strict=True)]
    torch._foreach_add_(steps, masks)
    lr = torch._foreach_div(steps, max(1, rates.warmup_steps))
    torch._foreach_clamp_max_(lr, 1.0)
    torch._foreach_mul_(lr, rates.lr)
    torch._foreach_mul_(lr, masks)
    counted = torch._foreach_clamp_min(steps, 1.0)
    beta1, beta2 = rates.betas
    return _Slots(
        rate=torch._foreach_div(lr, _one_minus(torch._foreach_pow(beta1, counted))),
        decay=_one_minus(torch._foreach_mul(lr, rates.weight_decay)),
        first=torch._foreach_mul(masks, 1.0 - beta1), second=torch._foreach_mul(masks, 1.0 - beta2),
        correction=_one_minus(torch._foreach_pow(beta2, counted)),
    )  # fmt: skip


def _one_minus(numbers: Tensors) -> Tensors:
    """In place; the same bits as a subtraction from one."""
    torch._foreach_neg_(numbers)
    torch._foreach_add_(numbers, 1.0)
    return numbers


def _shaped(numbers: Tensors, banks: Sequence[Stacks]) -> list[Tensor]:
    """One number a slot ``(S,)`` of each bank, for each of its parameters: ``(S, 1, ...)``."""
    found: list[Tensor] = []
    for number, bank in zip(numbers, banks, strict=True):
        shaped = {axes: number.view(-1, *[1] * (axes - 1)) for axes in {value.dim() for value in bank.values}}
        found += [shaped[value.dim()] for value in bank.values]
    return found
