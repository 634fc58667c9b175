"""Telemetry: mean and variance a chunk, over sampled or all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.telemetry.reference import chunk_statistics, feature_statistics_into, row_step

__all__ = ["chunk_statistics", "record_statistics", "traced_statistics"]


def record_statistics(
    out: Tensor, y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor
) -> None:
    """Overwrite ``out`` with the statistics of each chunk of ``y``; ``y`` is neither changed nor kept.

    Parameters
    ----------
    out:
        ``(2, C)`` fp32: means and population variances.
    y:
        Any shape with F features on ``feature_axis``, any float dtype.
    max_rows:
        Rows (positions) read at most, strided over all of ``y``.
    chunk_of, chunk_sizes:
        ``(F,)`` int64, the chunk of each feature, and ``(C,)`` fp32, the features of each chunk.
    """
    y = y.detach()
    if not (y.is_cuda or dispatch.INTERPRETED):
        _sampled_reference(out, y, feature_axis, max_rows, chunk_of, chunk_sizes)
    elif torch.compiler.is_compiling():
        _record_opaque(out, y, feature_axis, max_rows, chunk_of, chunk_sizes)
    else:
        _record(out, y, feature_axis, max_rows, chunk_of, chunk_sizes)


@torch.no_grad()
def traced_statistics(y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor) -> Tensor:
    """What :func:`record_statistics` writes, as a new tensor: for a compiled graph.

    There a tensor that is written would cost more than the launch. It makes ``y`` look, to the compiler's choice of
    what to keep for the backward pass, as if it were read again far away, and functions of ``y`` are kept instead that
    are larger (the derivative of an activation in fp32); and CUDA graphs are given up where an input is written. So
    ``y`` goes into one node as it is, not even detached, and nothing in the graph reads what comes out.
    """
    if y.is_cuda or dispatch.INTERPRETED:
        return _statistics_opaque(y, feature_axis, max_rows, chunk_of, chunk_sizes)
    return chunk_statistics(_sampled_rows(y, feature_axis, max_rows), chunk_of, chunk_sizes)


def _sampled_reference(
    out: Tensor, y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor
) -> None:
    rows = _sampled_rows(y, feature_axis, max_rows)
    if chunk_of.numel() == chunk_sizes.numel():
        feature_statistics_into(out, rows)
    else:
        out.copy_(chunk_statistics(rows, chunk_of, chunk_sizes))


def _sampled_rows(y: Tensor, feature_axis: int, max_rows: int) -> Tensor:
    """``(N, F)``: at most ``max_rows`` rows, strided over all of ``y``."""
    if y.dim() == 2 and feature_axis in (1, -1) and y.shape[0] <= max_rows:
        return y
    features = y.shape[feature_axis]
    total = y.numel() // max(1, features)
    stride = row_step(total, max_rows)
    if feature_axis == 1 and y.dim() > 2 and stride > 1 and y.is_contiguous():
        # features lie apart: turning all of y round would copy it, the few rows that are read are picked instead
        index = torch.arange(-(-total // stride), device=y.device) * stride
        positions = total // y.shape[0]
        return y.flatten(2)[index // positions, :, index % positions]
    return y.movedim(feature_axis, -1).reshape(-1, features)[::stride]


def _record(out: Tensor, y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor) -> None:
    if dispatch.runs_triton("telemetry", y):
        from esper.kasmina.ops.telemetry import triton

        triton.chunk_statistics_into(out, y, feature_axis, max_rows)
    else:
        _sampled_reference(out, y, feature_axis, max_rows, chunk_of, chunk_sizes)


@torch.library.custom_op("esper::record_statistics", mutates_args={"out"})
def _record_opaque(
    out: Tensor, y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor
) -> None:
    """One node of a compiled graph; the choice between the twins is made when it runs."""
    _record(out, y, feature_axis, max_rows, chunk_of, chunk_sizes)


@_record_opaque.register_fake
def _(out: Tensor, y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor) -> None:
    return None


@torch.library.custom_op("esper::statistics", mutates_args=())
def _statistics_opaque(y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor) -> Tensor:
    """As ``esper::record_statistics``, with a result instead of a place for it."""
    out = torch.empty(2, chunk_sizes.numel(), device=y.device)
    _record(out, y, feature_axis, max_rows, chunk_of, chunk_sizes)
    return out


@_statistics_opaque.register_fake
def _(y: Tensor, feature_axis: int, max_rows: int, chunk_of: Tensor, chunk_sizes: Tensor) -> Tensor:
    return chunk_sizes.new_empty(2, chunk_sizes.shape[0])
