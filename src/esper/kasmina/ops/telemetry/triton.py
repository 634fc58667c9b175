"""Telemetry on the GPU: mean and population variance of each chunk, in one or two launches.

    mean_c = sum(y) / n        var_c = sum((y - mean_c)^2) / n        over the rows read and the chunk's features

Each program walks down some tiles of rows by columns and sums differences from the first one in registers, so a large
mean cancels nothing and every thread has several loads under way. Results of programs are merged in a fixed order by
the formula of Chan, Golub and LeVeque (1979): no atomics, the same bits each run.
A few sampled rows of small chunks fit one tile and need no second launch.

Shapes: N rows read, F features, C chunks, P partial results a chunk (row blocks times column pieces).
"""

# Kernel arguments have no types that Python knows, and a launch takes options that the kernel does not name.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.kasmina.ops.launches import Launches, alignment
from esper.kasmina.ops.sizes import power_above, power_below
from esper.kasmina.ops.telemetry.reference import row_step

_SAMPLE = 1024
"""Rows up to which one program walks down all of them."""
_VECTOR = 8
"""Half-precision elements in the widest load (16 bytes)."""
_MERGED = 16
"""Chunks that a program merges."""
_MOST_PROGRAMS = 1024
"""Kinds of tensors that are remembered: shapes that vary without end must not fill the memory."""


@triton.jit
def _first_column(chunk, size, longer):
    return chunk * size + tl.minimum(chunk, longer)


