"""What the benchmarks of the operations share: parity first, then medians of GPU time, then one JSON file.

A benchmark asks :func:`refuse_unless_equal` before it times anything, so a wrong kernel never gets a speed-up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative difference (norm over norm) from float64, by the type that is computed in."""
DTYPES = tuple(TOLERANCES)
_FLUSH_BYTES = 256 << 20
"""Several times the L2 cache of any GPU."""
_HEAD_START_CYCLES = 2_000_000
"""The GPU idles this long (about a millisecond) before each timed call, so that launches are queued, not waited for."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]


def growth(device: torch.device) -> int:
    """Factor on the sizes of parity cases: on a GPU they fill several tiles, in the interpreter minutes count."""
    return 7 if device.type == "cuda" else 1


def difference(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; infinite for NaN."""
    value = float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def compare(name: str, dtype: torch.dtype, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """One line of a parity table; ``equal`` says whether every pair (got, wanted) is within the type's tolerance."""
    found = {key: difference(got, wanted) for key, (got, wanted) in pairs.items()}
    equal = all(value <= TOLERANCES[dtype] for value in found.values())
    return {"case": name, "dtype": str(dtype).removeprefix("torch."), "equal": equal, "differences": found}


def refuse_unless_equal(checks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All lines of the parity table; leaves with status 1 where one differs."""
    table = list(checks)
    wrong = [line for line in table if not line["equal"]]
    for line in wrong:
        print("DIFFERS", json.dumps(line), file=sys.stderr)
    if wrong:
        sys.exit(f"{len(wrong)} of {len(table)} parity checks failed: nothing is timed")
    print(f"parity: {len(table)} checks passed")
    return table


class Clock:
    """Medians of GPU time with cold caches, and of wall time with everything that Python does."""

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        source = torch.ones(1 << 28, device="cuda")
        target = torch.empty_like(source)
        self.copy_bytes_per_us = 2 * source.nbytes / self.gpu_us(partial(target.copy_, source), repeats=20)

    def gpu_us(self, call: Callable[[], object], *, repeats: int = 50) -> float:
        """Median microseconds between two events around ``call``: its kernels and the gaps between them."""
        for _ in range(5):
            call()
        spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(repeats):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(_HEAD_START_CYCLES)
            before.record()
            call()
            after.record()
            spans.append((before, after))
        torch.cuda.synchronize()
        return statistics.median(before.elapsed_time(after) * 1e3 for before, after in spans)

    def wall_us(self, call: Callable[[], object], *, repeats: int = 50) -> float:
        """Microseconds a call takes in a row of calls, launches and Python included."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats * 1e6

    def floor_us(self, num_bytes: float) -> float:
        """Time for moving ``num_bytes`` at the measured rate of a copy."""
        return num_bytes / self.copy_bytes_per_us


def row(what: str, *, ours: float, floor: float, bar: float | None = None, **more: Any) -> dict[str, Any]:
    """One line of a result: microseconds, the floor, the bar and whether it is met; printed as it is made."""
    line: dict[str, Any] = {"what": what, "gpu_us": ours, "floor_us": floor, "over_floor": ours / max(floor, 1e-9)}
    if bar is not None:
        line |= {"bar_us": bar, "met": ours <= bar}
    line |= more
    rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(rounded), flush=True)
    return rounded


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--sweep", action="store_true", help="also time other tile shapes (longer)")
    parser.add_argument("--parity-only", action="store_true", help="check, time nothing (under compute-sanitizer)")
    return parser.parse_args()


def run(
    description: str,
    check: Callable[[torch.device, tuple[torch.dtype, ...]], Iterable[dict[str, Any]]],
    time_rows: Callable[[Clock, bool], list[dict[str, Any]]],
) -> None:
    """Parity, then times, then the file: the whole of a benchmark."""
    options = arguments(description)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU, PyTorch sees none; the tests check parity without one")
    with poisoned_memory():
        parity = refuse_unless_equal(check(torch.device("cuda"), DTYPES))
    if options.parity_only:
        return
    clock = Clock()
    rows = time_rows(clock, options.sweep)
    result = {
        "command": " ".join(["python", *sys.argv]),
        **environment(),
        "copy_tb_per_s": round(clock.copy_bytes_per_us / 1e6, 3),
        "parity": parity,
        "rows": rows,
    }
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.out}")


def environment() -> dict[str, Any]:
    """The device and the versions that a figure belongs to."""
    import triton

    return {
        "device": torch.cuda.get_device_name(0),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }
