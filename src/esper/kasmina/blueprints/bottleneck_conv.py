"""``bottleneck_conv``: more inner channels for a conv-[batch norm]-activation-conv span of 1, 2 or 3 dimensions.

    branch(x) = conv2(dropout(act(norm(conv1(x)))))

BatchNorm treats channels one by one, so the branch's own norm equals a wider norm in the host.
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
from esper.kasmina.geometry import Geometry, convolve
from esper.kasmina.layers import BatchNorm, with_columns, with_rows
from esper.protocol import SiteKind


@BLUEPRINTS.register("bottleneck_conv")
class BottleneckConv(Blueprint):
    """Shapes: w1 (S, U, I, *kernel), b1 / gamma / beta (S, U), w2 (S, K, U, *kernel); running mean and var (S, U)."""

    kinds = frozenset({SiteKind.CONV_SPAN})
    axes = {  # noqa: RUF012
        "w1": Axes(unit=1, read=2),
        "b1": Axes(unit=1),
        "gamma": Axes(unit=1),
        "beta": Axes(unit=1),
        "w2": Axes(unit=2, column=1),
    }
    buffer_axes = {"mean": Axes(unit=1), "var": Axes(unit=1)}  # noqa: RUF012

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        assert geometry.head_conv is not None and geometry.tail_conv is not None
        params = {
            "w1": normal((num_slots, units, reads, *geometry.head_conv.kernel), geometry.head_std, generator),
            "w2": normal((num_slots, columns, units, *geometry.tail_conv.kernel), geometry.tail_std, generator),
        }
        if geometry.head_bias:
            params["b1"] = torch.zeros(num_slots, units)
        buffers: Tensors = {}
        if geometry.norm is not None:
            if geometry.norm.affine:
                params["gamma"] = torch.ones(num_slots, units)
                params["beta"] = torch.zeros(num_slots, units)
            buffers = {"mean": torch.zeros(num_slots, units), "var": torch.ones(num_slots, units)}
        return params, buffers

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
        assert geometry.activation is not None and geometry.head_conv is not None
        bias = params["b1"].to(x.dtype).flatten() if "b1" in params else None
        h = convolve(x, params["w1"].to(x.dtype).flatten(0, 1), bias, geometry.head_conv)
        if geometry.norm is not None:
            gamma, beta = params.get("gamma"), params.get("beta")
            momentum = geometry.norm.momentum if norm_momentum is None else norm_momentum
            momentum = 0.1 if momentum is None else momentum
            # Half inputs may go with fp32 statistics; a float64 host's may not.
            h = F.batch_norm(
                h.to(buffers["mean"].dtype) if x.dtype == torch.float64 else h,
                buffers["mean"].view(-1),
                buffers["var"].view(-1),
                None if gamma is None else gamma.flatten(),
                None if beta is None else beta.flatten(),
                training or norm_momentum is not None,
                momentum,
                geometry.norm.eps,
            ).to(h.dtype)
        return dropped(geometry.activation(h), geometry.dropout, training, generator)

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        assert geometry.tail_conv is not None
        w2 = params["w2"]
        w2 = (w2 * alpha.view(-1, *[1] * (w2.dim() - 1))).to(h.dtype)
        return convolve(h, w2.flatten(0, 1), None, geometry.tail_conv, groups=w2.shape[0])

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        assert geometry.head_conv is not None and geometry.tail_conv is not None
        norm = 2 if geometry.norm is not None and geometry.norm.affine else 0
        head, tail = reads * geometry.head_conv.taps, columns * geometry.tail_conv.taps
        # a tail with a stride reads more head positions than it writes rows
        ratio = geometry.tail_conv.shrinkage
        return Cost(units * (head + tail + norm + int(geometry.head_bias)), 2.0 * units * (head * ratio + tail))

    def merge(self, parts: Parts, params: Tensors, buffers: Tensors, geometry: Geometry) -> Parts:
        norm, w1 = parts.norm, params["w1"][0]
        head = with_rows(parts.head, w1, params["b1"][0] if "b1" in params else None)
        wider = None if norm is None else _wider_norm(norm, params, buffers, w1.shape[0])
        return Parts(head, with_columns(parts.tail, params["w2"][0]), wider)


def _wider_norm(norm: BatchNorm, params: Tensors, buffers: Tensors, units: int) -> BatchNorm:
    wide = type(norm)(norm.num_features + units, norm.eps, norm.momentum, norm.affine)
    assert norm.running_mean is not None and norm.running_var is not None
    wide = wide.to(norm.running_mean)
    assert wide.running_mean is not None and wide.running_var is not None
    with torch.no_grad():
        wide.running_mean.copy_(torch.cat([norm.running_mean, buffers["mean"][0].to(norm.running_mean)]))
        wide.running_var.copy_(torch.cat([norm.running_var, buffers["var"][0].to(norm.running_var)]))
        if wide.num_batches_tracked is not None and norm.num_batches_tracked is not None:
            wide.num_batches_tracked.copy_(norm.num_batches_tracked)
        if norm.affine:
            wide.weight.copy_(torch.cat([norm.weight, params["gamma"][0].to(norm.weight)]))
            wide.bias.copy_(torch.cat([norm.bias, params["beta"][0].to(norm.bias)]))
    return wide
