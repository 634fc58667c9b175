"""Other tile shapes of the telemetry, graft and fit kernels than those they choose: how the choice was made.

Run from the repository root, on a machine with a GPU (a minute)::

    PYTHONPATH=src python benchmarks/ops/sweep.py
"""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial

import torch

from esper.bench.clock import Clock
from esper.bench.ops import fit as fits
from esper.bench.ops.graft import SIZES, Problem
from esper.bench.ops.telemetry import SAMPLED
from esper.kasmina.ops.fit import triton as fit_kernels
from esper.kasmina.ops.graft import triton as graft_kernels
from esper.kasmina.ops.graft.triton import Grouping
from esper.kasmina.ops.telemetry import triton as telemetry_kernels


def telemetry(clock: Clock) -> None:
    """Columns and rows of a tile, tiles a program, and warps."""
    for rows, features in ((256, 4096), (8192, 4096), (32768, 4096), (16384, 768), (16384, 3072)):
        y = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(2, min(features, 1024), device="cuda")
        for read in sorted({min(rows, SAMPLED), rows}):
            heights, tiles = ((32, 64, 128, 256), (2, 4, 8, 16)) if read <= SAMPLED else ((16, 32, 64), (4, 8, 16))
            for sizes in itertools.product((16, 32, 64, 128), heights, tiles, (2, 4, 8)):
                if read <= SAMPLED < sizes[1] * sizes[2] or not 4 <= sizes[0] * sizes[1] // sizes[3] // 32 <= 32:
                    continue
                shape = telemetry_kernels.Shape(*sizes)
                call = partial(telemetry_kernels.chunk_statistics_into, out, y, -1, read, shape=shape)
                tell(
                    operation="telemetry", rows=rows, features=features, rows_read=read, shape=sizes,
                    gpu_us=clock.gpu_us(call),
                )  # fmt: skip


def graft(clock: Clock) -> None:
    """Tile heights, tiles a program, warps and stages, forward."""
    for rows, features, seeds, width, units, _ in SIZES:
        problem = Problem.on_chunks(rows, features, seeds, width, units, clock.device)
        plan = graft_kernels.grouping(width, units, problem.y.dtype)
        values = [*problem.params.values(), problem.seats.columns]
        for height in (64, 128, 256):
            for tiles in (1, 2, 4, 8):
                for warps, stages in ((4, 1), (4, 2), (4, 3), (8, 2)):
                    other = graft_kernels.Grouping(plan.seeds, plan.columns, plan.units, height, warps, stages)
                    call = partial(
                        graft_kernels.forward, problem.y, problem.y, None, *values, runs=problem.seats.runs, plan=other,
                        tiles=tiles,
                    )  # fmt: skip
                    tell(
                        operation="graft", rows=rows, seeds=seeds, columns=width, hidden=units, tile_rows=height,
                        tiles=tiles, warps=warps, stages=stages, gpu_us=clock.gpu_us(call),
                    )  # fmt: skip


def fit(clock: Clock) -> None:
    """Seeds a group, tile heights, warps, products and programs a group."""
    brief = clock.limited(3)
    for rows, features, seeds, width, units, steps, batch in fits.SIZES[:2]:
        problem = fits.Problem.scattered(
            rows, features, seeds, width, units, steps, batch, "chunks", clock.device, torch.bfloat16
        )
        params, draws = problem.copied(), problem.draws.to(clock.device, torch.int32)
        for together, height, warps, precision in itertools.product((2, 4), (32, 64), (4, 8), ("tf32x3", "ieee")):
            plan = Grouping(together, 16, max(16, together * units), height, warps)
            groups = -(-seeds // together)
            most = fit_kernels.blocks_for(groups, batch, plan, fit_kernels.multiprocessors(clock.device))
            for blocks in sorted({max(1, most // 2), most}):
                call = partial(
                    fit_kernels.fit, *params, problem.seats.columns, problem.y, problem.target, draws, 0.01, 1e-8,
                    runs=problem.seats.runs, plan=plan, blocks=blocks, precision=precision,
                )  # fmt: skip
                tell(
                    operation="fit", seeds=seeds, columns=width, hidden=units, together=together, tile_rows=height,
                    warps=warps, precision=precision, blocks=blocks, gpu_us=brief.gpu_us(call),
                )  # fmt: skip


def tell(**line: object) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("tile shapes are timed on a GPU, PyTorch sees none")
    shared = Clock(torch.device("cuda"), repeats=15)
    telemetry(shared)
    graft(shared)
    fit(shared)
