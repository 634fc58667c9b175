"""Plain torch modules for exported branches: ordinary layers, and traced modules that load without Esper.

A traced module (``torch.fx``) is its layers and a few lines of generated code; saved as a whole it needs torch alone.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from esper.kasmina.geometry import ConvGeometry
from esper.kasmina.layers import Conv, is_conv

Layer = TypeVar("Layer", bound=nn.Linear | Conv | nn.Embedding)

_CONVOLUTIONS: dict[int, type[Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def empty_linear(in_features: int, out_features: int, *, bias: bool = False) -> nn.Linear:
    """A Linear without values: a constructor that initialises would advance the global random stream."""
    layer = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias)
    assert isinstance(layer, nn.Linear)
    return layer


def empty_embedding(num_embeddings: int, features: int) -> nn.Embedding:
    """An Embedding without values."""
    layer = nn.utils.skip_init(nn.Embedding, num_embeddings, features)
    assert isinstance(layer, nn.Embedding)
    return layer


def empty_conv(conv: ConvGeometry, in_channels: int, out_channels: int, *, groups: int = 1, bias: bool = False) -> Conv:
    """A convolution of a host layer's geometry without values."""
    family = _CONVOLUTIONS[len(conv.kernel)]
    layer = nn.utils.skip_init(
        family, in_channels, out_channels, conv.kernel, conv.stride, conv.padding, conv.dilation, groups, bias
    )
    assert is_conv(layer)
    return layer


def filled(layer: Layer, weight: Tensor, bias: Tensor | None = None) -> Layer:
    """``layer`` with these values, on their device and of their dtype."""
    layer.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and not isinstance(layer, nn.Embedding) and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer


def traced(module: nn.Module, name: str) -> fx.GraphModule:
    """A module whose forward is generated code over its children, which stay modules of their own."""

    class Tracer(fx.Tracer):  # local: a graph remembers any other tracer's class by its import path
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    graph = Tracer().trace(module)
    for node in graph.nodes:
        node.type = None  # annotations are strings here, which torch's pickling of generated code takes for types
    return fx.GraphModule(module, graph, name)
