"""Synthetic tasks. Each is a function of a task's own generator and a number of rows: ``x (n, I)``, ``y``.

A task's parameters (a teacher, centres, arms, noise) are drawn once; every split then draws rows of its own. Targets of
regression are float ``(n, O)`` with about unit variance, labels are int64 ``(n,)``.
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
