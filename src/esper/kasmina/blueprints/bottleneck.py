"""``bottleneck``: more hidden units for a Linear-activation-Linear span.

    branch(x) = W2 @ dropout(act(W1 @ x + b1))

With the host's own activation it equals, term by term, a host whose inner layer is U units wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.blueprints.blueprint import (
    BLUEPRINTS,
    Axes,
    Blueprint,
    Cost,
    Parts,
    Tensors,
    dropped,
    normal,
)
from esper.kasmina.geometry import Geometry
from esper.kasmina.layers import with_columns, with_rows
from esper.kasmina.recompute import product, weighted
from esper.protocol import SiteKind


@BLUEPRINTS.register("bottleneck")
class Bottleneck(Blueprint):
    """Shapes: w1 (S, U, I), b1 (S, U), w2 (S, K, U)."""

    kinds = frozenset({SiteKind.LINEAR_SPAN})
    axes = {"w1": Axes(unit=1, read=2), "b1": Axes(unit=1), "w2": Axes(unit=2, column=1)}  # noqa: RUF012
    product_with = "w2"

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        params = {
            "w1": normal((num_slots, units, reads), geometry.head_std, generator),
            "w2": normal((num_slots, columns, units), geometry.tail_std, generator),
        }
        if geometry.head_bias:
            params["b1"] = torch.zeros(num_slots, units)
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
        assert geometry.activation is not None
        bias = params["b1"].to(x.dtype).flatten() if "b1" in params else None
        h = geometry.activation(F.linear(x, params["w1"].to(x.dtype).flatten(0, 1), bias))
        return dropped(h, geometry.dropout, training, generator)

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        return product(h, weighted(params["w2"], alpha, h.dtype))

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        return Cost(units * (reads + columns + int(geometry.head_bias)), 2.0 * units * (reads + columns))

    def merge(self, parts: Parts, params: Tensors, buffers: Tensors, geometry: Geometry) -> Parts:
        head = with_rows(parts.head, params["w1"][0], params["b1"][0] if "b1" in params else None)
        return Parts(head, with_columns(parts.tail, params["w2"][0]), parts.norm)
