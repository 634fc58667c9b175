"""``low_rank``: a rank-limited addition to one layer (LoRA: Hu et al. 2021, arXiv:2106.09685).

    branch(x) = U @ (V * x)

On Linear, convolutions and Embedding it adds no new function class to an unconstrained layer, but a freshly learning
direction; it folds into the layer's own weight, up to rounding. On attention and recurrent layers it is a linear path
past the layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Blueprint, Cost, Parts, Tensors, normal
from esper.kasmina.geometry import Geometry, convolve, pointwise
from esper.kasmina.layers import weight_matrix
from esper.kasmina.plain import empty_conv, empty_embedding, empty_linear, filled
from esper.protocol import SiteKind


@BLUEPRINTS.register("low_rank")
class LowRank(Blueprint):
    """Shapes: v (S, U, I) or (S, U, I, *kernel); u (S, K, U). An embedding's I counts its tokens."""

    kinds = frozenset(
        {
            SiteKind.LINEAR_LAYER,
            SiteKind.CONV_LAYER,
            SiteKind.EMBEDDING_LAYER,
            SiteKind.ATTENTION_LAYER,
            SiteKind.RECURRENT_LAYER,
        }
    )
    axes = {"v": Axes(unit=1, read=2), "u": Axes(unit=2, column=1)}  # noqa: RUF012

    def folds(self, geometry: Geometry) -> bool:
        return geometry.kind not in (SiteKind.ATTENTION_LAYER, SiteKind.RECURRENT_LAYER)

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        kernel = geometry.head_conv.kernel if geometry.head_conv is not None else ()
        return {
            "v": normal((num_slots, units, reads, *kernel), geometry.head_std, generator),
            "u": normal((num_slots, columns, units), units**-0.5, generator),
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
        v = params["v"].flatten(0, 1)
        if geometry.kind is SiteKind.EMBEDDING_LAYER:
            # captured ids come as fp32, exact up to 2^24; a table of more tokens than that is beyond any device
            return F.embedding(x[..., 0].long(), v.T)
        v = v.to(x.dtype)
        if geometry.head_conv is None:
            return F.linear(x, v)
        return convolve(x, v, None, geometry.head_conv)

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        u = (params["u"] * alpha[:, None, None]).to(h.dtype)
        slots, columns, units = u.shape
        if geometry.head_conv is not None:
            point = pointwise(geometry.head_conv)
            return convolve(h, u.reshape(slots * columns, units, *point.kernel), None, point, groups=slots)
        if slots == 1:
            return F.linear(h, u[0])
        return torch.einsum("...su,sku->...sk", h.unflatten(-1, (slots, units)), u).flatten(-2)

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        taps = geometry.head_conv.taps if geometry.head_conv is not None else 1
        computed = 0 if geometry.kind is SiteKind.EMBEDDING_LAYER else reads * taps  # a look-up is free
        return Cost(units * (reads * taps + columns), 2.0 * units * (computed + columns))

    def merge(self, parts: Parts, params: Tensors, buffers: Tensors, geometry: Geometry) -> Parts:
        layer = parts.head
        v, u = params["v"][0].double(), params["u"][0].double()
        with torch.no_grad():
            added = (u @ v.flatten(1)).view(u.shape[0], *v.shape[1:])
            if geometry.kind is SiteKind.EMBEDDING_LAYER:
                added = added.T
            # a span may have widened the layer: what the branch knows comes first on both axes
            known = weight_matrix(layer)[: added.shape[0], : added.shape[1]]
            known.copy_((known.double() + added.to(known.device)).to(known.dtype))
        return Parts(layer, layer, parts.norm)

    def plain(self, params: Tensors, buffers: Tensors, geometry: Geometry) -> nn.Module:
        v, u = params["v"][0], params["u"][0]
        units, columns = v.shape[0], u.shape[0]
        conv = geometry.head_conv
        if conv is not None:
            point = pointwise(conv)
            down = filled(empty_conv(conv, geometry.in_features, units), v)
            return nn.Sequential(down, filled(empty_conv(point, units, columns), u.view(columns, units, *point.kernel)))
        up = filled(empty_linear(units, columns), u)
        if geometry.kind is SiteKind.EMBEDDING_LAYER:
            return nn.Sequential(filled(empty_embedding(v.shape[1], units), v.T), up)
        return nn.Sequential(filled(empty_linear(v.shape[1], units), v), up)
