"""Synthetic tasks. Each is a function of a task's own generator and a number of rows: ``x (n, I)``, ``y``.

A task's parameters (a teacher, centres, arms, noise) are drawn once; every split then draws rows of its own. Targets of
regression are float ``(n, O)`` with about unit variance, labels are int64 ``(n,)``. Images are ``(n, C, side, side)``,
sequences int64 ``(n, T)`` with the next tokens ``(n, T)`` for labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor

Rows = tuple[Tensor, Tensor]
Sampler = Callable[[int, Generator], Rows]
"""``(rows, generator)`` gives fresh rows of one task."""


def _uniform(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(low: int, high: int, generator: Generator) -> int:
    """From ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _flipped(y: Tensor, classes: int, share: float, generator: Generator) -> Tensor:
    """Labels of which ``share`` are drawn anew."""
    drawn = torch.randint(classes, y.shape, generator=generator)
    return torch.where(torch.rand(y.shape, generator=generator) < share, drawn, y)


def _scaled(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of ``f`` over probe rows, so that targets have unit variance."""
    values = f(x)
    return values.mean(0), values.std(0).clamp(min=1e-3)


def teacher(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Regression on a random network of two tanh layers, its width and the noise drawn."""
    width, noise = _integer(8, 32, generator), _uniform(0.0, 0.3, generator)
    sizes = (inputs, width, width, outputs)
    layers = [torch.randn(b, a, generator=generator) * 1.5 / a**0.5 for a, b in pairwise(sizes)]

    def f(x: Tensor) -> Tensor:
        for weight in layers[:-1]:
            x = torch.tanh(x @ weight.t())
        return x @ layers[-1].t()

    mean, std = _scaled(f, torch.randn(2000, inputs, generator=generator))

    def sample(rows: int, draws: Generator) -> Rows:
        x = torch.randn(rows, inputs, generator=draws)
        return x, (f(x) - mean) / std + noise * torch.randn(rows, outputs, generator=draws)

    return sample


def spirals(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Arms that wind around each other in the plane; turns and noise drawn, further inputs carry nothing."""
    arms = outputs if outputs < 3 else _integer(2, outputs, generator)
    turns, noise = _uniform(0.8, 2.0, generator), _uniform(0.02, 0.1, generator)

    def sample(rows: int, draws: Generator) -> Rows:
        y = torch.randint(arms, (rows,), generator=draws)
        radius = torch.rand(rows, generator=draws).sqrt()
        angle = 2 * math.pi * (turns * radius + y / arms)
        x = torch.randn(rows, inputs, generator=draws) * noise
        x[:, 0] += radius * angle.cos() * 1.5
        x[:, 1] += radius * angle.sin() * 1.5
        return x, y

    return sample


def tabular(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Classes that are mixtures of clusters in a subspace, among inputs that carry nothing; some labels are wrong."""
    informative = _integer(3, max(3, inputs // 2), generator)
    clusters = _integer(2, 6, generator)
    centres = 1.6 * torch.randn(outputs, clusters, informative, generator=generator)
    mixing = torch.randn(informative, inputs, generator=generator) / informative**0.5
    share = _uniform(0.0, 0.1, generator)

    def sample(rows: int, draws: Generator) -> Rows:
        y = torch.randint(outputs, (rows,), generator=draws)
        which = torch.randint(clusters, (rows,), generator=draws)
        z = centres[y, which] + 0.7 * torch.randn(rows, informative, generator=draws)
        x = z @ mixing + 0.3 * torch.randn(rows, inputs, generator=draws)
        return x, _flipped(y, outputs, share, draws)

    return sample


def checkers(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """A checkerboard in the plane, turned; further inputs carry nothing."""
    cells, share = _uniform(1.2, 2.2, generator), _uniform(0.0, 0.05, generator)
    angle = _uniform(0.0, math.pi, generator)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def sample(rows: int, draws: Generator) -> Rows:
        x = 2 * torch.rand(rows, inputs, generator=draws) - 1
        squares = torch.floor((x[:, :2] @ turn) * cells).sum(1).long()
        return 1.7 * x, _flipped(squares % outputs, outputs, share, draws)

    return sample


def waves(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Regression on a sum of plane waves of drawn directions and frequencies."""
    num, noise = _integer(3, 8, generator), _uniform(0.0, 0.3, generator)
    directions = torch.randn(num, inputs, generator=generator) / inputs**0.5
    frequency = 1.0 + 2.0 * torch.rand(num, generator=generator)
    phase = 2 * math.pi * torch.rand(num, generator=generator)
    heights = torch.randn(num, outputs, generator=generator)

    def f(x: Tensor) -> Tensor:
        return torch.sin(x @ directions.t() * frequency + phase) @ heights

    mean, std = _scaled(f, torch.randn(2000, inputs, generator=generator))

    def sample(rows: int, draws: Generator) -> Rows:
        x = torch.randn(rows, inputs, generator=draws)
        return x, (f(x) - mean) / std + noise * torch.randn(rows, outputs, generator=draws)

    return sample


def shells(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Which of some nested ellipsoids a point lies between."""
    axes = 0.5 + torch.rand(inputs, generator=generator)
    share = _uniform(0.0, 0.05, generator)
    radii = (torch.randn(4000, inputs, generator=generator) * axes).norm(dim=1)
    borders = torch.quantile(radii, torch.arange(1, outputs) / outputs)

    def sample(rows: int, draws: Generator) -> Rows:
        x = torch.randn(rows, inputs, generator=draws)
        y = torch.bucketize((x * axes).norm(dim=1), borders)
        return x, _flipped(y, outputs, share, draws)

    return sample


def linear(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Regression on a linear map under much noise: nothing that more units could help with."""
    weight, noise = torch.randn(outputs, inputs, generator=generator), _uniform(0.8, 1.2, generator)
    weight = weight / weight.norm(dim=1, keepdim=True)

    def sample(rows: int, draws: Generator) -> Rows:
        x = torch.randn(rows, inputs, generator=draws)
        return x, x @ weight.t() + noise * torch.randn(rows, outputs, generator=draws)

    return sample


SIDE = 8
"""Pixels a side of an image."""


def textures(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Classes of small images: one of a class's gratings shows somewhere, under noise; some labels are wrong."""
    kinds = _integer(2, 4, generator)
    angle = math.pi * torch.rand(outputs, kinds, generator=generator)
    frequency = 0.8 + 1.6 * torch.rand(outputs, kinds, generator=generator)  # radians a pixel
    noise, share = _uniform(0.2, 0.6, generator), _uniform(0.0, 0.05, generator)
    rows_of, columns_of = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")

    def sample(rows: int, draws: Generator) -> Rows:
        y = torch.randint(outputs, (rows,), generator=draws)
        which = torch.randint(kinds, (rows,), generator=draws)
        turn, waves = angle[y, which, None, None], frequency[y, which, None, None]
        phase = 2 * math.pi * torch.rand(rows, 1, 1, generator=draws)
        centre = (SIDE - 1) * (0.2 + 0.6 * torch.rand(rows, 2, 1, 1, generator=draws))
        across = (rows_of * turn.sin() + columns_of * turn.cos()) * waves + phase
        window = (-((rows_of - centre[:, 0]) ** 2 + (columns_of - centre[:, 1]) ** 2) / 18.0).exp()
        x = 1.5 * torch.sin(across) * window + noise * torch.randn(rows, SIDE, SIDE, generator=draws)
        return x[:, None].expand(-1, inputs, -1, -1).contiguous(), _flipped(y, outputs, share, draws)

    return sample


LENGTH = 12
"""Tokens of a sequence."""


def grammar(inputs: int, outputs: int, generator: Generator) -> Sampler:
    """Sequences in which each token follows from the two before it by a random network of sines; ``y`` is what follows.

    The sines make the two tokens act together: what each says by itself needs no hidden unit.
    """
    width, sharp = 32, _uniform(2.5, 3.5, generator)
    codes = _uniform(1.5, 2.5, generator) * torch.randn(2, inputs, width, generator=generator)
    mixed = math.sqrt(2.0) * torch.sin(codes[0][:, None] + codes[1])  # (token before, token, width)
    table = mixed @ torch.randn(width, outputs, generator=generator) * (sharp / width**0.5)
    share = _uniform(0.0, 0.1, generator)
    chances = (1 - share) * table.softmax(-1) + share / outputs

    def sample(rows: int, draws: Generator) -> Rows:
        found = [torch.randint(inputs, (rows,), generator=draws) for _ in range(2)]
        for _ in range(LENGTH - 1):
            found.append(torch.multinomial(chances[found[-2], found[-1]], 1, generator=draws)[:, 0])
        tokens = torch.stack(found, 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return sample
