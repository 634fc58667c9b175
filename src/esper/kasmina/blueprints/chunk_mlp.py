"""``chunk_mlp``: each seed reads and writes its own columns of a Linear layer's output, a small perceptron a seed.

    branch(y)[c_s] = W2_s @ silu(W1_s @ y[c_s] + b1_s)

It lets single features be bent where a layer is linear. A thousand seeds on one layer run as one operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from esper.kasmina.blueprints.blueprint import (
    BLUEPRINTS,
    Axes,
    ChunkBlueprint,
    Cost,
    Parts,
    Tensors,
    normal,
)
from esper.kasmina.geometry import Geometry
from esper.kasmina.ops.graft import Seats, graft, reference
from esper.protocol import SiteKind


@BLUEPRINTS.register("chunk_mlp")
class ChunkMLP(ChunkBlueprint):
    """Shapes: w1 (S, U, K), b1 (S, U), w2 (S, K, U)."""

    kinds = frozenset({SiteKind.LINEAR_LAYER})
    axes = {"w1": Axes(unit=1), "b1": Axes(unit=1), "w2": Axes(unit=2, column=1)}  # noqa: RUF012

    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        return {
            "w1": normal((num_slots, units, columns), columns**-0.5, generator),
            "b1": torch.zeros(num_slots, units),
            "w2": normal((num_slots, columns, units), units**-0.5, generator),
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
        return reference.hidden(x, params["w1"], params["b1"])

    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        return reference.project(h, params["w2"], alpha)

    def graft(self, params: Tensors, y: Tensor, seats: Seats, *, alpha: Tensor, writable: bool) -> Tensor:
        return graft(y, params["w1"], params["b1"], params["w2"], alpha, seats, writable=writable)

    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        return Cost(units * (2 * columns + 1), 4.0 * units * columns)

    def merge_at(self, parts: Parts, params: Tensors, columns: Tensor) -> Parts:
        layer = _with_seeds(parts.head, params, columns)
        return Parts(layer, layer, parts.norm)


def _with_seeds(layer: nn.Module, params: Tensors, columns: Tensor) -> fx.GraphModule:
    """``layer`` and the seeds behind it as one plain module: its code is generated, its class is PyTorch's own."""
    device = next(layer.parameters()).device
    root = nn.Module()
    root.add_module("layer", layer)
    for name in ("w1", "b1", "w2"):
        root.register_parameter(name, nn.Parameter(params[name].detach().clone().to(device)))
    root.register_buffer("columns", columns.reshape(-1).to(device))
    seeds, _, width = params["w1"].shape
    graph = fx.Graph()
    y = graph.call_module("layer", (graph.placeholder("input"),))
    flat = graph.get_attr("columns")
    # as the host computes: in the type of the layer's output, under autocast too
    w1, b1, w2 = (graph.call_method("to", (graph.get_attr(name), y)) for name in ("w1", "b1", "w2"))
    x = graph.call_function(torch.index_select, (y, -1, flat))
    x = graph.call_method("unflatten", (x, -1, (seeds, width)))
    z = graph.call_function(torch.einsum, ("...sk,shk->...sh", x, w1))
    h = graph.call_function(F.silu, (graph.call_function(torch.add, (z, b1)),))
    delta = graph.call_method("flatten", (graph.call_function(torch.einsum, ("...sh,skh->...sk", h, w2)), -2))
    delta = graph.call_method("to", (delta, y))
    graph.output(graph.call_function(torch.index_add, (y, -1, flat, delta)))
    return fx.GraphModule(root, graph, class_name=f"{type(layer).__name__}WithSeeds")
