"""A user's training loop, with a grower or without; and the comparison of the two, in blocks that alternate."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from esper.bench.hosts import Host
from esper.bench.idle import Idle
from esper.bench.record import Line
from esper.config import CaptureConfig, Config, GraftConfig, TelemetryConfig
from esper.grower import Grower

_FOREVER = 1 << 20
_HELD_OUT = 16


def patient(host: Host) -> Config:
    """Cohorts stay where they are: they ramp for ever, or capture until the end."""
    graft = GraftConfig(ramp_steps=_FOREVER, timeout=2 * _FOREVER, warmup_steps=1)
    capture = CaptureConfig(batches=130, rows=130 * 2048, timeout=_FOREVER, max_bytes=64 << 30)
    return Config(
        sites=host.sites, graft=graft, capture=capture, held_out_every=_FOREVER, telemetry=TelemetryConfig(every=1),
        interval=10,
    )  # fmt: skip


class Training:
    """The loop of a user.

    Parameters
    ----------
    config:
        Settings of a grower, or ``None`` for a training without Esper.
    controller:
        Decides; ``None`` waits for orders.
    model:
        Trained in place of the host's own.
    """

    def __init__(
        self, host: Host, device: torch.device, config: Config | None, *, controller: Any = None, on_event: Any = None,
        model: nn.Module | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.host, self.device = host, device
        self.data = host.batch(True)
        self.model = host.build() if model is None else model
        self.optimizer = host.optimizer(self.model)
        before = allocated(device)
        self.grower: Grower | None = None
        if config is not None:
            held_out = [host.batch(False) for _ in range(_HELD_OUT)]
            self.grower = Grower(
                self.model, self.optimizer, loss=host.loss, evaluate=held_out, config=config,
                controller=controller or Idle(), on_event=on_event,
            )  # fmt: skip
        self.persistent_bytes = allocated(device) - before
        self.run: nn.Module = torch.compile(self.model) if host.compiled else self.model  # pyright: ignore[reportAttributeAccessIssue]  a callable module

    def train(self) -> torch.Tensor:
        """One step of the user's own; returns the loss."""
        loss = self.host.loss(self.run, self.data)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def step(self) -> None:
        """One step, and the grower's if there is one."""
        loss = self.train()
        if self.grower is not None:
            self.grower.step(loss)

    def block(self, steps: int) -> tuple[float, float]:
        """Milliseconds a step: by the wall, and of this process's own CPU time."""
        wait(self.device)
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        wait(self.device)
        return (time.perf_counter() - start) / steps * 1e3, (time.process_time() - worked) / steps * 1e3


def compare(phase: str, bare: Training, watched: Training, *, steps: int, blocks: int, warm_up: int = 3) -> Line:
    """Medians over alternating blocks, and the difference of their peaks in memory.

    On a machine that others use too, the share by CPU time is the steadier one of the two.
    """
    for _ in range(warm_up):
        bare.block(3)
        watched.block(max(3, steps // 2))  # every variant of a compiled graph is built here
    times: list[tuple[tuple[float, float], tuple[float, float]]] = []
    peaks = [0, 0]
    for turn in range(blocks):
        pair = [(0.0, 0.0), (0.0, 0.0)]
        for which in (0, 1) if turn % 2 else (1, 0):
            reset_peak(bare.device)
            pair[which] = (bare, watched)[which].block(steps)
            peaks[which] = max(peaks[which], peak(bare.device))
        times.append((pair[0], pair[1]))
    line: Line = {"phase": phase}
    for column, kind in enumerate(("", "cpu_")):
        ratios = sorted(esper[column] / alone[column] for alone, esper in times)
        line |= {
            f"bare_{kind}ms": statistics.median(alone[column] for alone, _ in times),
            f"esper_{kind}ms": statistics.median(esper[column] for _, esper in times),
            f"added_{kind}share": statistics.median(ratios) - 1,
            f"added_{kind}quartiles": [round(q - 1, 5) for q in statistics.quantiles(ratios, n=4)[::2]],
        }
    if bare.device.type == "cuda":
        line |= {"peak_bytes_bare": peaks[0], "peak_bytes_added": peaks[1] - peaks[0] + watched.persistent_bytes}
    return line | {"steps": steps, "blocks": blocks}


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; 0 on a CPU, where nobody counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device) -> int:
    """Most bytes of tensors since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
