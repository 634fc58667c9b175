"""Slot optimizer: one step over all slots of a bank, each with its own step count, mask and warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.slot_adam import reference, together


@dataclass(frozen=True)
class Rates:
    """The rule of one step: ``adamw``, ``adam`` or ``sgd``; ``lr`` is that of a warm slot."""

    rule: str
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    nesterov: bool = False
    warmup_steps: int = 1


@dataclass(frozen=True)
class Stacks:
    """A bank's tensors, parameter by parameter, each ``(S, ...)`` fp32.

    ``seconds`` is empty for SGD. ``steps (S,)`` fp32 counts the steps of each slot, ``bad_steps ()`` int64 the steps
    that were refused.
    """

    values: Sequence[Tensor]
    gradients: Sequence[Tensor]
    firsts: Sequence[Tensor]
    seconds: Sequence[Tensor]
    steps: Tensor
    bad_steps: Tensor


@torch.no_grad()
def step(stacks: Stacks, rates: Rates, *, learning: Tensor | None = None, inverse_scale: float = 1.0) -> None:
    """Update parameters, moments and counts in place, without waiting for the device.

    Parameters
    ----------
    learning:
        ``(S,)`` bool: slots that learn (``None``: all).
    inverse_scale:
        Undoes a loss scale. A gradient that is not finite changes nothing but ``bad_steps``.
    """
    if dispatch.runs_triton("slot_adam", stacks.steps):
        from esper.kasmina.ops.slot_adam import triton

        triton.step(stacks, rates, learning, inverse_scale)
    else:
        reference.step(stacks, rates, learning, inverse_scale)


@torch.no_grad()
def step_all(banks: Sequence[Stacks], rates: Rates, *, inverse_scale: float = 1.0) -> None:
    """:func:`step` of several banks on one device, whose slots all learn, by one rule."""
    if dispatch.runs_triton("slot_adam", banks[0].steps):
        from esper.kasmina.ops.slot_adam import triton

        for stacks in banks:
            triton.step(stacks, rates, None, inverse_scale)
    else:
        together.step(banks, rates, inverse_scale)
