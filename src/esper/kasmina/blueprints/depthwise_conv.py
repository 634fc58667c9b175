"""``depthwise_conv``: a depthwise convolution, an activation and a pointwise one (Howard et al. 2017, MobileNets).

    branch(x) = W2 @ silu(W1 *_depthwise x + b1)

It repeats its layer's kernel, stride, padding and dilation, so that it computes the same positions, at a ninth of the
weights of a 3x3 convolution. SiLU between the two makes it a function that the layer has not, and is never dead.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Blueprint, Cost, Tensors, normal
from esper.kasmina.geometry import Geometry, convolve, pointwise
from esper.kasmina.plain import empty_conv, filled
from esper.protocol import SiteKind


@BLUEPRINTS.register("depthwise_conv")
class DepthwiseConv(Blueprint):
    """Shapes: w1 (S, U, I, *kernel), b1 (S, U, I), w2 (S, K, U, I): U filters for each of I channels."""

    kinds = frozenset({SiteKind.CONV_LAYER})
    axes = {"w1": Axes(unit=1, read=2), "b1": Axes(unit=1, read=2), "w2": Axes(unit=2, column=1, read=3)}  # noqa: RUF012

    def resolve_units(self, geometry: Geometry, asked: int | None) -> int:
        """A width counts depthwise channels, as other blueprints' do: so many filters a channel that they suffice."""
        return 1 if asked is None else -(-asked // geometry.in_features)

    def folds(self, geometry: Geometry) -> bool:
        return False

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        assert geometry.head_conv is not None
        kernel = geometry.head_conv.kernel
        return {
            "w1": normal((num_slots, units, reads, *kernel), math.prod(kernel) ** -0.5, generator),
            "b1": torch.zeros(num_slots, units, reads),
            "w2": normal((num_slots, columns, units, reads), (units * reads) ** -0.5, generator),
        }, {}

    def hidden(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        geometry: Geometry,
        *,
        training: bool,
        generator: torch.Generator | None,
        norm_momentum: float | None = None,
    ) -> Tensor:
        conv = geometry.head_conv
        assert conv is not None
        slots, units, reads = params["b1"].shape
        # filters of one channel lie together for a grouped convolution, those of one slot for the pointwise one
        w1 = params["w1"].to(x.dtype).movedim(2, 0).flatten(0, 2).unsqueeze(1)
        b1 = params["b1"].to(x.dtype).movedim(2, 0).flatten()
        h = convolve(x, w1, b1, conv, reads)
        return F.silu(h.unflatten(1, (reads, slots * units)).transpose(1, 2).flatten(1, 2))

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        assert geometry.head_conv is not None
        point = pointwise(geometry.head_conv)
        w2 = (params["w2"] * alpha[:, None, None, None]).to(h.dtype).flatten(2).flatten(0, 1)
        return convolve(h, w2.view(*w2.shape, *point.kernel), None, point, groups=alpha.shape[0])

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        assert geometry.head_conv is not None
        taps = geometry.head_conv.taps
        return Cost(units * reads * (taps + 1 + columns), 2.0 * units * reads * (taps + columns))

    def plain(self, params: Tensors, buffers: Tensors, geometry: Geometry) -> nn.Module:
        assert geometry.head_conv is not None
        w1, b1, w2 = params["w1"][0], params["b1"][0], params["w2"][0]
        units, reads = b1.shape
        deep = empty_conv(geometry.head_conv, reads, units * reads, groups=reads, bias=True)
        point = pointwise(geometry.head_conv)
        mixed = w2.transpose(1, 2).flatten(1)
        return nn.Sequential(
            filled(deep, w1.transpose(0, 1).flatten(0, 1).unsqueeze(1), b1.T.flatten()),
            nn.SiLU(),
            filled(empty_conv(point, *mixed.shape[::-1]), mixed.view(*mixed.shape, *point.kernel)),
        )
