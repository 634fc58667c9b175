"""Kernels are compiled before they are asked for, on all cores.

Triton compiles one kernel after the other where it is launched, a second each, and the checks and times of all
operations need some hundreds. So other processes run the same calls once, for nothing but what they leave in Triton's
cache on the disk; the process that measures finds everything there. What fails here fails again, and is told, there.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from esper.bench import layer, ops, parity
from esper.bench.clock import Clock
from esper.bench.record import Record

LAYER = "layer"
"""The plan's own measure, beside the operations."""


def compile_ahead(record: Record, names: Sequence[str], *, timed: bool, processes: int | None = None) -> None:
    """Run what will be measured once, shared out to ``processes`` (as many as there are cores).

    Parameters
    ----------
    names:
        Operations, and :data:`LAYER`.
    timed:
        Whether times are wanted as well as parity.
    """
    jobs: list[tuple[str, torch.dtype | None]] = [(name, None) for name in names] if timed else []
    jobs += [(name, dtype) for name in names if name != LAYER for dtype in parity.DTYPES]
    most = min(len(jobs), processes or os.cpu_count() or 1)
    start, failed = time.perf_counter(), 0
    with ProcessPoolExecutor(most, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_once, *job, record.device.type) for job in jobs]):
            failed += done.exception() is not None
    seconds = time.perf_counter() - start
    record.tell(f"kernels compiled by {most} processes in {seconds:.0f} s, {failed} of {len(jobs)} jobs failed")


def run_once(name: str, dtype: torch.dtype | None, device: str) -> None:
    """The parity of an operation in one type, or everything that is timed of it."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # as a session does
    here = torch.device(device)
    if dtype is not None:
        lines = ops.operation(name).check(here, (dtype,))
    else:
        lines = (layer if name == LAYER else ops.operation(name)).time_rows(
            Clock(here, repeats=1), tiny=here.type == "cpu"
        )
    deque(lines, maxlen=0)
