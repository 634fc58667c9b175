# Kernel arguments have no types that Python knows, and a launch takes options that the kernel does not name.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false
"""Thousands of small seeds in one launch: each reads its own columns of y and adds its branch to them.

    y[:, c_s] += alpha_s * W2_s silu(W1_s y[:, c_s] + b1_s)

A program takes a tile of rows and a *group* of seeds whose columns together fill 16 or more: their weights are put into
one block-diagonal matrix, so that seeds of 4 features run on the matrix units, and a seed of 64 features is a group by
itself. Gradients of weights are summed in fixed order: every program keeps its own partial sum, no atomics.

Shapes: N rows, F features, S seeds, K columns and H hidden units a seed; a group has G seeds, GK >= G * K columns and
GH >= G * H hidden units (powers of two, at least 16: the smallest tile of the matrix units).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.kasmina.ops.launches import Launches, alignment
from esper.kasmina.ops.sizes import power_above

_WHOLE = 16
"""Run length from which whole groups are runs (``WHOLE_RUNS`` of the package)."""
_UNITS = 64
"""Most hidden units of a group of several seeds."""
_COPY = 128
"""Columns copied at a time by programs that write a whole new tensor."""


@triton.jit
def _group_columns(columns, group, seeds, K: tl.constexpr, G: tl.constexpr, GK: tl.constexpr, DENSE: tl.constexpr,
                   RUN: tl.constexpr):  # fmt: skip
    """Feature columns of a group ``(GK,)`` and which of them are real; ``RUN`` neighbours at a time lie together."""
    place = tl.arange(0, GK)
    seed = group * G + place // K
    real = (place < G * K) & (seed < seeds)
    if DENSE:
        # the host has checked that every group is one whole, aligned run
        start = tl.multiple_of(tl.load(columns + group * G * K).to(tl.int32), 8)
        return start + place, place < GK
    column = tl.load(columns + seed * K + place % K, mask=real, other=0).to(tl.int32)
    if RUN > 1:
        # the host has checked this too; columns that are not real are never read or written
        column = tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
    return column, real


@triton.jit
def _first_weights(w1, group, seeds, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GK: tl.constexpr,
                   GH: tl.constexpr):  # fmt: skip
    """Offsets and mask of the block-diagonal ``(GK, GH)`` in ``w1 (S, H, K)``."""
    column, unit = tl.arange(0, GK)[:, None], tl.arange(0, GH)[None, :]
    seed = group * G + column // K
    mask = (column // K == unit // H) & (column < G * K) & (unit < G * H) & (seed < seeds)
    return seed * (H * K) + (unit % H) * K + column % K, mask


@triton.jit
def _second_weights(w2, group, seeds, K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GK: tl.constexpr,
                    GH: tl.constexpr):  # fmt: skip
    """Offsets and mask of the block-diagonal ``(GH, GK)`` in ``w2 (S, K, H)``."""
    unit, column = tl.arange(0, GH)[:, None], tl.arange(0, GK)[None, :]
    seed = group * G + column // K
    mask = (column // K == unit // H) & (column < G * K) & (unit < G * H) & (seed < seeds)
    return seed * (H * K) + (column % K) * H + unit % H, mask


@triton.jit
def _group_units(b1, group, seeds, H: tl.constexpr, G: tl.constexpr, GH: tl.constexpr):
    """Offsets and mask of a group's hidden units ``(GH,)`` in ``b1 (S, H)``."""
    unit = tl.arange(0, GH)
    return group * G * H + unit, (unit < G * H) & (group * G + unit // H < seeds)


@triton.jit
def _copy_stretch(source, target, columns, group, groups, block, rows, features, K: tl.constexpr, G: tl.constexpr,
                  ROWS: tl.constexpr, TILES: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Copy a program's rows of the columns from its group's first up to the next group's first.

    All features have one owner so: columns rise from seed to seed, in runs of ``RUN`` at multiples of it: the
    host has checked. The program then waits for itself, as it overwrites some of what it has copied.
    """
    start = tl.load(columns + group * G * K).to(tl.int32)
    start = tl.where(group == 0, 0, start) // RUN
    end = tl.load(columns + (group + 1) * G * K, mask=group + 1 < groups, other=0).to(tl.int32)
    end = tl.where(group + 1 < groups, end, features) // RUN
    for tile in range(TILES):
        row = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)
        for run in range(start, end, BLOCK // RUN):
            column = run * RUN + tl.arange(0, BLOCK)
            mask = (row < rows)[:, None] & (column < end * RUN)[None, :]
            place = row[:, None].to(tl.int64) * features + column[None, :]
            tl.store(target + place, tl.load(source + place, mask=mask), mask=mask)
    tl.debug_barrier()


@triton.jit
def forward_kernel(
    y, out, kept, w1, b1, w2, alpha, columns, rows, features, seeds, groups,
    K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GK: tl.constexpr, GH: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, DENSE: tl.constexpr, RUN: tl.constexpr, KEEP: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """Read columns of ``y (N, F)`` and write them to ``out`` (may be ``y``).

    ``KEEP``: write what was read to ``kept (N, S*K)``. ``COPY``: copy all other columns, so many at a time (0: none).
    """
    pid = tl.program_id(0)
    group, block = pid % groups, pid // groups
    if COPY > 0:
        _copy_stretch(y, out, columns, group, groups, block, rows, features, K, G, ROWS, TILES, RUN, COPY)
    column, real = _group_columns(columns, group, seeds, K, G, GK, DENSE, RUN)
    place1, mask1 = _first_weights(w1, group, seeds, K, H, G, GK, GH)
    place2, mask2 = _second_weights(w2, group, seeds, K, H, G, GK, GH)
    unit, has_unit = _group_units(b1, group, seeds, H, G, GH)
    dtype = y.dtype.element_ty
    first = tl.load(w1 + place1, mask=mask1, other=0.0).to(dtype)
    bias = tl.load(b1 + unit, mask=has_unit, other=0.0).to(tl.float32)
    seed = group * G + tl.arange(0, GK) // K
    scale = tl.load(alpha + seed, mask=real, other=0.0).to(tl.float32)
    second = (tl.load(w2 + place2, mask=mask2, other=0.0).to(tl.float32) * scale[None, :]).to(dtype)
    for tile in range(TILES):
        row = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & real[None, :]
        place = row[:, None].to(tl.int64) * features + column[None, :]
        value = tl.load(y + place, mask=mask, other=0.0)
        z = tl.dot(value, first, input_precision="ieee") + bias[None, :]
        h = z * tl.sigmoid(z)
        delta = tl.dot(h.to(dtype), second, input_precision="ieee")
        tl.store(out + place, (value.to(tl.float32) + delta).to(dtype), mask=mask)
        if KEEP:
            into = row[:, None].to(tl.int64) * (seeds * K) + (group * G * K + tl.arange(0, GK))[None, :]
            tl.store(kept + into, value, mask=mask)


@triton.jit
def backward_kernel(
    g, y, gy, parts, w1, b1, w2, alpha, columns, read_columns,
    rows, features, read_features, seeds, groups,
    K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GK: tl.constexpr, GH: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, DENSE: tl.constexpr, RUN: tl.constexpr, READ_DENSE: tl.constexpr,
    READ_RUN: tl.constexpr, WEIGHTS: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Gradients of one group over ``ROWS * TILES`` rows.

    ``y`` is what the forward read: columns ``read_columns`` of a tensor of ``read_features`` columns. Written are the
    group's columns of ``gy (N, F)`` (with ``COPY`` all others too, so many at a time) and, with ``WEIGHTS``, partial
    sums in ``parts``: P rows of ``(S, H, K)``, ``(S, K, H)`` without alpha, and ``(S, H)``.
    """
    pid = tl.program_id(0)
    group, block = pid % groups, pid // groups
    if COPY > 0:
        _copy_stretch(g, gy, columns, group, groups, block, rows, features, K, G, ROWS, TILES, RUN, COPY)
    column, real = _group_columns(columns, group, seeds, K, G, GK, DENSE, RUN)
    read, _ = _group_columns(read_columns, group, seeds, K, G, GK, READ_DENSE, READ_RUN)
    place1, mask1 = _first_weights(w1, group, seeds, K, H, G, GK, GH)
    place2, mask2 = _second_weights(w2, group, seeds, K, H, G, GK, GH)
    unit, has_unit = _group_units(b1, group, seeds, H, G, GH)
    dtype = y.dtype.element_ty
    first = tl.load(w1 + place1, mask=mask1, other=0.0).to(dtype)
    bias = tl.load(b1 + unit, mask=has_unit, other=0.0).to(tl.float32)
    seed = group * G + tl.arange(0, GK) // K
    scale = tl.load(alpha + seed, mask=real, other=0.0).to(tl.float32)
    second = (tl.load(w2 + place2, mask=mask2, other=0.0).to(tl.float32) * scale[None, :]).to(dtype)
    sum1 = tl.zeros([GK, GH], tl.float32)
    sum2 = tl.zeros([GH, GK], tl.float32)
    sum_bias = tl.zeros([GH], tl.float32)
    for tile in range(TILES):
        row = (block * TILES + tile) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & real[None, :]
        place = row[:, None].to(tl.int64) * features + column[None, :]
        source = row[:, None].to(tl.int64) * read_features + read[None, :]
        value = tl.load(y + source, mask=mask, other=0.0)
        slope = tl.load(g + place, mask=mask, other=0.0)
        z = tl.dot(value, first, input_precision="ieee") + bias[None, :]
        gate = tl.sigmoid(z)
        h = z * gate
        dh = tl.dot(slope, tl.trans(second), input_precision="ieee")
        dz = dh * (gate + h * (1.0 - gate))
        dz_low = dz.to(dtype)
        back = tl.dot(dz_low, tl.trans(first), input_precision="ieee")
        tl.store(gy + place, (slope.to(tl.float32) + back).to(dtype), mask=mask)
        if WEIGHTS:
            sum1 += tl.dot(tl.trans(value), dz_low, input_precision="ieee")
            sum2 += tl.dot(tl.trans(h.to(dtype)), slope, input_precision="ieee")
            sum_bias += tl.sum(dz, 0)  # rows behind the last have a slope of zero, so dz is zero there
    if WEIGHTS:
        own = parts + tl.cast(block, tl.int64) * seeds * (2 * H * K + H)
        tl.store(own + place1, sum1, mask=mask1)
        tl.store(own + seeds * (H * K) + place2, sum2, mask=mask2)
        tl.store(own + seeds * (2 * H * K) + unit, sum_bias, mask=has_unit)


@dataclass(frozen=True)
class Grouping:
    """Seeds a group, its padded sizes, rows a tile, warps and pipeline stages."""

    seeds: int
    columns: int
    units: int
    rows: int
    warps: int
    stages: int = 2

    def is_full(self, width: int) -> bool:
        """Whether seeds of ``width`` columns fill a group's columns."""
        return self.seeds * width == self.columns


@functools.lru_cache(maxsize=256)
def grouping(
    columns: int, units: int, dtype: torch.dtype, *, backward: bool = False, dense: bool = False
) -> Grouping:  # fmt: skip
    """How seeds of ``columns`` columns and ``units`` hidden units are put together; ``dense`` groups are whole runs.

    Tile heights keep a program's matrices in registers (``tests`` compile them and look for spills): the backward pass
    holds three more, and fp32 products run without the matrix units, whose fragments are smaller.
    """
    together = max(1, min(16 // columns, _UNITS // units))
    wide = max(16, power_above(together * columns))
    high = max(16, power_above(together * units))
    large = max(wide, high)
    stages = 2
    if dtype == torch.float32:
        rows, warps = (32, 4) if large <= 32 else (16, 8) if backward else (32, 8)
    elif backward:
        rows, warps = (64, 4) if large <= 32 else (64, 8) if large <= 64 else (32, 8)
        stages = 2 if large <= 64 else 1
    elif large <= 32:
        # benchmarks/ops/sweep.py: whole runs stream, scattered columns want more loads under way
        rows, warps, stages = (64, 4, 3) if dense else (64, 8, 2)
    else:
        rows, warps, stages = (128, 8, 2) if large <= 64 else (64, 8, 1)
    return Grouping(together, wide, high, rows, warps, stages)


def _is_dense(runs: int, plan: Grouping, width: int) -> bool:
    return runs >= _WHOLE and plan.is_full(width)


def _aligned(runs: int, plan: Grouping, width: int) -> int:
    """Neighbours that lie together in every group: ``runs`` are those of seeds side by side, a group may end within."""
    return math.gcd(min(runs, 8), plan.seeds * width)


def _tiles(rows: int, height: int, groups: int, most: int) -> int:
    """Tiles a program: weights are loaded once for all of them, but the chip must stay full."""
    blocks = -(-rows // height)
    return max(1, min(most, blocks * groups // 1024))


def forward(
    y_NF: Tensor, out_NF: Tensor, kept: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor,
    columns: Tensor, *, runs: int, copy: bool = False, plan: Grouping | None = None, tiles: int | None = None,
) -> None:  # fmt: skip
    """Write the seeds' columns of ``out_NF`` (may be ``y_NF``) and, if given, what they read to ``kept (N, S*K)``.

    ``columns (S, K)`` int32; ``runs`` as of :class:`esper.kasmina.ops.graft.Seats`. With ``copy`` the columns rise and
    the others of ``y_NF`` are copied to ``out_NF``.
    """
    rows, features = y_NF.shape
    seeds, units, width = w1.shape
    plan = grouping(width, units, y_NF.dtype, dense=runs >= _WHOLE) if plan is None else plan
    groups = -(-seeds // plan.seeds)
    tiles = _tiles(rows, plan.rows, groups, 4 if runs >= _WHOLE else 1) if tiles is None else tiles
    blocks = -(-rows // (plan.rows * tiles))
    if blocks == 0:
        return
    tensors = (y_NF, out_NF, out_NF if kept is None else kept, w1, b1, w2, alpha, columns)
    numbers = (
        rows, features, seeds, groups,
        width, units, plan.seeds, plan.columns, plan.units, plan.rows, tiles,
        _is_dense(runs, plan, width), _aligned(runs, plan, width), kept is not None, _COPY if copy else 0,
    )  # fmt: skip
    _launches.launch(
        (numbers, plan.warps, plan.stages, *_kinds(tensors)), forward_kernel, (groups * blocks,), *tensors, *numbers,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


_launches = Launches()


def _kinds(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tensors[0].device, alignment(tensors), tuple([tensor.dtype for tensor in tensors])


def backward(
    g_NF: Tensor, y: Tensor, gy_NF: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, columns: Tensor,
    read_columns: Tensor, *, runs: int, read_runs: int, weights: bool, copy: bool = False, plan: Grouping | None = None,
    tiles: int | None = None,
) -> Tensor:  # fmt: skip
    """Write the seeds' columns of ``gy_NF``; return the gradients of w1, ``w2 / alpha`` and b1 behind each other, flat
    (empty without ``weights``).

    ``y`` is what the forward read, at ``read_columns`` of its last axis. With ``copy`` the columns rise and the others
    of ``g_NF`` are copied to ``gy_NF``.
    """
    rows, features = g_NF.shape
    seeds, units, width = w1.shape
    plan = grouping(width, units, y.dtype, backward=True) if plan is None else plan
    groups = -(-seeds // plan.seeds)
    tiles = _tiles(rows, plan.rows, groups, 1 if copy else 8) if tiles is None else tiles
    blocks = max(1, -(-rows // (plan.rows * tiles)))
    size = seeds * units * width
    parts = torch.empty((blocks, 2 * size + seeds * units) if weights else (0,), device=g_NF.device)
    tensors = (g_NF, y, gy_NF, parts, w1, b1, w2, alpha, columns, read_columns)
    numbers = (
        rows, features, y.shape[1], seeds, groups,
        width, units, plan.seeds, plan.columns, plan.units, plan.rows, tiles,
        _is_dense(runs, plan, width), _aligned(runs, plan, width),
        _is_dense(read_runs, plan, width), _aligned(read_runs, plan, width),
        weights, _COPY if copy else 0,
    )  # fmt: skip
    _launches.launch(
        (numbers, plan.warps, plan.stages, *_kinds(tensors)), backward_kernel, (groups * blocks,), *tensors, *numbers,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return parts.sum(0) if weights else parts