@triton.jit
def tile_kernel(
    y, mean_out, spread_out,
    rows, row_step, inner, stride_outer, stride_inner, stride_column,
    features, chunks, size, longer, column_blocks,
    CHUNKS: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, NESTED: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """``TILES`` tiles below each other: means and sums of squared deviations of their chunks.

    Each of ``ROWS`` lanes sums what its rows differ from its first one, so a large mean cancels nothing: a sum of
    squares is at most ``1 + TILES`` times its spread. ``LAST``: variances are written, nothing is left to merge.
    ``SIZE`` is the chunk size where all chunks have it and it is a power of two, else 0.
    """
    pid = tl.program_id(0)
    block, part = pid % column_blocks, pid // column_blocks
    first = (block // PIECES) * CHUNKS
    chunk = first + tl.arange(0, CHUNKS)
    low = _first_column(chunk, size, longer)
    high = tl.where(chunk < chunks, _first_column(chunk + 1, size, longer), low)
    end = _first_column(tl.minimum(first + CHUNKS, chunks), size, longer)
    if SIZE > 0:
        base = block * (CHUNKS * SIZE)
        limit = features
    else:
        # whole vectors: what lies before the first and behind the last chunk is read but belongs to no chunk
        base = _first_column(first, size, longer) // 8 * 8 + (block % PIECES) * WIDTH
        limit = tl.minimum((end + 7) // 8 * 8, features)
    column = base + tl.arange(0, WIDTH)
    lane = tl.arange(0, ROWS)
    top = part * (ROWS * TILES)
    shift = tl.zeros([ROWS, WIDTH], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squared = tl.zeros([ROWS, WIDTH], tl.float32)
    for tile in tl.static_range(TILES):
        row = top + tile * ROWS + lane
        source = row * row_step
        if NESTED:
            offset = (source // inner).to(tl.int64) * stride_outer + (source % inner).to(tl.int64) * stride_inner
        else:
            offset = source.to(tl.int64) * stride_inner
        pointers = y + offset[:, None] + column[None, :].to(tl.int64) * stride_column
        mask = (row < rows)[:, None] & (column < limit)[None, :]
        value = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if tile == 0:
            shift = value
        else:
            off = tl.where((row < rows)[:, None], value - shift, 0.0)
            total += off
            squared += off * off
    number = tl.minimum(tl.maximum((rows - top - lane + ROWS - 1) // ROWS, 0), TILES).to(tl.float32)
    share = (1.0 / tl.maximum(number, 1.0))[:, None]
    average = shift + total * share
    squared -= total * total * share
    sums = tl.sum(average * number[:, None], 0)
    num_rows = tl.minimum(rows - top, ROWS * TILES)
    if SIZE > 0:
        count = (num_rows * SIZE).to(tl.float32)
        mean = tl.sum(tl.reshape(sums, [CHUNKS, SIZE]), 1) / count
        spread_mean = tl.reshape(tl.broadcast_to(mean[:, None], [CHUNKS, SIZE]), [WIDTH])
    else:
        member = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])
        count = tl.maximum(num_rows * tl.sum(member.to(tl.int32), 1), 1).to(tl.float32)
        mean = tl.sum(tl.where(member, sums[None, :], 0.0), 1) / count
        spread_mean = tl.sum(tl.where(member, mean[:, None], 0.0), 0)
    centred = average - spread_mean[None, :]
    spread = tl.sum(squared + centred * centred * number[:, None], 0)
    if SIZE > 0:
        squares = tl.sum(tl.reshape(spread, [CHUNKS, SIZE]), 1)
    else:
        squares = tl.sum(tl.where(member, spread[None, :], 0.0), 1)
    if LAST:
        squares = squares / count
    place = (part * PIECES + block % PIECES) * chunks + chunk
    tl.store(mean_out + place, mean, mask=chunk < chunks)
    tl.store(spread_out + place, squares, mask=chunk < chunks)


@triton.jit
def _part_count(
    part, low, high, base, rows,
    PIECES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Elements behind each partial result, ``(parts, chunks)`` fp32: known from the layout alone."""
    start = base[None, :] + (part % PIECES)[:, None] * WIDTH
    columns = tl.minimum(high[None, :], start + WIDTH) - tl.maximum(low[None, :], start)
    height = tl.minimum(rows - (part // PIECES) * ROWS, ROWS)
    return (tl.maximum(columns, 0) * tl.maximum(height, 0)[:, None]).to(tl.float32)


@triton.jit
def merge_kernel(
    means, spreads, mean_out, variance_out, rows, chunks, size, longer,
    parts, PIECES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    ROUNDS: tl.constexpr,
):  # fmt: skip
    """Merge ``parts`` partial results a chunk, ``PARTS`` of them a round, always in the same order."""
    chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = chunk < chunks
    low = _first_column(chunk, size, longer)
    high = _first_column(chunk + 1, size, longer)
    base = low // 8 * 8 if PIECES > 1 else low
    # deviations from the first part's mean, so that a large common mean costs no digits
    shift = tl.load(means + chunk, mask=real, other=0.0)
    total = tl.zeros([BLOCK], tl.float32)
    for round_ in range(ROUNDS):
        part = round_ * PARTS + tl.arange(0, PARTS)
        known = (part < parts)[:, None] & real[None, :]
        mean = tl.load(means + part[:, None] * chunks + chunk[None, :], mask=known, other=0.0)
        count = _part_count(part, low, high, base, rows, PIECES, WIDTH, ROWS)
        total += tl.sum(tl.where(known & (count > 0), count * (mean - shift[None, :]), 0.0), 0)
    number = rows * (high - low).to(tl.float32)
    whole = shift + total / number
    squares = tl.zeros([BLOCK], tl.float32)
    for round_ in range(ROUNDS):
        part = round_ * PARTS + tl.arange(0, PARTS)
        known = (part < parts)[:, None] & real[None, :]
        place = part[:, None] * chunks + chunk[None, :]
        mean = tl.load(means + place, mask=known, other=0.0)
        spread = tl.load(spreads + place, mask=known, other=0.0)
        count = _part_count(part, low, high, base, rows, PIECES, WIDTH, ROWS)
        off = mean - whole[None, :]
        squares += tl.sum(tl.where(known & (count > 0), spread + count * off * off, 0.0), 0)
    tl.store(mean_out + chunk, whole, mask=real)
    tl.store(variance_out + chunk, squares / number, mask=real)


@dataclass(frozen=True)
class Shape:
    """Columns and rows of a tile, tiles a program, and warps."""

    width: int
    rows: int
    tiles: int
    warps: int


def _shape(rows: int, largest: int, regular: bool) -> Shape:
    """The fastest of ``benchmarks/ops/sweep.py``: a sample is read at once, by programs that need no second launch."""
    if rows <= _SAMPLE:
        return Shape(16 if regular else 32, 64, _SAMPLE // 64, 8)
    return Shape(64, 32, 16, 2 if largest <= 64 else 8)


@dataclass(frozen=True)
class Tiling:
    """How a site is cut up: whole chunks a column block, or pieces of one chunk; a program's rows, columns, tiles."""

    chunks: int
    pieces: int
    width: int
    rows: int
    tiles: int
    size: int
    """Chunk size if all chunks have it and it is a power of two, else 0."""
    warps: int


@functools.lru_cache(maxsize=1024)
def tiling(rows: int, features: int, chunks: int, shape: Shape | None = None) -> Tiling:
    """Programs for ``rows`` read rows; ``shape`` overrides the tile that is aimed at."""
    largest = -(-features // chunks)
    even = features % chunks == 0
    regular = even and largest & (largest - 1) == 0
    slack = 0 if even and largest % _VECTOR == 0 else _VECTOR - 1
    aim = shape or _shape(rows, largest, regular)
    width = aim.width
    if largest + (0 if regular else slack) > width:
        width = max(width, 16)
        pieces, together = -(-(largest + slack) // width), 1
        size = 0
    else:
        pieces = 1
        together = min(power_below((width - (0 if regular else slack)) // largest), power_above(chunks))
        size = largest if regular else 0
        width = together * largest if regular else power_above(together * largest + slack)
    height = min(aim.rows, max(16, power_above(rows)))
    tiles = min(aim.tiles, power_above(-(-rows // height)))
    return Tiling(together, pieces, width, height, tiles, size, aim.warps)


@dataclass(frozen=True)
class RowLayout:
    """Where rows of a tensor's features lie: ``outer`` blocks of ``inner`` rows, strides in elements."""

    outer: int
    inner: int
    stride_outer: int
    stride_inner: int
    stride_column: int


def row_layout(y: Tensor, feature_axis: int) -> RowLayout | None:
    """Rows of ``y`` without moving anything, or ``None`` where two strides do not describe them."""
    axis = feature_axis % y.dim()
    levels: list[tuple[int, int]] = []
    for dim in range(y.dim()):
        if dim == axis or y.shape[dim] == 1:
            continue
        size, stride = y.shape[dim], y.stride(dim)
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    levels = [(1, 0)] * (2 - len(levels)) + levels
    return RowLayout(levels[0][0], levels[1][0], levels[0][1], levels[1][1], y.stride(axis))


def chunk_statistics_into(
    out: Tensor, y: Tensor, feature_axis: int, max_rows: int, *, shape: Shape | None = None
) -> None:
    """Write mean and variance of each chunk of ``y``, over up to ``max_rows`` rows strided over it, into ``out``.

    Parameters
    ----------
    out:
        ``(2, C)`` fp32, contiguous, overwritten. Chunks are those of :func:`esper.kasmina.chunks.chunk_bounds`.
    y:
        Any float dtype and up to two levels of row strides; other layouts are copied first.
    """
    key = (y.shape, y.stride(), y.dtype, y.device, feature_axis, max_rows, out.shape, shape, alignment((y, out)))
    found = _programs.get(key)
    if found is None:
        layout = row_layout(y, feature_axis)
        if layout is None:
            y = y.movedim(feature_axis, -1).contiguous()
            return chunk_statistics_into(out, y, -1, max_rows, shape=shape)
        if layout.outer * layout.inner == 0:
            out.fill_(float("nan"))
            return None
        found = Programs.of(layout, y.shape[feature_axis], out.shape[1], max_rows, shape)
        if len(_programs) < _MOST_PROGRAMS:
            _programs[key] = found
    mean, spread = out.unbind() if found.parts == 1 else torch.empty(2, found.parts, out.shape[1], device=y.device)
    _launches.launch(
        ("tile", key), tile_kernel, found.tile_grid, y, mean, spread, *found.tile, num_warps=found.warps
    )  # fmt: skip
    if found.parts > 1:
        _launches.launch(
            ("merge", key), merge_kernel, found.merge_grid, mean, spread, *out.unbind(), *found.merge, num_warps=4
        )  # fmt: skip
    return None


@dataclass(frozen=True)
class Programs:
    """The launches for one kind of tensor: grids, and what follows the pointers among the arguments, constants too."""

    parts: int
    tile_grid: tuple[int]
    tile: tuple[int, ...]
    warps: int
    merge_grid: tuple[int]
    merge: tuple[int, ...]

    @classmethod
    def of(cls, layout: RowLayout, features: int, chunks: int, max_rows: int, shape: Shape | None) -> Programs:
        """For up to ``max_rows`` of the rows of ``layout``."""
        total = layout.outer * layout.inner
        step = row_step(total, max_rows)
        rows = -(-total // step)
        plan = tiling(rows, features, chunks, shape)
        size, longer = divmod(features, chunks)
        blocks = -(-chunks // plan.chunks) * plan.pieces
        height = plan.rows * plan.tiles
        row_blocks = -(-rows // height)
        parts = row_blocks * plan.pieces
        together = min(128, power_above(parts))
        return cls(
            parts, (blocks * row_blocks,),
            (
                rows, step, layout.inner, layout.stride_outer, layout.stride_inner, layout.stride_column,
                features, chunks, size, longer, blocks,
                plan.chunks, plan.size, plan.pieces, plan.width, plan.rows, plan.tiles, layout.outer > 1, parts == 1,
            ),
            plan.warps, (-(-chunks // _MERGED),),
            (
                rows, chunks, size, longer, parts, plan.pieces, plan.width, height, _MERGED, together,
                power_above(-(-parts // together)),
            ),
        )  # fmt: skip


_programs: dict[tuple[Any, ...], Programs] = {}
_launches = Launches()
