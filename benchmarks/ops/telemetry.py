"""Telemetry: mean and variance a chunk, against the read floor and against PyTorch.

Run from the repository root, on a machine with a GPU (some ten seconds)::

    PYTHONPATH=src:. python benchmarks/ops/telemetry.py --out benchmarks/results/ops_telemetry.json
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.ops import measure
from torch import Tensor

from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.ops.telemetry import triton as kernels

CASES = (
    # rows, features, chunks, rows read at most, mean
    (1, 1, 1, 10, 0.0),
    (5, 123, 7, 10, 3.0),
    (123, 5, 5, 50, 0.0),
    (1000, 96, 24, 1000, 100.0),
    (1000, 96, 24, 100, 0.0),
    (70, 300, 2, 70, 0.0),
    (260, 520, 3, 260, 5.0),
    (1500, 40, 10, 1500, 0.0),
    (90, 69, 23, 90, 0.0),
    (33, 257, 64, 33, 1.0),
    (3, 8193, 1, 3, 2.0),
)
_SPREAD = 3.0


def exact(y_NF: Tensor, chunks: int, max_rows: int) -> Tensor:
    """``(2, C)`` float64, by definition, chunk after chunk."""
    step = max(1, y_NF.shape[0] // max_rows)
    read = y_NF[::step][:max_rows].double()
    bounds = chunk_bounds(read.shape[1], chunks).tolist()
    parts = [read[:, low:high] for low, high in itertools.pairwise(bounds)]
    return torch.stack([torch.stack([p.mean() for p in parts]), torch.stack([p.var(correction=0) for p in parts])])


def check(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[dict[str, Any]]:
    """Every case in every type; twice, for the same bits; then images, whose features are not the last axis."""
    for dtype in dtypes:
        for rows, features, chunks, max_rows, mean in CASES:
            y = (torch.randn(rows, features, device=device) * _SPREAD + mean).to(dtype)
            first, second = (torch.full((2, chunks), float("nan"), device=device) for _ in range(2))
            kernels.chunk_statistics_into(first, y, -1, max_rows)
            kernels.chunk_statistics_into(second, y, -1, max_rows)
            wanted = exact(y, chunks, max_rows)
            # sums are fp32 whatever y is, so the tolerance is that of fp32
            line = measure.compare(
                f"{rows}x{features}, {chunks} chunks, {max_rows} rows, mean {mean:g}", torch.float32,
                {"mean": (first[0], wanted[0]), "variance": (first[1], wanted[1])},
            )  # fmt: skip
            yield line | {"equal": line["equal"] and torch.equal(first, second), "dtype": str(dtype)}
        images = torch.randn(6, 24, 7, 5, device=device).to(dtype)
        out = torch.full((2, 8), float("nan"), device=device)
        kernels.chunk_statistics_into(out, images, 1, 50)
        wanted = exact(images.movedim(1, -1).reshape(-1, 24), 8, 50)
        line = measure.compare("images", torch.float32, {"mean": (out[0], wanted[0]), "variance": (out[1], wanted[1])})
        yield line | {"dtype": str(dtype)}


def eager(y: Tensor, chunks: int, rows: int) -> Tensor:
    """What one writes in PyTorch where chunks are equally long."""
    read = y[:: max(1, y.shape[0] // rows)][:rows]
    variance, mean = torch.var_mean(read.view(read.shape[0], chunks, -1).float(), dim=(0, 2), correction=0)
    return torch.stack([mean, variance])


def time_rows(clock: measure.Clock, sweep: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for rows in (256, 1024, 8192, 32768):
        y = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        lines.append(_time(clock, y, 1024, min(rows, 1024), bar=8.0))
        if rows > 1024:
            lines.append(_time(clock, y, 1024, rows, bar=1.6 * clock.floor_us(y.nbytes) if rows == 8192 else None))
        if sweep:
            lines += _sweep(clock, y, 1024)
    for features, chunks in ((768, 768), (2304, 1024), (3072, 1024)):
        y = torch.randn(16384, features, device="cuda", dtype=torch.bfloat16)
        lines.append(_time(clock, y, chunks, 1024, bar=8.0))
    return lines


def _time(clock: measure.Clock, y: Tensor, chunks: int, read: int, *, bar: float | None) -> dict[str, Any]:
    rows, features = y.shape
    out = torch.empty(2, chunks, device="cuda")
    call = partial(kernels.chunk_statistics_into, out, y, -1, read)
    ours = clock.gpu_us(call)
    facts: dict[str, Any] = {"rows": rows, "rows_read": read, "features": features, "chunks": chunks}
    if features % chunks == 0:
        theirs = clock.gpu_us(partial(eager, y, chunks, read))
        facts |= {"eager_gpu_us": theirs, "over_eager": theirs / ours}
    name = "all rows" if read == rows else "sampled rows"
    floor = clock.floor_us(read * features * y.element_size())
    return measure.row(name, ours=ours, floor=floor, bar=bar, wall_us=clock.wall_us(call), **facts)


def _sweep(clock: measure.Clock, y: Tensor, chunks: int) -> list[dict[str, Any]]:
    """Other widths of a tile."""
    lines: list[dict[str, Any]] = []
    out = torch.empty(2, chunks, device="cuda")
    for read in sorted({min(y.shape[0], 1024), y.shape[0]}):
        floor = clock.floor_us(read * y.shape[1] * y.element_size())
        for width in (16, 32, 64, 128, 256):
            ours = clock.gpu_us(partial(kernels.chunk_statistics_into, out, y, -1, read, width=width))
            lines.append(
                measure.row("sweep", ours=ours, floor=floor, rows=y.shape[0], rows_read=read, tile_columns=width)
            )
    return lines


if __name__ == "__main__":
    measure.run(__doc__ or "", check, time_rows)
