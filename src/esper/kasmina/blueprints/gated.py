"""``gated``: more hidden units for a gated span (GLU variants: Shazeer 2020, arXiv:2002.05202).

    branch(x) = Wd @ dropout(act(Wg @ x + bg) * (Wu @ x + bu))

Hidden units of a gated layer do not see each other, so with the host's own activation the sum of host and branch is,
term by term, a host whose gate, up and down layers are U units wider. A host that computes gate and up in one layer
and cuts its output in two gets the new rows at the end of each half.
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
from esper.kasmina.layers import bias_of, rebuilt, weight_matrix, with_columns, with_rows
from esper.kasmina.recompute import product, weighted
from esper.protocol import SiteKind


@BLUEPRINTS.register("gated")
class Gated(Blueprint):
    """Shapes: wg, wu (S, U, I), bg, bu (S, U), wd (S, K, U)."""

    kinds = frozenset({SiteKind.LINEAR_GATED_SPAN})
    axes = {  # noqa: RUF012
        "wg": Axes(unit=1, read=2),
        "bg": Axes(unit=1),
        "wu": Axes(unit=1, read=2),
        "bu": Axes(unit=1),
        "wd": Axes(unit=2, column=1),
    }
    product_with = "wd"

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        assert geometry.gate is not None
        params = {
            "wg": normal((num_slots, units, reads), geometry.head_std, generator),
            "wu": normal((num_slots, units, reads), geometry.gate.std, generator),
            "wd": normal((num_slots, columns, units), geometry.tail_std, generator),
        }
        if geometry.head_bias:
            params["bg"] = torch.zeros(num_slots, units)
        if geometry.gate.bias:
            params["bu"] = torch.zeros(num_slots, units)
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
        h = geometry.activation(_linear(params, "g", x)) * _linear(params, "u", x)
        return dropped(h, geometry.dropout, training, generator)

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        return product(h, weighted(params["wd"], alpha, h.dtype))

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        assert geometry.gate is not None
        biases = int(geometry.head_bias) + int(geometry.gate.bias)
        return Cost(units * (2 * reads + columns + biases), 2.0 * units * (2 * reads + columns))

    def merge(self, parts: Parts, params: Tensors, buffers: Tensors, geometry: Geometry) -> Parts:
        assert geometry.gate is not None
        gate = params["wg"][0], params["bg"][0] if "bg" in params else None
        up = params["wu"][0], params["bu"][0] if "bu" in params else None
        tail = with_columns(parts.tail, params["wd"][0])
        if parts.up is not None:
            return Parts(with_rows(parts.head, *gate), tail, parts.norm, with_rows(parts.up, *up))
        assert geometry.gate.fused
        first, second = (gate, up) if geometry.gate.gate_first else (up, gate)
        weight = _in_halves(weight_matrix(parts.head), first[0], second[0])
        bias = bias_of(parts.head)
        if bias is not None:  # which a branch that was folded into the layer may have added
            none = bias.new_zeros(params["wg"].shape[1])
            bias = _in_halves(bias, *(none if part[1] is None else part[1] for part in (first, second)))
        return Parts(rebuilt(parts.head, weight, bias), tail, parts.norm)


def _linear(params: Tensors, which: str, x: Tensor) -> Tensor:
    bias = params.get(f"b{which}")
    weight = params[f"w{which}"].to(x.dtype).flatten(0, 1)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype).flatten())


def _in_halves(own: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``own`` in two halves of its first axis, each with further entries behind it."""
    one, two = own.detach().chunk(2)
    return torch.cat([one, first.to(own), two, second.to(own)])
