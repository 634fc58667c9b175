"""Telemetry: mean and variance a chunk, against the read floor and against PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.bench import parity
from esper.bench.clock import Clock, row
from esper.bench.record import Line
from esper.config import TelemetryConfig
from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.ops.telemetry import record_statistics
from esper.kasmina.ops.telemetry.reference import row_step

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
    (700, 48, 16, 700, 1000.0),
)
_OUTLIER = 1e4
"""The first row of a case is so much larger than the others: sums of differences from it must lose nothing."""
_SPREAD = 3.0
SAMPLED = TelemetryConfig().rows
"""Rows a site reads by default."""
SIZES = (
    # rows, features, chunks, whether all rows are read, bar: a time in microseconds or a multiple of the floor
    (8192, 4096, 1024, True, "1.6x"),
    (8192, 4096, 1024, False, 8.0),
    (256, 4096, 1024, True, 8.0),
    (SAMPLED, 4096, 1024, True, 8.0),
    (32768, 4096, 1024, False, 8.0),
    (32768, 4096, 1024, True, None),
    (16384, 768, 768, False, 8.0),
    (16384, 2304, 1024, False, 8.0),
    (16384, 3072, 1024, False, 8.0),
    (8192, 4096, 8, True, None),
    (8192, 4096, 64, True, None),
    (8192, 4096, 256, True, None),
    (8192, 4096, 4096, True, None),
    (8192, 4096, 8, False, None),
    (8192, 4096, 4096, False, None),
)
TINY = ((40, 24, 6, True, "1.6x"), (40, 25, 7, False, 8.0))


class Problem:
    """A tensor, a place for its statistics, and the call that fills it."""

    def __init__(self, y: Tensor, chunks: int, read: int, axis: int = -1) -> None:
        self.y, self.read, self.axis = y, read, axis
        sizes = np.diff(chunk_bounds(y.shape[axis], chunks))
        self._chunk_of = torch.from_numpy(np.repeat(np.arange(chunks), sizes)).to(y.device)
        self._sizes = torch.from_numpy(sizes.astype(np.float32)).to(y.device)
        self.out = torch.full((2, chunks), float("nan"), device=y.device)

    def __call__(self) -> Tensor:
        record_statistics(self.out, self.y, self.axis, self.read, self._chunk_of, self._sizes)
        return self.out


def exact(y_NF: Tensor, chunks: int, max_rows: int) -> Tensor:
    """``(2, C)`` float64, by definition, chunk after chunk."""
    read = y_NF[:: row_step(len(y_NF), max_rows)].double()
    bounds = chunk_bounds(read.shape[1], chunks).tolist()
    parts = [read[:, low:high] for low, high in itertools.pairwise(bounds)]
    return torch.stack([torch.stack([p.mean() for p in parts]), torch.stack([p.var(correction=0) for p in parts])])


def check(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Line]:
    """Every case in every type; twice, for the same bits; then an outlier; then images, whose features lie apart."""
    for dtype in dtypes:
        for rows, features, chunks, max_rows, mean in CASES:
            y = (torch.randn(rows, features, device=device) * _SPREAD + mean).to(dtype)
            first, second = Problem(y, chunks, max_rows)(), Problem(y, chunks, max_rows)()
            name = f"{rows}x{features}, {chunks} chunks, {max_rows} rows, mean {mean:g}"
            line = _compare(name, first, exact(y, chunks, max_rows))
            yield line | {"equal": line["equal"] and torch.equal(first, second), "dtype": str(dtype)}
        y = torch.randn(2100, 64, device=device)
        y[0] *= _OUTLIER
        y = y.to(dtype)
        yield _compare("an outlier first", Problem(y, 16, 2100)(), exact(y, 16, 2100)) | {"dtype": str(dtype)}
        images = torch.randn(6, 24, 7, 5, device=device).to(dtype)
        wanted = exact(images.movedim(1, -1).reshape(-1, 24), 8, 50)
        yield _compare("images", Problem(images, 8, 50, axis=1)(), wanted) | {"dtype": str(dtype)}


def _compare(name: str, out: Tensor, wanted: Tensor) -> Line:
    # sums are fp32 whatever y is, so the tolerance is that of fp32
    return parity.compare(name, torch.float32, {"mean": (out[0], wanted[0]), "variance": (out[1], wanted[1])})


def eager(y: Tensor, chunks: int, rows: int) -> Tensor:
    """What one writes in PyTorch where chunks are equally long."""
    read = y[:: row_step(len(y), rows)]
    variance, mean = torch.var_mean(read.reshape(read.shape[0], chunks, -1).float(), dim=(0, 2), correction=0)
    return torch.stack([mean, variance])


def time_rows(clock: Clock, *, tiny: bool = False) -> Iterator[Line]:
    """One line a size, the bars first, then the growth with rows and with chunks."""
    for rows, features, chunks, whole, bar in TINY if tiny else SIZES:
        y = torch.randn(rows, features, device=clock.device, dtype=torch.bfloat16)
        most = rows if whole else min(rows, SAMPLED, rows // 2)
        read = -(-rows // row_step(rows, most))
        num_bytes = read * features * y.element_size()
        problem = Problem(y, chunks, most)
        ours = clock.gpu_us(problem)
        more: dict[str, Any] = {"rows": rows, "rows_read": read, "features": features, "chunks": chunks}
        if features % chunks == 0:
            theirs = clock.gpu_us(partial(eager, y, chunks, most))
            more |= {"eager_gpu_us": theirs, "over_eager": theirs / ours}
        limit = 1.6 * clock.floor_us(num_bytes) if bar == "1.6x" else bar
        yield row(
            "all rows" if read == rows else "sampled rows", clock, ours=ours, num_bytes=num_bytes,
            flops=4.0 * read * features, bar=limit if isinstance(limit, float) else None,
            wall_us=clock.wall_us(problem), dirty_gpu_us=clock.gpu_us(problem, dirty=True), **more,
        )  # fmt: skip
