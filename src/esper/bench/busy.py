"""How busy a GPU is: by its own counter, and how long its matrix units' kernels ran, from a profile."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from esper.bench.record import Line
from esper.bench.training import Training, wait

_MATRIX_KERNELS = ("gemm", "cutlass", "xmma", "wgmma", "nvjet", "flash", "fmha", "sm90", "sm80", "_dot", "graft")
"""Parts of the names of kernels that run on the matrix units."""
_EVERY_S = 0.05


def utilisation(bare: Training, watched: Training, *, steps: int) -> Line:
    """Both trainings in turn: the counter's median in percent, and the share of the time that matrix kernels ran."""
    line: Line = {"phase": "utilisation", "bar_percent": 80.0}
    for name, training in (("bare", bare), ("esper", watched)):
        line |= {f"{name}_{key}": value for key, value in _of(training, steps).items()}
    if line["esper_percent"] is not None:
        line["met"] = line["esper_percent"] > 80.0 and line["esper_percent"] >= line["bare_percent"] - 1.0
    return line


def _of(training: Training, steps: int) -> Line:
    training.block(3)
    with Sampler(training.device) as sampler:
        training.block(steps)
    return {"percent": sampler.median, "counter": sampler.source, **_profile(training)}


def _profile(training: Training, steps: int = 5) -> Line:
    if training.device.type != "cuda":
        return {"matrix_share": None, "kernel_share": None}
    wait(training.device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        for _ in range(steps):
            training.step()
        wait(training.device)
        wall_us = (time.perf_counter() - start) * 1e6
    return shares([(event.key, float(event.self_device_time_total)) for event in profile.key_averages()], wall_us)


def shares(kernels: list[tuple[str, float]], wall_us: float) -> Line:
    """From (kernel, microseconds): shares of the time by the wall in matrix kernels and in any kernel."""
    matrix = sum(us for name, us in kernels if any(part in name.lower() for part in _MATRIX_KERNELS))
    return {"matrix_share": matrix / wall_us, "kernel_share": sum(us for _, us in kernels) / wall_us}


class Sampler:
    """Reads a GPU's utilisation every 50 ms while something runs.

    Attributes
    ----------
    source:
        Who counted: ``nvidia-ml-py``, ``nvidia-smi``, or why nobody could.
    """

    def __init__(self, device: torch.device) -> None:
        self.readings: list[float] = []
        self._read, self.source = reader(device)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def median(self) -> float | None:
        """Percent; ``None`` where nobody counts."""
        return statistics.median(self.readings) if self.readings else None

    def __enter__(self) -> Sampler:
        if self._read is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._read is not None:
            self._thread.join()

    def _sample(self) -> None:
        assert self._read is not None
        while not self._stop.is_set():
            value = self._read()
            if value is not None:
                self.readings.append(value)
            self._stop.wait(_EVERY_S)


def reader(device: torch.device) -> tuple[Callable[[], float | None] | None, str]:
    """What reads a device's utilisation in percent, and its name; ``None`` and why where there is nothing."""
    if device.type != "cuda":
        return None, "no GPU"
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  nvidia-ml-py, where it is installed
    except ImportError:
        tool = shutil.which("nvidia-smi")
        return (None, "neither nvidia-ml-py nor nvidia-smi") if tool is None else (_smi(tool), "nvidia-smi")
    pynvml.nvmlInit()
    handle: Any = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
    return (lambda: float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)), "nvidia-ml-py"


def _smi(tool: str) -> Callable[[], float | None]:
    query = [tool, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

    def read() -> float | None:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
        return percent(done.stdout)

    return read


def percent(text: str) -> float | None:
    """The first line of what ``nvidia-smi`` printed, as a number."""
    first = text.strip().splitlines()[:1]
    return float(first[0]) if first and first[0].strip().isdigit() else None
