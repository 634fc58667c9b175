"""Medians of device time with cold caches, and of wall time with everything that Python does."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from esper.bench.record import Line

_FLUSH_BYTES = 256 << 20
"""Several times the L2 cache of any GPU; reading it leaves a cache that holds nothing of the call's."""
_COPY_BYTES = 1 << 30
_HEAD_START_CYCLES = 2_000_000
"""The GPU idles this long (about a millisecond) before each timed call, so that launches are queued, not waited for."""
_WARM_UP = 5


class Clock:
    """Times calls on one device. On the CPU (to rehearse, never to report) device time is wall time.

    Attributes
    ----------
    copy_bytes_per_us:
        Measured rate of a copy, reads and writes counted: the floor of everything that moves memory.
    """

    def __init__(self, device: torch.device, *, repeats: int = 50) -> None:
        self.device, self.repeats = device, repeats
        self._on_gpu = device.type == "cuda"
        shrink = 1 if self._on_gpu else 1024
        self._flush = torch.zeros(_FLUSH_BYTES // 4 // shrink, dtype=torch.int32, device=device)
        source = torch.ones(_COPY_BYTES // 4 // shrink, device=device)
        target = torch.empty_like(source)
        self.copy_bytes_per_us = 2 * source.nbytes / self.gpu_us(partial(target.copy_, source))

    def limited(self, repeats: int) -> Clock:
        """The same clock for calls that take long: so many repeats at most."""
        other = copy.copy(self)
        other.repeats = min(self.repeats, repeats)
        return other

    def gpu_us(self, call: Callable[[], object], *, dirty: bool = False) -> float:
        """Median microseconds between two events around ``call``: its kernels and the gaps between them.

        Caches are cold and clean. With ``dirty`` they are full of what somebody has just written, and the call pays for
        writing that back: tens of megabytes that are not its own.
        """
        for _ in range(min(_WARM_UP, self.repeats)):
            call()
        if not self._on_gpu:
            return statistics.median(self._once(call) for _ in range(self.repeats))
        spans: list[tuple[Any, Any]] = []
        for _ in range(self.repeats):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_() if dirty else self._flush.max()
            torch.cuda._sleep(_HEAD_START_CYCLES)  # pyright: ignore[reportPrivateUsage]  there is no public one
            before.record()
            call()
            after.record()
            spans.append((before, after))
        self.wait()
        return statistics.median(float(before.elapsed_time(after)) * 1e3 for before, after in spans)

    def wall_us(self, call: Callable[[], object]) -> float:
        """Microseconds a call takes in a row of calls, launches and Python included."""
        self.wait()
        start = time.perf_counter()
        for _ in range(self.repeats):
            call()
        self.wait()
        return (time.perf_counter() - start) / self.repeats * 1e6

    def floor_us(self, num_bytes: float) -> float:
        """Time for moving ``num_bytes`` at the measured rate of a copy."""
        return num_bytes / self.copy_bytes_per_us

    def wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def _once(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6


def row(
    what: str, clock: Clock, *, ours: float, num_bytes: float, flops: float, bar: float | None = None, **more: Any
) -> Line:
    """One line of a result: microseconds, what a roofline needs, the bar and whether it is met."""
    floor = clock.floor_us(num_bytes)
    line: Line = {
        "what": what, "gpu_us": ours, "floor_us": floor, "over_floor": ours / max(floor, 1e-9), "bytes": num_bytes,
        "flops": flops,
    }  # fmt: skip
    if bar is not None:
        line |= {"bar_us": bar, "met": ours <= bar}
    return line | more
