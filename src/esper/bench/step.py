"""What does Esper cost a whole training step? Against the bare host, in one process, blocks of steps alternating.

Phases: ``every_step`` and ``default`` (dormant, telemetry every step or at the default interval, and a controller that
looks at it); on small hosts also ``unwatched`` (as ``default``, but nobody looks: the controller waits for a later
step); on GPT-2's shape also
``grafted_and_training`` (256 seeds of 4 features in the forward pass of 12 layers, and 256 more that record what they
will be fitted to). Rows of the host ``chain`` say how the cost grows with the number of sites.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from esper.bench import hosts
from esper.bench.busy import utilisation
from esper.bench.hosts import Host, Shape
from esper.bench.idle import Idle
from esper.bench.memory import peaks
from esper.bench.record import Line, Record
from esper.bench.training import Training, compare, patient
from esper.config import TelemetryConfig
from esper.errors import EsperError
from esper.protocol import Germinate, Lifecycle, SeedPlan

SEEDS = 256
BARS = {
    ("gpt2", "every_step"): 0.015, ("gpt2", "default"): 0.005, ("gpt2", "grafted_and_training"): 0.08,
    ("digits", "default"): 0.03, ("mlp", "default"): 0.03, ("resnet", "default"): 0.03,
    ("digits", "unwatched"): 0.03, ("mlp", "unwatched"): 0.03, ("resnet", "unwatched"): 0.03,
}  # fmt: skip
"""Largest share of the step that may be added."""
TINY_SHAPE = Shape(dim=64, blocks=2, symbols=50, context=16, batch=2)


def begin(record: Record) -> str:
    """Start ``step_gpu.json`` or ``step_cpu.json``; returns its name."""
    name = "step_gpu" if record.device.type == "cuda" else "step_cpu"
    record.begin(name, telemetry_interval=TelemetryConfig().every, decision_interval=10)
    return name


def measure(record: Record, name: str, lines: Iterable[Line]) -> None:
    """Note the lines of one part, with the bar where there is one."""
    for line in lines:
        bar = BARS.get((line.get("host", ""), line.get("phase", "")))
        if bar is not None:
            line |= {"bar": bar, "met": line["added_share"] <= bar}
        record.add(name, line)
    gc.collect()  # compiled models hold themselves; the next part needs the room


def parts(device: torch.device, *, tiny: bool = False) -> Iterator[tuple[str, Callable[[], Iterator[Line]]]]:
    """What this device is for, by name: each call measures one host."""
    steps, blocks = (2, 2) if tiny else (20, 12)
    if tiny or device.type == "cuda":
        shape = TINY_SHAPE if tiny else Shape()
        compiled = device.type == "cuda"
        host = hosts.gpt2(device, shape=shape, compiled=compiled)
        yield "gpt2", lambda: phases(host, device, steps=steps, blocks=blocks)
        eager = hosts.gpt2(device, shape=shape, compiled=False)
        yield "memory", lambda: peaks(eager, device)
    if tiny or device.type != "cuda":
        small = (hosts.digits, 1, 12), (hosts.mlp, 2, 24), (hosts.resnet, 20, 30)
        for make, slower, pairs in small:
            settings = (2, 2) if tiny else (max(10, 200 // slower), pairs)
            yield make.__name__, lambda make=make, s=settings: phases(make(device), device, steps=s[0], blocks=s[1])
    for number in (1, 3) if tiny else (1, 8, 32, 96):
        yield f"{number} sites", lambda number=number: _sites(device, number, steps, blocks)


def phases(host: Host, device: torch.device, *, steps: int, blocks: int) -> Iterator[Line]:
    """One line a phase; on GPT-2's shape how busy the device is comes with the last."""
    with compiling():
        bare, watched = Training(host, device, None), Training(host, device, patient(host))
        grower = watched.grower
        assert grower is not None
        infos = grower.sites()
        facts = {"host": host.name, "sites": len(infos), "dormant_seeds": sum(info.num_chunks for info in infos)}
        yield facts | compare("every_step", bare, watched, steps=steps, blocks=blocks)
        grower.config = dataclasses.replace(grower.config, telemetry=TelemetryConfig())
        yield facts | compare("default", bare, watched, steps=steps, blocks=blocks)
        if host.name != "gpt2":
            grower.controller = Idle(asleep=True)
            yield facts | compare("unwatched", bare, watched, steps=steps, blocks=blocks)
            return
        layers = [info.name for info in infos if info.name.endswith(".out")]
        _germinate(watched, "chunk_mlp", "random_zero", layers, Lifecycle.GRAFTING)
        layers = [info.name for info in infos if info.name.endswith(".fc2") and not info.kind.is_span]
        _germinate(watched, "low_rank", "reconstruction", layers, Lifecycle.GERMINATED)
        line = facts | {"seeds": 2 * SEEDS}
        yield line | compare("grafted_and_training", bare, watched, steps=min(8, steps), blocks=min(6, blocks))
        yield facts | utilisation(bare, watched, steps=2 * steps)


@contextmanager
def compiling() -> Generator[None]:
    """Hooks of a second model of a compiled class are called, and no variant of its graph falls back to eager."""
    settings: Any = torch._dynamo.config  # pyright: ignore[reportPrivateUsage]
    limit = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # its older name
    with settings.patch({"skip_nnmodule_hook_guards": False, limit: 64}):
        yield


def _germinate(training: Training, blueprint: str, start: str, layers: Sequence[str], wanted: Lifecycle) -> None:
    """256 seeds of four chunks, shared out to ``layers``; trains until they are in the state ``wanted``."""
    grower = training.grower
    assert grower is not None
    shares = [SEEDS // len(layers) + (number < SEEDS % len(layers)) for number in range(len(layers))]
    chunks = {info.name: info.num_chunks for info in grower.sites()}
    seeds = tuple(
        SeedPlan(
            site=name, chunks=tuple(range(min(4 * share, chunks[name] // 4 * 4))), seeds=min(share, chunks[name] // 4),
            blueprint=blueprint, start=start,
        )
        for name, share in zip(layers, shares, strict=True)
    )  # fmt: skip
    grower.submit(Germinate(seeds=seeds, reason="benchmark"))
    states: list[Lifecycle] = []
    for _ in range(6):  # no step more: each further state may be a graph of its own to compile
        training.block(1)
        states = [cohort.state for cohort in grower.kasmina.cohorts.values()]
        if states[-1:] == [wanted]:
            break
    else:
        raise EsperError(f"the cohort that is timed must be {wanted.name}, got {states}; the benchmark is at fault")


def _sites(device: torch.device, number: int, steps: int, blocks: int) -> Iterator[Line]:
    host = hosts.chain(device, number)
    bare, watched = Training(host, device, None), Training(host, device, patient(host))
    grower = watched.grower
    assert grower is not None
    for phase, telemetry in (("every_step", TelemetryConfig(every=1)), ("default", TelemetryConfig())):
        grower.config = dataclasses.replace(grower.config, telemetry=telemetry)
        line = compare(phase, bare, watched, steps=max(10, steps) if steps > 2 else steps, blocks=blocks)
        added = {"added_us": 1e3 * (line["esper_ms"] - line["bare_ms"])}
        added["added_cpu_us"] = 1e3 * (line["esper_cpu_ms"] - line["bare_cpu_ms"])
        yield {"host": "chain", "sites": len(grower.sites())} | line | added
