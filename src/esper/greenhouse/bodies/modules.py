"""Hosts that are no MLPs, as ordinary modules: what a real grower is attached to, and what a stack must repeat.

Shapes: B rows a batch, T positions, D features, V tokens, W hidden widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from esper.greenhouse.tasks import LENGTH

KERNEL = 3
"""Side of every convolution's kernel; padding keeps the sides of an image."""
LAST_CHANNELS = 12
"""Channels of a conv net's last convolution, which belong to no site."""
FEATURES = 16
"""Features of a transformer's stream (D)."""
HEADS = 2
"""Of its attention."""


def conv_net(channels: int, widths: Sequence[int], outputs: int) -> nn.Sequential:
    """Convolutions of 3x3 and ReLU, the first with stride 2; the mean over positions; a read-out.

    Images ``(B, channels, side, side)`` in, ``(B, outputs)`` out. Each width but the last lies in a site of its own:
    the spans ``0-2``, ``2-4``, ...
    """
    sizes = [channels, *widths, LAST_CHANNELS]
    layers: list[nn.Module] = []
    for layer in range(len(sizes) - 1):
        stride = 2 if layer == 0 else 1
        layers += [nn.Conv2d(sizes[layer], sizes[layer + 1], KERNEL, stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(LAST_CHANNELS, outputs))


class Attention(nn.Module):
    """Causal attention with :data:`HEADS` heads over ``(B, T, D)``; products are written out, so that they count."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(FEATURES, 3 * FEATURES)
        self.out = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        queries, keys, values = self.into(x).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = queries @ keys.transpose(2, 3) * (FEATURES // HEADS) ** -0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ values
        return self.out(mixed.transpose(1, 2).reshape(rows, length, FEATURES))


class Block(nn.Module):
    """Attention, then a feed-forward layer of ``width`` hidden units: the span ``up-down``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(FEATURES)
        self.attention = Attention()
        self.before_up = nn.LayerNorm(FEATURES)
        self.up = nn.Linear(FEATURES, width)
        self.down = nn.Linear(width, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.down(F.relu(self.up(self.before_up(x))))


class Transformer(nn.Module):
    """Predicts each next token: ``(B, T)`` int64 in, ``(B, T, outputs)`` out. One block a width, pre-norm."""

    def __init__(self, tokens: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, FEATURES)
        self.position = nn.Embedding(LENGTH, FEATURES)
        self.blocks = nn.ModuleList(Block(width) for width in widths)
        self.norm = nn.LayerNorm(FEATURES)
        self.read_out = nn.Linear(FEATURES, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.position.weight
        for block in self.blocks:
            h = block(h)
        return self.read_out(self.norm(h))


def first_weights(shapes: Mapping[str, Sequence[int]], generator: Generator) -> dict[str, Tensor]:
    """First weights of a module by the names and shapes of its parameters, float32, drawn in their order.

    Matrices, kernels and their biases are uniform within one over the root of what a unit reads, as
    ``nn.Linear`` and ``nn.Conv2d`` draw them; embeddings are normal with a deviation of 0.5; norms start as identity.
    """
    found: dict[str, Tensor] = {}
    bound = 0.0
    for name, shape in shapes.items():
        if "embedding" in name or "position" in name:
            found[name] = 0.5 * torch.randn(*shape, generator=generator)
        elif "norm" in name or "before" in name:
            found[name] = torch.ones(*shape) if name.endswith("weight") else torch.zeros(*shape)
        else:
            if name.endswith("weight"):
                bound = math.prod(shape[1:]) ** -0.5  # its bias comes next
            found[name] = torch.empty(*shape).uniform_(-bound, bound, generator=generator)
    return found


def with_first_weights(module: nn.Module, generator: Generator, dtype: torch.dtype) -> nn.Module:
    """``module`` in ``dtype``, its parameters drawn from ``generator`` (:func:`first_weights`)."""
    drawn = first_weights({name: tuple(p.shape) for name, p in module.named_parameters()}, generator)
    module.to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(drawn[name])
    return module
