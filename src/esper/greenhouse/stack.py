"""Many MLPs of one family as stacked tensors: forward, backward and AdamW, without autograd.

Shapes: N hosts, B rows a batch, P numbers a host, G groups. Hidden layers are ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.greenhouse.layout import Layout

BETAS = (0.9, 0.999)
EPS = 1e-8

Weights = list[tuple[Tensor, Tensor]]


@dataclass
class Pass:
    """What one forward has computed."""

    hidden: list[Tensor]
    """Input ``(N, B, I)`` and, layer by layer, what is read next ``(N, B, C)``: activation times alpha."""
    before: list[Tensor]
    """Every layer's output before its activation; the last one is the network's."""


def forward(weights: Weights, x: Tensor, alphas: Sequence[Tensor] | None = None) -> Pass:
    """Run all hosts on ``x (N, B, I)``; ``alphas`` blends in hidden units ``(N, C)`` a layer, ``None``: all are in."""
    hidden, before = [x], list[Tensor]()
    for layer, (weight, bias) in enumerate(weights):
        z = torch.baddbmm(bias.unsqueeze(1), hidden[-1], weight.transpose(1, 2))
        before.append(z)
        if layer + 1 < len(weights):
            h = z.relu()
            hidden.append(h if alphas is None else h.mul_(alphas[layer].unsqueeze(1)))
    return Pass(hidden, before)


def losses(output: Tensor, y: Tensor, *, per_row: bool = False) -> Tensor:
    """Mean loss a host ``(N,)``, or a row ``(N, B)``: cross-entropy of int64 labels, else mean squared error."""
    if y.is_floating_point():
        rows = (output - y).square().mean(-1)
    else:
        rows = F.cross_entropy(output.transpose(1, 2), y, reduction="none")
    return rows if per_row else rows.mean(1)


def output_gradient(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss a host ``(N,)`` and its gradient with respect to ``output (N, B, O)``."""
    rows = output.shape[1]
    if y.is_floating_point():
        difference = output - y
        return difference.square().mean((1, 2)), difference * (2.0 / (rows * output.shape[2]))
    log_p = F.log_softmax(output, -1)
    labels = y.unsqueeze(-1)
    loss = -log_p.gather(2, labels).squeeze(-1).mean(1)
    gradient = log_p.exp_()
    gradient.scatter_add_(2, labels, torch.full_like(labels, -1, dtype=gradient.dtype))
    return loss, gradient.div_(rows)


def backward(
    weights: Weights, gradients: Weights, run: Pass, delta: Tensor, alphas: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Write gradients of all weights; returns dL/d(output before activation) of each layer, first layer first."""
    deltas = [delta]
    for layer in reversed(range(len(weights))):
        weight, bias = gradients[layer]
        weight.copy_(torch.bmm(delta.transpose(1, 2), run.hidden[layer]))
        bias.copy_(delta.sum(1))
        if layer:
            delta = torch.bmm(delta, weights[layer][0])
            delta.mul_(run.before[layer - 1] > 0)
            if alphas is not None:
                delta.mul_(alphas[layer - 1].unsqueeze(1))
            deltas.append(delta)
    return deltas[::-1]


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


def initial(layout: Layout, widths: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """First weights of one host, ``(P,)``, as ``nn.Linear`` draws them: uniform within one over the root of inputs."""
    flat = torch.zeros(1, layout.length, dtype=dtype)
    sizes = [layout.sizes[0], *widths, layout.sizes[-1]]
    for layer, (weight, bias) in enumerate(layout.views(flat)):
        columns, rows = sizes[layer], sizes[layer + 1]
        bound = columns**-0.5
        weight[0, :rows, :columns] = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
        bias[0, :rows] = torch.empty(rows).uniform_(-bound, bound, generator=generator)
    return flat[0]
