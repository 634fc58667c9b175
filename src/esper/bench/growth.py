"""The plan's five metrics from one small run that grows.

Forward latency, memory, utilisation, adaptation success rate and seed lifecycle duration. The task is a teacher
network that a smaller student learns: nothing to download.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.bench.busy import Sampler
from esper.bench.clock import Clock
from esper.bench.record import Line, Record
from esper.bench.training import allocated, peak, reset_peak
from esper.config import CaptureConfig, Config, FitConfig, GraftConfig, TamiyoConfig
from esper.grower import Grower
from esper.kasmina.lifecycle import is_terminal
from esper.protocol import AnyEvent, Germinated, Lifecycle, Transitioned
from esper.runs.hosts import MLP

_INPUTS, _BATCH = 16, 128
_Z = 1.959964


@dataclass(frozen=True)
class Size:
    """Runs, steps each, and the widths of teacher and student."""

    runs: int
    steps: int
    teacher: int
    student: int


CPU = Size(3, 800, 64, 6)
GPU = Size(3, 800, 1024, 64)
TINY = Size(1, 120, 16, 4)


@dataclass
class Lives:
    """When seeds germinated and ended, from events."""

    born: dict[int, tuple[int, float]] = field(default_factory=dict[int, tuple[int, float]])
    ended: list[tuple[str, int, float]] = field(default_factory=list[tuple[str, int, float]])
    """State, steps lived, seconds lived."""
    cohorts: dict[int, str] = field(default_factory=dict[int, str])
    """How each cohort ended."""

    def note(self, event: AnyEvent) -> None:
        if isinstance(event, Germinated):
            self.born.update(dict.fromkeys(event.seeds, (event.step, time.perf_counter())))
        elif isinstance(event, Transitioned) and bool(is_terminal(int(event.target))):
            self.cohorts[event.cohort] = event.target.name
            for seed in event.seeds:
                step, second = self.born.pop(seed, (event.step, time.perf_counter()))
                self.ended.append((event.target.name, event.step - step, time.perf_counter() - second))


class Run:
    """One student under a grower."""

    def __init__(self, size: Size, seed: int, device: torch.device, lives: Lives) -> None:
        torch.manual_seed(seed)
        self.device = device
        teacher = MLP(_INPUTS, [size.teacher], 1).to(device)
        self.bare = MLP(_INPUTS, [size.student, size.student], 1).to(device)
        self.model = MLP(_INPUTS, [size.student, size.student], 1).to(device)
        self.model.load_state_dict(self.bare.state_dict())
        self.optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)
        with torch.no_grad():
            draws = [torch.randn(_BATCH, _INPUTS, device=device) for _ in range(64)]
            self.batches = [(x, teacher(x) * 4) for x in draws]
        first = max(10, size.steps // 16)
        config = Config(
            total_steps=size.steps, seed=seed,
            capture=CaptureConfig(batches=8, rows=2048), fit=FitConfig(steps=60, batch_rows=512, max_share=None),
            graft=GraftConfig(ramp_steps=10, timeout=60, stabilize_steps=5, fine_tune_steps=10, warmup_steps=10),
            tamiyo=TamiyoConfig(first=first, growth=1.0, last_share=0.6, patience=2), interval=10, held_out_every=50,
        )  # fmt: skip
        self.grower = Grower(
            self.model, self.optimizer, loss=_loss, evaluate=self.batches[-24:], config=config, on_event=lives.note
        )

    def train(self, steps: int) -> None:
        for step in range(steps):
            loss = _loss(self.model, self.batches[step % 40])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.grower.step(loss)

    def latency(self, clock: Clock) -> Line:
        """Microseconds of a forward pass, as the wall counts: of the bare host, and of the host as it is now."""
        x = self.batches[0][0]
        with torch.no_grad():
            return {"bare_us": clock.wall_us(lambda: self.bare(x)), "esper_us": clock.wall_us(lambda: self.model(x))}


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def measure(record: Record, *, tiny: bool = False) -> None:
    """Five lines, one a metric, into ``growth_gpu.json`` or ``growth_cpu.json``."""
    on_gpu = record.device.type == "cuda"
    size = TINY if tiny else GPU if on_gpu else CPU
    name = "growth_gpu" if on_gpu else "growth_cpu"
    record.begin(name, runs=size.runs, steps=size.steps)
    for line in metrics(size, record.device):
        record.add(name, line)


def metrics(size: Size, device: torch.device) -> Iterator[Line]:
    """Train ``size.runs`` students to their end, and look at them from outside."""
    clock = Clock(device, repeats=200)
    lives, dormant, grown = Lives(), list[Line](), list[Line]()
    added_bytes: list[int] = []
    host_bytes = 0
    reset_peak(device)
    start = time.perf_counter()
    with Sampler(device) as sampler:
        for seed in range(size.runs):
            run = Run(size, seed, device, lives)
            dormant.append(run.latency(clock))
            run.train(size.steps)
            run.grower.finish()
            grown.append(run.latency(clock))
            host_bytes = sum(p.numel() * p.element_size() for p in run.model.parameters())
            added_bytes.append(4 * (run.grower.kasmina.params - run.grower.kasmina.host_params))
    seconds = time.perf_counter() - start
    yield {"metric": "forward_latency", "dormant": _medians(dormant), "grown": _medians(grown)}
    yield {
        "metric": "memory", "host_parameter_bytes": host_bytes, "grown_parameter_bytes": statistics.median(added_bytes),
        "device_peak_bytes": peak(device), "device_now_bytes": allocated(device), "resident_bytes": _resident(),
    }  # fmt: skip
    yield {"metric": "gpu_utilisation", "percent": sampler.median, "counter": sampler.source, "seconds": seconds}
    yield success(lives)
    yield durations(lives)


def _medians(lines: list[Line]) -> Line:
    return {key: statistics.median(line[key] for line in lines) for key in lines[0]}


def success(lives: Lives) -> Line:
    """Share of cohorts that became permanent, with Wilson's 95% interval (None without any)."""
    ends = Counter(lives.cohorts.values())
    num, kept = sum(ends.values()), ends[Lifecycle.FOSSILIZED.name]
    line: Line = {"metric": "adaptation_success", "cohorts": num, "kept": kept, "ends": dict(ends)}
    if not num:
        return line | {"rate": None, "interval": None}
    rate, weight = kept / num, 1 + _Z**2 / num
    centre = (rate + _Z**2 / (2 * num)) / weight
    reach = _Z * (rate * (1 - rate) / num + _Z**2 / (4 * num**2)) ** 0.5 / weight
    return line | {"rate": rate, "interval": [round(centre - reach, 4), round(centre + reach, 4)]}


def durations(lives: Lives) -> Line:
    """Median steps and seconds from germination to each end state, over seeds."""
    by_end: dict[str, list[tuple[int, float]]] = {}
    for state, steps, seconds in lives.ended:
        by_end.setdefault(state, []).append((steps, seconds))
    found = {
        state: {
            "seeds": len(spans), "steps": statistics.median(steps for steps, _ in spans),
            "seconds": round(statistics.median(seconds for _, seconds in spans), 4),
        }
        for state, spans in by_end.items()
    }  # fmt: skip
    return {"metric": "lifecycle_duration", "ends": found, "still_alive": len(lives.born)}


def _resident() -> int:
    """Most bytes this process has ever held in RAM."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
