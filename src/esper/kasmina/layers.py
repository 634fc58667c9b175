"""Host layers that can grow, behind one view: features, weight as a matrix, and how to make a layer of another width.

Linear, Conv1d / Conv2d / Conv3d, and the ``Conv1D`` of ``transformers`` (GPT-2's layers): a Linear layer whose weight
is stored as (in, out). It is known by its name and attributes, so nothing has to be installed to recognise it.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from esper.kasmina.geometry import ConvGeometry, has_bias

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

_EXACT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_growable(module: nn.Module) -> bool:
    """Whether a module is of a known kind, or derived from one."""
    return isinstance(module, _EXACT) or is_transposed(module)


def is_known(module: nn.Module) -> bool:
    """Whether a module is of a known kind exactly: a subclass may compute anything."""
    return type(module) in _EXACT or is_transposed(module)


def is_conv(module: nn.Module) -> TypeGuard[Conv]:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


def is_batch_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """BatchNorm1d, 2d or 3d exactly: a SyncBatchNorm's statistics are those of several processes."""
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a ``transformers`` ``Conv1D``: ``y = x @ weight + bias`` with ``weight (in, nf)``."""
    if type(module).__name__ != "Conv1D" or not isinstance(getattr(module, "nf", None), int):
        return False
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
        return False
    return weight.dim() == 2 and weight.shape[1] == module.nf and bias.shape == (module.nf,)


def weight_matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as ``(out, in, *kernel)``: the tensor itself or a view of it."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(layer) else weight


def features(layer: nn.Module) -> tuple[int, int]:
    """Input and output features (channels)."""
    matrix = weight_matrix(layer)
    return matrix.shape[1], matrix.shape[0]


def bias_of(layer: nn.Module) -> Tensor | None:
    return getattr(layer, "bias", None)


def conv_geometry(layer: nn.Module) -> ConvGeometry | None:
    """Kernel, stride, padding and dilation; ``None`` for a layer without a kernel."""
    if not is_conv(layer):
        return None
    assert not isinstance(layer.padding, str)
    parts = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return ConvGeometry(*(tuple(int(size) for size in part) for part in parts))


@torch.no_grad()
def rebuilt(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the same class, device and dtype with this ``weight (out, in, *kernel)`` and ``bias``.

    No random number is drawn: a constructor that initialises would advance the global stream.
    """
    made = _empty(layer, weight.shape[1], weight.shape[0])
    weight_matrix(made).copy_(weight)
    inner = bias_of(made)
    if inner is not None:
        assert bias is not None
        inner.copy_(bias)
    return made


def _empty(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if is_conv(layer):
        return nn.utils.skip_init(
            type(layer), inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            bias=has_bias(layer), device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
    if isinstance(layer, nn.Linear):
        return nn.utils.skip_init(
            nn.Linear, inputs, outputs, bias=has_bias(layer), device=weight.device, dtype=weight.dtype
        )
    return _empty_transposed(layer, weight, inputs, outputs)


def _empty_transposed(layer: nn.Module, weight: Tensor, inputs: int, outputs: int) -> nn.Module:
    """Past the constructor, which differs between versions of ``transformers`` and initialises."""
    made = object.__new__(type(layer))
    nn.Module.__init__(made)
    for name, value in vars(layer).items():
        if name not in vars(made):
            setattr(made, name, value)
    made.nf = outputs  # type: ignore[reportAttributeAccessIssue]
    if hasattr(layer, "nx"):
        made.nx = inputs  # type: ignore[reportAttributeAccessIssue]
    made.weight = nn.Parameter(weight.new_empty(inputs, outputs))
    made.bias = nn.Parameter(weight.new_empty(outputs))
    return made


def with_rows(layer: nn.Module, rows: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with further outputs behind its own; ``rows (U, in, *kernel)``. No ``bias`` is one of zeros."""
    matrix, own = weight_matrix(layer), bias_of(layer)
    new = None if own is None else torch.cat([own, own.new_zeros(rows.shape[0]) if bias is None else bias.to(own)])
    return rebuilt(layer, torch.cat([matrix, rows.to(matrix)]), new)


def with_columns(layer: nn.Module, columns: Tensor) -> nn.Module:
    """The layer with further inputs behind its own; ``columns (out, U, *kernel)``."""
    matrix = weight_matrix(layer)
    return rebuilt(layer, torch.cat([matrix, columns.to(matrix)], dim=1), bias_of(layer))


def sizes(layer: nn.Module) -> dict[str, int]:
    """What to pass to the layer's constructor beside what it has already, to get its present width."""
    if is_batch_norm(layer):
        return {"num_features": layer.num_features}
    inputs, outputs = features(layer)
    if is_transposed(layer):
        return {"nf": outputs, "nx": inputs}
    if is_conv(layer):
        return {"in_channels": inputs, "out_channels": outputs}
    return {"in_features": inputs, "out_features": outputs}
