"""How a site's output gradient correlates with its input: what starts by singular vectors are made of.

Everything is linear in the branch near zero weights. With J inputs of one hidden unit (features times taps of the
head's kernel, and a constant where the head has a bias) and T taps of the tail's kernel, a unit with in-weights ``a``
and out-weights ``w`` adds ``sum_t w[o, t] * slope * a @ patch(q, t)`` at output position q; for Linear layers T is 1
and the patch is the input row.

Shapes: N rows or images, O output features, J, T as above.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from esper.kasmina.bank import Bank
from esper.kasmina.geometry import ConvGeometry, Geometry
from esper.kasmina.starts.start import SPAN_BLUEPRINTS
from esper.protocol import SiteKind

_BLOCK_ELEMENTS = 1 << 24
"""Elements of unfolded patches held at once."""


def refusal(name: str, blueprint: str, geometry: Geometry) -> str | None:
    """Why the algebra does not hold for a blueprint at a site, or ``None``."""
    if blueprint not in SPAN_BLUEPRINTS or geometry.kind not in (SiteKind.LINEAR_SPAN, SiteKind.CONV_SPAN):
        return f"{name} makes hidden units of Linear and Conv2d spans, got {blueprint!r} on a {geometry.kind}"
    if geometry.head_conv is not None and len(geometry.head_conv.kernel) != 2:
        return f"{name} unfolds patches of two dimensions, got a kernel of {geometry.head_conv.kernel}; use random_zero"
    if geometry.norm is not None:
        return (
            f"{name} linearises a unit at zero weights, and the norm inside this span divides a unit by its own spread "
            "there; use random_zero, copy or negative_gradient"
        )
    assert geometry.activation is not None
    at_zero = float(geometry.activation(torch.zeros(1)))
    if at_zero != 0.0:
        return (
            f"{name} needs an activation that is 0 at 0, got {geometry.activation.name} with {at_zero:.4g}; "
            "use random_zero or negative_gradient"
        )
    return None


def rank_cap(geometry: Geometry, *, columns: int, reads: int, constant: bool) -> int:
    """Rank of a seed's correlation: the smaller of what it writes and what one unit of it reads."""
    head, tail = taps(geometry)
    return min(columns * tail, reads * head + int(constant and geometry.head_bias))


def taps(geometry: Geometry) -> tuple[int, int]:
    """Kernel positions of head and tail (1 for Linear)."""
    head, tail = geometry.head_conv, geometry.tail_conv
    return (head.taps if head is not None else 1, tail.taps if tail is not None else 1)


def has_kink(geometry: Geometry) -> bool:
    """Whether the activation's slopes on both sides of zero differ (ReLU and its kin)."""
    assert geometry.activation is not None
    h = 1e-3
    right, left = (float(geometry.activation(torch.tensor([s * h]))) / (s * h) for s in (1.0, -1.0))
    return abs(right - left) > 0.1


def blocks(x: Tensor, geometry: Geometry) -> Iterator[slice]:
    """Slices of rows (images) whose patches fit into memory."""
    head, _ = taps(geometry)
    size = max(1, _BLOCK_ELEMENTS // max(1, x[0].numel() * head)) if x.shape[0] else 1
    for start in range(0, x.shape[0], size):
        yield slice(start, start + size)


def unit_inputs(x: Tensor, geometry: Geometry, *, constant: bool) -> Tensor:
    """What one hidden unit reads: ``(N, J)``, or ``(N, J, H, W)`` at the head's output positions."""
    if geometry.head_conv is not None:
        x = _unfold(x.float(), geometry.head_conv)
    x = x.float()
    if not (constant and geometry.head_bias):
        return x
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def correlate(inputs: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    """``(O, T, J)``: sum over output positions of ``g`` times the patch that reaches it."""
    conv = geometry.tail_conv
    if conv is None:
        return (g.t() @ inputs)[:, None, :]
    shape = (g.shape[1], inputs.shape[1], *conv.kernel)
    # torch annotates pairs as int
    weight = conv2d_weight(inputs, shape, g, conv.stride, conv.padding, conv.dilation)  # type: ignore[reportArgumentType]
    return weight.flatten(2).transpose(1, 2)


def by_slot(correlation: Tensor, bank: Bank) -> Tensor:
    """``(S, K * T, J)``: each slot's own columns of a correlation ``(O, T, J)``."""
    if bank.columns is None:
        return correlation.flatten(0, 1)[None]
    return correlation[bank.columns.to(correlation.device)].flatten(1, 2)


def write_units(bank: Bank, directions: Tensor, chosen: Tensor) -> None:
    """Set out-weights to ``directions (S, K * T, R)`` where ``chosen (S, R)``; all other units get zeros."""
    w2 = bank.params["w2"]
    num = directions.shape[2]
    shaped = (directions * chosen[:, None, :]).transpose(1, 2).unflatten(2, (w2.shape[1], -1))  # (S, R, K, T)
    w2.zero_()
    w2[:, :, :num] = shaped.transpose(1, 2).reshape(w2.shape[0], w2.shape[1], num, *w2.shape[3:])


def _unfold(x: Tensor, conv: ConvGeometry) -> Tensor:
    patches = F.unfold(x, conv.kernel, conv.dilation, conv.padding, conv.stride)
    sizes = [
        (size + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel[i] - 1) - 1) // conv.stride[i] + 1
        for i, size in enumerate(x.shape[2:])
    ]
    return patches.unflatten(2, sizes)
