"""Losses and AdamW of many hosts of one family as stacked tensors, without autograd.

Shapes: N hosts, B rows a batch, T tokens, P numbers a host, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 1e-8


def losses(output: Tensor, y: Tensor, *, per_row: bool = False) -> Tensor:
    """Mean loss a host ``(N,)``, or a row ``(N, B)``: cross-entropy of int64 labels, else mean squared error.

    Labels are ``(N, B)``, or ``(N, B, T)`` for as many outputs a row.
    """
    if y.is_floating_point():
        rows = (output - y).square().mean(-1)
    else:
        rows = F.cross_entropy(output.movedim(-1, 1), y, reduction="none")
        rows = rows.mean(2) if y.dim() == 3 else rows
    return rows if per_row else rows.mean(1)


def output_gradient(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss a host ``(N,)`` and its gradient with respect to ``output (N, B, O)`` or ``(N, B, T, O)``."""
    if y.is_floating_point():
        difference = output - y
        return difference.square().mean((1, 2)), difference * (2.0 / (output.shape[1] * output.shape[2]))
    log_p = F.log_softmax(output, -1)
    labels = y.unsqueeze(-1)
    loss = -log_p.gather(-1, labels).flatten(1).mean(1)
    gradient = log_p.exp_()
    gradient.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=gradient.dtype))
    return loss, gradient.div_(y[0].numel())


@dataclass
class Moments:
    """AdamW's running averages, ``(N, P)`` each."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Rates:
    """One AdamW step (Loshchilov & Hutter 2019) a group of weights, ``(N, G)`` float64 each.

    ``rate`` is the learning rate over the first bias correction, ``root`` one over the root of the second,
    ``keep`` what weight decay leaves, ``learns`` 0 where nothing moves.
    """

    rate: Tensor
    root: Tensor
    keep: Tensor
    learns: Tensor


def adamw(values: Tensor, gradient: Tensor, moments: Moments, rates: Rates, owner: Tensor | None) -> None:
    """Update ``values (N, P)`` in place. ``owner (N, P)`` names each weight's group; ``None``: all are the host's."""
    first, second = moments.first, moments.second
    if owner is None:
        first.lerp_(gradient, 1.0 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
        rate, root, keep = (part[:, 1:2].to(values.dtype) for part in (rates.rate, rates.root, rates.keep))
    else:
        rate, root, keep, learns = (
            part.to(values.dtype).gather(1, owner) for part in (rates.rate, rates.root, rates.keep, rates.learns)
        )
        first.addcmul_(gradient - first, learns, value=1.0 - BETAS[0])
        second.addcmul_(gradient.square().sub_(second), learns, value=1.0 - BETAS[1])
    values.mul_(keep).sub_(first.mul(rate).div_(second.sqrt().mul_(root).add_(EPS)))
