"""First weights of a seed's units from captured rows, without autograd; the rules of :mod:`esper.kasmina.starts`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from esper.config import FitConfig
from esper.greenhouse.life import Capture
from esper.kasmina.incubator import clustered_t
from esper.kasmina.starts.tiny import inverse_root, optimal_units


@dataclass
class Units:
    """Hidden units: ``w1 (U, I)``, ``b1 (U,)``, ``w2 (K, U)``; of convolutions both weights have taps behind."""

    w1: Tensor
    b1: Tensor
    w2: Tensor

    def to(self, dtype: torch.dtype) -> Units:
        """A copy in another precision."""
        return Units(*(part.to(dtype, copy=True) for part in (self.w1, self.b1, self.w2)))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b1, x, self.w1.t()).relu_() @ self.w2.t()


def drawn(
    units: int,
    reads: int,
    columns: int,
    stds: tuple[float, float],
    generator: Generator,
    taps: tuple[int, int] = (1, 1),
) -> Units:
    """Random units on the scale of the host's own weights, as the ``bottleneck`` blueprints draw them."""
    head, tail = ((number,) if number > 1 else () for number in taps)
    w1 = torch.randn(1, units, reads, *head, generator=generator)[0] * stds[0]
    w2 = torch.randn(1, columns, units, *tail, generator=generator)[0] * stds[1]
    return Units(w1, torch.zeros(units), w2)


@dataclass(frozen=True)
class Report:
    """How well a fit holds on rows of other batches (share of the target's energy explained, t), and its cost."""

    explained: float
    t_statistic: float
    flops: float


def split(capture: Capture) -> tuple[Capture, Capture]:
    """Batches to fit on, and the last quarter (at least one) to check on; gradients of unit mean square a batch.

    Batches without a gradient, or with one that is not finite, are left out.
    """
    sizes = [float(g.square().mean().sqrt()) for g in capture.g]
    kept = [number for number, size in enumerate(sizes) if math.isfinite(size) and size > 0]
    held = max(1, len(kept) // 4)

    def part(numbers: list[int]) -> Capture:
        x, y = ([rows[n] for n in numbers] for rows in (capture.x, capture.y))
        return Capture(x, y, [capture.g[n] / sizes[n] for n in numbers])

    return part(kept[:-held]), part(kept[-held:])


def fit_rows(capture: Capture, config: FitConfig) -> int:
    """Rows of one step of the fit."""
    return min(config.batch_rows, sum(x.shape[0] for x in capture.x))


def fit(units: Units, capture: Capture, config: FitConfig, *, steps: int, generator: Generator) -> Report:
    """Train ``units`` in place towards the negative gradient by Adam, then check and size them."""
    train, held = split(capture)
    if not train.x:
        return Report(math.nan, math.nan, 0.0)
    x, target = torch.cat(train.x), -torch.cat(train.g)
    rows = fit_rows(train, config)
    _adam(units, x, target, torch.randint(x.shape[0], (steps, rows), generator=generator), config.lr)
    explained, t_statistic, checking = _check_and_size(units, held, config)
    return Report(explained, t_statistic, 3.0 * steps * rows * _row_flops(units) + checking)


def tiny(units: Units, capture: Capture, host: Units, config: FitConfig, *, hidden_flops: float) -> Report:
    """The units that follow what the host's own layer cannot (``starts.tiny``), written in place, checked and sized.

    ``host`` holds the site's present hidden units, grown ones included; ``hidden_flops`` is what they cost a row.
    """
    train, held = split(capture)
    if not train.x:
        return Report(math.nan, math.nan, 0.0)
    x, g = torch.cat(train.x).float(), torch.cat(train.g).float()
    h = torch.addmm(host.b1.float(), x, host.w1.float().t()).relu_()
    flat = F.pad(h, (0, 1), value=1.0).double()
    root = inverse_root(flat.t() @ flat)
    weight = -g.t().double() @ flat @ root @ root
    wanted = -g - (flat @ weight.t()).float()
    read = F.pad(x, (0, 1), value=1.0)
    moment = read.t().double() @ read.double() / x.shape[0]
    write, inward = optimal_units((wanted.t() @ read).double()[None] / x.shape[0], moment, units.b1.numel())
    num = write.shape[2]
    units.w2.zero_()
    units.w2[:, :num] = write[0]
    chosen = write[0].any(0)
    units.w1[:num] = torch.where(chosen[:, None], inward[0, :, :-1].to(units.w1.dtype), units.w1[:num])
    units.b1[:num] = torch.where(chosen, inward[0, :, -1].to(units.b1.dtype), units.b1[:num])
    explained, t_statistic, checking = _check_and_size(units, held, config)
    columns, wide, deep = g.shape[1], flat.shape[1], read.shape[1]
    a_row = 2.0 * hidden_flops + 2.0 * wide * (wide + 2 * columns) + 2.0 * deep * (deep + columns)
    return Report(explained, t_statistic, x.shape[0] * a_row + checking)


def _row_flops(units: Units) -> float:
    return 2.0 * units.w1.shape[0] * (units.w1.shape[1] + units.w2.shape[0])


def _check_and_size(units: Units, held: Capture, config: FitConfig) -> tuple[float, float, float]:
    """Share of the target explained on rows of other batches, t, and what that cost; the output gets its size."""
    x_held, y_held, wanted = torch.cat(held.x), torch.cat(held.y), -torch.cat(held.g)
    out = units(x_held)
    products = (out * wanted).sum(1)
    explained = 1.0 - float((out - wanted).square().sum() / wanted.square().sum())
    out = out[:512]
    size = float(out.square().mean().sqrt())
    if size > 0 and math.isfinite(size):
        units.w2 *= config.base_scale * float(y_held[:512].square().mean().sqrt()) / size
    return explained, clustered_t(products, torch.arange(x_held.shape[0])), x_held.shape[0] * _row_flops(units)


def _adam(units: Units, x: Tensor, target: Tensor, draws: Tensor, lr: float) -> None:
    values = [units.w1, units.b1, units.w2]
    firsts, seconds = ([torch.zeros_like(value) for value in values] for _ in range(2))
    scale = 2.0 / (draws.shape[1] * target.shape[1])
    for step, index in enumerate(draws, 1):
        rows = x[index]
        h = torch.addmm(units.b1, rows, units.w1.t()).relu_()
        delta = (h @ units.w2.t() - target[index]) * scale
        inner = (delta @ units.w2).mul_(h > 0)
        gradients = [inner.t() @ rows, inner.sum(0), delta.t() @ h]
        for value, first, second, gradient in zip(values, firsts, seconds, gradients, strict=True):
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            root = second.sqrt().div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
            value.addcdiv_(first, root, value=-lr / (1 - 0.9**step))
