"""What only reading and writing back some columns of a matrix takes: memory moves whole sectors, not single columns."""

# Kernel arguments have no types that Python knows, and a launch takes options that the kernel does not name.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = ((16, 64, 8), (64, 16, 8), (128, 32, 8))
"""Columns, rows and warps of a program: the fastest is the floor."""


@triton.jit
def touch_kernel(
    y, columns, rows, features, width, groups, WIDTH: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """Read ``ROWS`` rows of ``WIDTH`` of the listed columns and write them back."""
    pid = tl.program_id(0)
    place = (pid % groups) * WIDTH + tl.arange(0, WIDTH)
    column = tl.load(columns + place, mask=place < width, other=0)
    column = tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
    row = (pid // groups) * ROWS + tl.arange(0, ROWS)
    where = y + row[:, None].to(tl.int64) * features + column[None, :]
    mask = (row < rows)[:, None] & (place < width)[None, :]
    value = tl.load(where, mask=mask)
    tl.store(where, (value.to(tl.float32) * 1.0001).to(value.dtype), mask=mask)


def calls(y_NF: Tensor, flat: Tensor) -> Iterator[Callable[[], object]]:
    """Calls that read and write ``flat (M,)`` columns, in runs of four, of ``y_NF``; one a shape of tile."""
    columns = flat.to(torch.int32)
    rows, features = y_NF.shape
    for width, height, warps in _TILES:
        groups = -(-columns.numel() // width)
        launch = touch_kernel[(groups * -(-rows // height),)]
        sizes = {"WIDTH": width, "ROWS": height, "RUN": 4, "num_warps": warps}
        yield partial(launch, y_NF, columns, rows, features, columns.numel(), groups, **sizes)
