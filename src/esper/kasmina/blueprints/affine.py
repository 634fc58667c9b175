"""``affine``: a scale and a shift of every output feature (a FiLM layer without a condition: Perez et al. 2018).

    branch(y) = s * y + t

It reads the layer's output, not its input, and starts as the identity (s = t = 0). Whatever the layer, its own weights
could hold the result: it folds into a norm's, a Linear's, a convolution's, an embedding's or an attention's output
weights. Only a recurrent layer, whose next step reads its output, keeps it beside itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints.blueprint import BLUEPRINTS, Axes, Blueprint, Cost, Parts, Port, Tensors, normal
from esper.kasmina.geometry import Geometry
from esper.kasmina.layers import weight_matrix
from esper.kasmina.plain import traced
from esper.protocol import SiteKind


@BLUEPRINTS.register("affine")
class Affine(Blueprint):
    """Shapes: scale, shift (S, K); no shift where the layer could not hold one."""

    kinds = frozenset(kind for kind in SiteKind if not kind.is_span)
    axes = {"scale": Axes(column=1), "shift": Axes(column=1)}  # noqa: RUF012
    port = Port.COLUMNS
    fits_rows = False

    def resolve_units(self, geometry: Geometry, asked: int | None) -> int:
        return 1

    def folds(self, geometry: Geometry) -> bool:
        return geometry.kind is not SiteKind.RECURRENT_LAYER

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        names = ("scale", "shift") if geometry.holds_shift else ("scale",)
        return {name: normal((num_slots, columns), 0.02, generator) for name in names}, {}

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
        return x

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        shape = (-1, *[1] * (h.dim() - 2)) if geometry.feature_axis == 1 else (-1,)
        scale, *shift = [(params[name] * alpha[:, None]).to(h.dtype).flatten().view(shape) for name in params]
        return h * scale + shift[0] if shift else h * scale

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        each = 2 if geometry.holds_shift else 1
        return Cost(each * columns, float(each * columns))

    def merge(self, parts: Parts, params: Tensors, buffers: Tensors, geometry: Geometry) -> Parts:
        layer = parts.head
        features = params["scale"].shape[1]
        scale, shift = 1 + params["scale"][0].double(), params["shift"][0].double() if "shift" in params else None
        target = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer
        weight, by_token = weight_matrix(target), isinstance(layer, nn.Embedding)
        with torch.no_grad():
            # a span may have widened the layer: the features that the branch knows come first
            known = weight[:, :features] if by_token else weight[:features]
            rows = scale if by_token else scale.view(-1, *[1] * (weight.dim() - 1))
            moved = known.double() * rows.to(known.device)
            if by_token and shift is not None:
                moved = moved + shift.to(known.device)
            known.copy_(moved.to(known.dtype))
            if not by_token:
                _fold_bias(target, weight, scale, shift)
        return Parts(layer, layer, parts.norm)

    def plain(self, params: Tensors, buffers: Tensors, geometry: Geometry) -> nn.Module:
        shape = (-1, *[1] * (len(geometry.y_shape) - 2)) if geometry.feature_axis == 1 else (-1,)
        values = {name: value[0].view(shape) for name, value in params.items()}
        return traced(_Scaled(values["scale"]) if len(values) == 1 else _Shifted(**values), "Affine")


def _fold_bias(layer: nn.Module, weight: Tensor, scale: Tensor, shift: Tensor | None) -> None:
    """Scale and shift a layer's bias in place; a layer without one gets one if it is needed."""
    old = getattr(layer, "bias", None)
    if old is None:
        if shift is None:
            return
        old = nn.Parameter(weight.new_zeros(weight.shape[0]))
        layer.register_parameter("bias", old)
    features = scale.shape[0]
    moved = old[:features].double() * scale.to(old.device)
    old[:features].copy_((moved if shift is None else moved + shift.to(old.device)).to(old.dtype))


class _Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.clone())

    def forward(self, y: Tensor) -> Tensor:
        return y * self.scale


class _Shifted(nn.Module):
    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(scale.clone()), nn.Parameter(shift.clone())

    def forward(self, y: Tensor) -> Tensor:
        return y * self.scale + self.shift
