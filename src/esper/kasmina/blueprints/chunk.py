"""Blueprints that read and write their own columns of a layer's output: thousands of small seeds run as one op.

They read what the layer gives once branches of the site's input are added, and not what other seeds add to it. What
becomes permanent stays stacked, slot by slot: a dense branch over all columns would cost as much as a layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from esper.kasmina.blueprints.blueprint import Blueprint, Parts, Tensors
from esper.kasmina.geometry import Geometry
from esper.kasmina.ops.graft import Seats


class ChunkBlueprint(Blueprint):
    """One family of such branches; its ``hidden`` takes the seeds' columns of the output, ``(..., S*K)``."""

    @abstractmethod
    def graft(self, params: Tensors, y: Tensor, seats: Seats, *, alpha: Tensor, writable: bool) -> Tensor:
        """``y (..., F)`` plus the branches at ``seats``; ``writable``: the memory of ``y`` may be used for it."""

    @abstractmethod
    def emit(self, graph: fx.Graph, x: fx.Node, weights: dict[str, fx.Node]) -> fx.Node:
        """The branch in plain PyTorch, for the exported model: from the seeds' columns ``(..., S, K)`` to the like.

        ``weights`` are the parameters, in the type of ``x``, alpha in the output weights already.
        """

    def merge(self, parts: Parts, params: Tensors, buffers: Tensors, geometry: Geometry) -> Parts:
        layer = with_seeds(parts.head, [(self, params, torch.arange(geometry.out_features)[None])])
        return Parts(layer, layer, parts.norm)


def with_seeds(layer: nn.Module, stacks: Sequence[tuple[ChunkBlueprint, Tensors, Tensor]]) -> fx.GraphModule:
    """``layer`` and permanent seeds behind it as one plain module: its code is generated, its class PyTorch's own.

    Parameters
    ----------
    stacks:
        Blueprint, parameters and columns ``(S, K)`` of each stack of seeds.
    """
    device = next(layer.parameters()).device
    root = nn.Module()
    root.add_module("layer", layer)
    graph = fx.Graph()
    y = graph.call_module("layer", (graph.placeholder("input"),))
    out = y
    for number, (blueprint, params, columns) in enumerate(stacks):
        weights: dict[str, fx.Node] = {}
        for name, value in params.items():
            root.register_parameter(f"{name}_{number}", nn.Parameter(value.detach().clone().to(device)))
            # as the host computes: in the type of the layer's output, under autocast too
            weights[name] = graph.call_method("to", (graph.get_attr(f"{name}_{number}"), y))
        root.register_buffer(f"columns_{number}", columns.reshape(-1).to(device))
        flat = graph.get_attr(f"columns_{number}")
        x = graph.call_function(torch.index_select, (y, -1, flat))
        x = graph.call_method("unflatten", (x, -1, tuple(columns.shape)))
        delta = graph.call_method("flatten", (blueprint.emit(graph, x, weights), -2))
        out = graph.call_function(torch.index_add, (out, -1, flat, graph.call_method("to", (delta, y))))
    graph.output(out)
    return fx.GraphModule(root, graph, class_name=f"{type(layer).__name__}WithSeeds")
