"""What does Esper cost a whole training step? Against the bare host, in one process, blocks of steps alternating.

Run from the repository root::

    PYTHONPATH=src:. python benchmarks/system/step.py gpt2 --out benchmarks/results/step_gpt2.json    # needs a GPU
    PYTHONPATH=src:. python benchmarks/system/step.py digits resnet --out benchmarks/results/step_cpu.json

``gpt2`` is GPT-2's smallest shape (12 blocks of 768, 50,304 symbols, batch 16 x 1024, bf16, compiled, fused AdamW)
with up to 1,024 dormant seeds on each of its Linear layers and spans. ``digits`` and ``resnet`` are the small hosts of
``esper run``, eager, on one CPU thread. Every phase is timed on the same two models:

``every_step``     dormant, telemetry every step
``default``        dormant, telemetry and decisions at their default interval
``grafted``        256 seeds of 4 features learning in the forward pass on 12 layers (``gpt2`` only)
``capturing``      the same, and 256 more recording what they will be fitted to (``gpt2`` only)

A ratio is the median over pairs of blocks. ``--steps`` and ``--blocks`` set their size and number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.ops import dispatch
from esper.protocol import Command, Germinate, Lifecycle, Observation, SeedPlan
from esper.runs.hosts import MLP, ResNet

# By default hooks on a second model of a class that was compiled before are never called; here the bare one is first.
torch._dynamo.config.skip_nnmodule_hook_guards = False

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SYMBOLS, CONTEXT, BATCH = 50_304, 1024, 16
SEEDS_A_LAYER = (22, 22, 22, 22, 21, 21, 21, 21, 21, 21, 21, 21)
"""256 over 12 layers."""


class Idle:
    """A controller that never asks for anything: what is alive was ordered by the benchmark."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class Block(nn.Module):
    """Pre-norm attention and feed-forward, as in GPT-2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Token ids ``(B, T)`` to logits ``(B, T, V)``; the head shares the embedding's weight."""

    def __init__(self, dim: int = 768, num_blocks: int = 12) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(SYMBOLS, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.ModuleList(Block(dim, dim // 64) for _ in range(num_blocks))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, SYMBOLS, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass
class Host:
    """A model, its data, and how it is trained."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    sites: esper.SitesConfig
    compiled: bool = False

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.compiled):
            logits = model(batch[0])
            return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def gpt2() -> Host:
    def batch(size: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(SYMBOLS, (size, CONTEXT + 1), device=DEVICE)
        return ids[:, :-1], ids[:, 1:]

    layers = esper.SitesConfig(include=("blocks.*",), exclude=("*norm*",), layers=True)
    return Host(
        lambda: GPT2().to(DEVICE), batch, lambda model: torch.optim.AdamW(model.parameters(), 1e-4, fused=True),
        layers, compiled=True,
    )  # fmt: skip


def digits() -> Host:
    def batch(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(4 * size, 64), torch.randint(10, (4 * size,))

    return Host(
        lambda: MLP(64, [8, 8], 10), batch, lambda model: torch.optim.AdamW(model.parameters(), 3e-3),
        esper.SitesConfig(),
    )  # fmt: skip


def resnet() -> Host:
    def batch(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2 * size, 3, 32, 32), torch.randint(10, (2 * size,))

    widths, trunk = [4, 4, 8, 8, 16, 16], [16, 32, 64]
    return Host(
        lambda: ResNet(widths, trunk=trunk, in_channels=3, num_classes=10), batch,
        lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), esper.SitesConfig(),
    )  # fmt: skip


HOSTS = {"gpt2": gpt2, "digits": digits, "resnet": resnet}


class Training:
    """The loop of a user, with a grower or without."""

    def __init__(self, host: Host, *, watched: bool) -> None:
        torch.manual_seed(0)
        self.host, self.data = host, host.batch(BATCH)
        self.model = host.build()
        self.optimizer = host.optimizer(self.model)
        before = _allocated()
        self.grower = self._grower() if watched else None
        self.persistent_bytes = _allocated() - before
        self.run = torch.compile(self.model) if host.compiled else self.model

    def _grower(self) -> esper.Grower:
        held_out = [self.host.batch(1) for _ in range(16)]
        graft = esper.GraftConfig(ramp_steps=1 << 20, timeout=1 << 21, warmup_steps=1)
        capture = esper.CaptureConfig(batches=130, rows=130 * 2048, timeout=1 << 20, max_bytes=64 << 30)
        config = esper.Config(
            sites=self.host.sites, graft=graft, capture=capture, held_out_every=1 << 20,
            telemetry=esper.TelemetryConfig(every=1), interval=10,
        )  # fmt: skip
        return esper.Grower(
            self.model, self.optimizer, loss=self.host.loss, evaluate=held_out, config=config, controller=Idle()
        )

    def step(self) -> None:
        loss = self.host.loss(self.run, self.data)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.grower is not None:
            self.grower.step(loss)

    def block(self, steps: int) -> float:
        """Milliseconds a step."""
        _wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        _wait()
        return (time.perf_counter() - start) / steps * 1e3


def compare(name: str, bare: Training, watched: Training, steps: int, blocks: int) -> dict[str, Any]:
    """Medians over alternating blocks, and the difference of their peaks in memory."""
    for _ in range(3):
        bare.block(3), watched.block(max(3, steps // 2))  # every variant of a compiled graph is built here
    times: list[tuple[float, float]] = []
    peaks = [0, 0]
    for turn in range(blocks):
        pair = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            _reset_peak()
            pair[which] = (bare, watched)[which].block(steps)
            peaks[which] = max(peaks[which], _peak())
        times.append((pair[0], pair[1]))
    ratios = sorted(watched_ms / bare_ms for bare_ms, watched_ms in times)
    line = {
        "phase": name,
        "bare_ms": round(statistics.median(t[0] for t in times), 4),
        "esper_ms": round(statistics.median(t[1] for t in times), 4),
        "added": round(statistics.median(ratios) - 1, 5),
        "added_quartiles": [round(q - 1, 5) for q in statistics.quantiles(ratios, n=4)[::2]],
        "peak_bytes_bare": peaks[0],
        "peak_bytes_added": peaks[1] - peaks[0] + watched.persistent_bytes,
    }
    print(json.dumps(line), flush=True)
    return line


def measure(name: str, steps: int, blocks: int) -> Iterator[dict[str, Any]]:
    """One line a phase."""
    host = HOSTS[name]()
    bare, watched = Training(host, watched=False), Training(host, watched=True)
    grower = watched.grower
    assert grower is not None
    infos = grower.sites()
    facts = {"host": name, "sites": len(infos), "dormant_seeds": sum(info.num_chunks for info in infos)}
    yield facts | compare("every_step", bare, watched, steps, blocks)
    grower.config = dataclasses.replace(grower.config, telemetry=esper.TelemetryConfig())
    yield facts | compare("default", bare, watched, steps, blocks)
    if name == "gpt2":
        layers = [info.name for info in infos if info.name.endswith(".out")]
        yield facts | _with_seeds("grafted", "chunk_mlp", "random_zero", layers, bare, watched, steps, blocks)
        layers = [info.name for info in infos if info.name.endswith(".fc2") and not info.kind.is_span]
        yield facts | _with_seeds("capturing", "low_rank", "reconstruction", layers, bare, watched, 8, 6)


def _with_seeds(
    phase: str,
    blueprint: str,
    start: str,
    layers: list[str],
    bare: Training,
    watched: Training,
    steps: int,
    blocks: int,
) -> dict[str, Any]:
    grower = watched.grower
    assert grower is not None
    seeds = tuple(
        SeedPlan(site=layer, chunks=tuple(range(4 * number)), seeds=number, blueprint=blueprint, start=start)
        for layer, number in zip(layers, SEEDS_A_LAYER, strict=True)
    )
    grower.submit(Germinate(seeds=seeds, reason="benchmark"))
    watched.block(6)
    states = {cohort.number: cohort.state for cohort in grower.kasmina.cohorts.values()}
    wanted = Lifecycle.GRAFTING if phase == "grafted" else Lifecycle.GERMINATED
    if list(states.values())[-1:] != [wanted]:
        raise SystemExit(f"{phase}: the cohort must be {wanted.name}, got {states}")
    return compare(phase, bare, watched, steps, blocks) | {"seeds": sum(SEEDS_A_LAYER), "cohorts": len(states)}


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def _reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="+", choices=sorted(HOSTS))
    parser.add_argument("--steps", type=int, default=20, help="steps a block")
    parser.add_argument("--blocks", type=int, default=12, help="pairs of blocks a phase")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    lines: list[dict[str, Any]] = []
    result = {
        "command": f"python benchmarks/system/step.py {' '.join(options.hosts)}",
        "device": device, "torch": torch.__version__, "python": platform.python_version(),
        "triton": dispatch.runs_triton("telemetry", torch.empty(0, device=DEVICE)),
        "steps": options.steps, "phases": lines,
    }  # fmt: skip
    for name in options.hosts:
        for line in measure(name, options.steps, options.blocks):
            lines.append(line)
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
