"""``attention``: one small causal self-attention head over the positions of a layer's output (Vaswani et al. 2017).

    branch(y) = Wo @ softmax(mask(Q K^T)) V,   Q, K, V = Wq y, Wk y, Wv y

Always causal: whether a model may look ahead cannot be known from one layer, and a branch that does in a language
model leaks the answer, which held-out data would only reward. The factor 1/sqrt(U) is part of Wq's first values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Blueprint, Cost, Port, Tensors, normal
from esper.kasmina.geometry import Geometry
from esper.kasmina.plain import empty_linear, filled, traced
from esper.protocol import SiteKind

_KINDS = (
    SiteKind.LINEAR_LAYER,
    SiteKind.NORM_LAYER,
    SiteKind.EMBEDDING_LAYER,
    SiteKind.ATTENTION_LAYER,
    SiteKind.RECURRENT_LAYER,
)


@BLUEPRINTS.register("attention")
class Attention(Blueprint):
    """Shapes: wq, wk, wv (S, U, O); wo (S, K, U), with O features of the whole output. Slots are heads."""

    kinds = frozenset(_KINDS)
    axes = {  # noqa: RUF012
        "wq": Axes(unit=1), "wk": Axes(unit=1), "wv": Axes(unit=1), "wo": Axes(unit=2, column=1),
    }  # fmt: skip
    port = Port.OUTPUT
    absorbs = False
    fits_rows = False

    def refusal(self, geometry: Geometry) -> str | None:
        if geometry.sequence_axis is not None:
            return None
        return (
            f"its output must be (batch, positions, features), got {len(geometry.y_shape)} dimensions in the probe "
            "forward; use another blueprint"
        )

    def resolve_units(self, geometry: Geometry, asked: int | None) -> int:
        return asked if asked is not None else min(geometry.out_features, 8)

    def folds(self, geometry: Geometry) -> bool:
        return False

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        features = geometry.out_features
        size = {"wk": features**-0.5, "wv": features**-0.5, "wq": (features * units) ** -0.5}
        params = {name: normal((num_slots, units, features), size[name], generator) for name in ("wq", "wk", "wv")}
        params["wo"] = normal((num_slots, columns, units), units**-0.5, generator)
        return params, {}

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
        first = geometry.sequence_axis == 0
        x = x.transpose(0, 1) if first else x
        slots, units, _ = params["wq"].shape
        q, k, v = (
            F.linear(x, params[name].to(x.dtype).flatten(0, 1)).unflatten(-1, (slots, units)).transpose(1, 2)
            for name in ("wq", "wk", "wv")
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2).flatten(-2)
        return mixed.transpose(0, 1) if first else mixed

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        wo = (params["wo"] * alpha[:, None, None]).to(h.dtype)
        slots, _, units = wo.shape
        if slots == 1:
            return F.linear(h, wo[0])
        return torch.einsum("...su,sku->...sk", h.unflatten(-1, (slots, units)), wo).flatten(-2)

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        """Every position is counted as attending to all of the probe's positions; causal kernels may skip half."""
        weights = units * (3 * geometry.out_features + columns)
        positions = geometry.y_shape[geometry.sequence_axis] if geometry.sequence_axis is not None else 0
        return Cost(weights, 2.0 * weights + 4.0 * units * positions)

    def plain(self, params: Tensors, buffers: Tensors, geometry: Geometry) -> nn.Module:
        head = _Head(params, sequence_first=geometry.sequence_axis == 0)
        return traced(head, "CausalHead")


class _Head(nn.Module):
    def __init__(self, params: Tensors, *, sequence_first: bool) -> None:
        super().__init__()
        _, units, features = params["wq"].shape
        self.query, self.key, self.value = (
            filled(empty_linear(features, units), params[name][0]) for name in ("wq", "wk", "wv")
        )
        self.out = filled(empty_linear(units, params["wo"].shape[1]), params["wo"][0])
        self.sequence_first = sequence_first

    def forward(self, y: Tensor) -> Tensor:
        y = y.transpose(0, 1) if self.sequence_first else y
        mixed = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y), is_causal=True, scale=1.0)
        out = self.out(mixed)
        return out.transpose(0, 1) if self.sequence_first else out
