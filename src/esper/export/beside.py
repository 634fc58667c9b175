"""A host layer and what was grown beside it, as one plain module that needs no Esper to load and run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import Port
from esper.kasmina.geometry import Geometry
from esper.kasmina.layer_kinds import weight_of
from esper.kasmina.layers import features, is_batch_norm, is_growable
from esper.kasmina.plain import traced


def layer_with_branches(
    layer: nn.Module, banks: list[Bank], geometry: Geometry, own: Tensor | None = None
) -> fx.GraphModule:
    """``layer`` (reused, not copied) and its branches, called as the layer is called.

    Its children are ``layer`` and ``branches``; plain settings of the layer (``batch_first``, ``in_features``) can be
    read from it, tensors cannot. A layer that a span has widened keeps its width: branches know the first features that
    it reads, and of its output the columns ``own`` (``None``: the first ones).
    """
    root = _form(layer)(layer, banks, geometry, torch.arange(geometry.out_features) if own is None else own)
    wrapped = traced(root, "Grown" + type(layer).__name__)
    settings = {k: v for k, v in vars(layer).items() if isinstance(v, (bool, int, float, str, tuple))}
    for name, value in settings.items():
        if not name.startswith("_") and not hasattr(wrapped, name):
            setattr(wrapped, name, value)
    return wrapped


def _form(layer: nn.Module) -> type[_Grown]:
    if isinstance(layer, nn.MultiheadAttention):
        return _GrownAttention
    return _GrownRecurrent if isinstance(layer, nn.RNNBase) else _GrownLayer


class _Grown(nn.Module):
    """Sum of a layer's output and its branches; traced, so nothing of this class is exported."""

    own: Tensor | None

    def __init__(self, layer: nn.Module, banks: list[Bank], geometry: Geometry, own: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.branches = nn.ModuleList()
        self.ports: list[Port] = []
        self.placed: list[bool] = []
        self.axis = geometry.feature_axis
        self.reads = geometry.in_features
        reads, width = _widths(layer)
        self.is_wide, self.reads_wide = width > geometry.out_features, reads > geometry.in_features
        self.register_buffer("own", own.to(weight_of(layer).device) if self.is_wide else None)
        for bank in banks:
            self._adopt(bank, geometry, own)

    def _adopt(self, bank: Bank, geometry: Geometry, own: Tensor) -> None:
        weight = weight_of(self.layer)
        size = bank.num_slots if bank.plan.stacks_plainly else 1
        for first in range(0, bank.num_slots, size):
            slots = slice(first, first + size)
            params = {name: value[slots].detach() for name, value in bank.params.items()}
            buffers = {name: value[slots].detach() for name, value in bank.buffers.items()}
            branch = bank.plan.plain(params, buffers, geometry).to(device=weight.device, dtype=weight.dtype)
            columns = own if bank.columns is None else own[bank.columns[slots].flatten()]
            self.placed.append(bank.columns is not None or self.is_wide)
            self.register_buffer(f"columns_{len(self.ports)}", columns.to(weight.device) if self.placed[-1] else None)
            self.ports.append(bank.plan.port)
            self.branches.append(branch)

    def add(self, x: Any, y: Tensor) -> Tensor:
        out = y
        own = y if self.own is None else y.index_select(self.axis, self.own)
        read = x.narrow(self.axis, 0, self.reads) if self.reads_wide else x
        for number, (branch, port) in enumerate(zip(self.branches, self.ports, strict=True)):
            columns = getattr(self, f"columns_{number}")
            if port is Port.INPUT:
                delta = branch(read)
            elif port is Port.COLUMNS and columns is not None:
                delta = branch(y.index_select(self.axis, columns))
            else:
                delta = branch(own)
            out = out + delta.to(y) if columns is None else out.index_add(self.axis, columns, delta.to(y))
        return out


class _GrownLayer(_Grown):
    def forward(self, input: Tensor) -> Tensor:
        return self.add(input, self.layer(input))


class _GrownRecurrent(_Grown):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        outputs = self.layer(input, hx)
        return self.add(input, outputs[0]), outputs[1]


class _GrownAttention(_Grown):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        outputs = self.layer(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return self.add(query, outputs[0]), outputs[1]


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Features read and written by a layer that a span may have widened; zeros for any other."""
    if is_batch_norm(layer):
        return layer.num_features, layer.num_features
    return features(layer) if is_growable(layer) else (0, 0)
