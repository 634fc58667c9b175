"""A small problem on which the telemetry kernels must agree with their reference before they are used on a device."""

from __future__ import annotations

import numpy as np
import torch

from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.ops import dispatch
from esper.kasmina.ops.telemetry import triton
from esper.kasmina.ops.telemetry.reference import chunk_statistics


def check(device: torch.device) -> None:
    """One launch (few rows) and two (many), on uneven chunks.

    Raises
    ------
    DisagreementError
        The results differ.
    """
    source = torch.Generator().manual_seed(0)
    for rows, features, chunks in ((20, 21, 10), (70, 300, 2)):
        y = (torch.randn(rows, features, generator=source) + 3.0).to(device)
        sizes = np.diff(chunk_bounds(features, chunks))
        chunk_of = torch.from_numpy(np.repeat(np.arange(chunks), sizes)).to(device)
        out = torch.full((2, chunks), float("nan"), device=device)
        triton.chunk_statistics_into(out, y, -1, rows)
        wanted = chunk_statistics(y, chunk_of, torch.from_numpy(sizes.astype(np.float32)).to(device))
        dispatch.agree("telemetry", zip(out, wanted, strict=True), 1e-5)
