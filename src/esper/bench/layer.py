"""The plan's own measure: an eager layer with telemetry and 64 active seeds against the bare layer, and its own loop.

The loop is the plan's forward pass as it stands there: split the output into chunks, look at each, run the blueprint
of those that are active, put the chunks together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.bench.clock import Clock
from esper.bench.idle import Idle
from esper.bench.record import Line
from esper.config import Config, GraftConfig, SitesConfig, TelemetryConfig
from esper.grower import Grower
from esper.protocol import Germinate, Lifecycle, SeedPlan

_HIDDEN = 8
_BAR_US, _AIM_US = 100.0, 40.0


@dataclass(frozen=True)
class Size:
    """Rows a batch, features of the layer, chunks, and active seeds."""

    rows: int
    features: int
    chunks: int
    seeds: int


FULL = (Size(8192, 4096, 1024, 64), Size(8192, 4096, 1024, 0), Size(256, 4096, 1024, 64), Size(8192, 4096, 1024, 1024))
TINY = (Size(16, 32, 8, 2), Size(16, 32, 8, 0))


class Hooked:
    """A layer under a grower that watches it in every step, some of its chunks grafted."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        # the plan's layer computes in bf16; growth keeps fp32 parameters of its own
        self.model = nn.Sequential(nn.Linear(size.features, size.features)).to(device, torch.bfloat16)
        self.batch = torch.randn(size.rows, size.features, device=device, dtype=torch.bfloat16)
        optimizer = torch.optim.SGD(self.model.parameters(), 1e-6)
        config = Config(
            sites=SitesConfig(layers=True, chunks=size.chunks), telemetry=TelemetryConfig(every=1), interval=1 << 20,
            graft=GraftConfig(ramp_steps=1 << 20, timeout=1 << 21), held_out_every=1 << 20,
        )  # fmt: skip
        held_out = [self.batch[:16] for _ in range(16)]
        self.grower = Grower(self.model, optimizer, loss=_loss, evaluate=held_out, config=config, controller=Idle())
        self._optimizer = optimizer
        if size.seeds:
            chosen = torch.randperm(size.chunks)[: size.seeds].sort().values.tolist()
            plan = SeedPlan(
                site="0", chunks=tuple(chosen), seeds=size.seeds, width=_HIDDEN, blueprint="chunk_mlp",
                start="random_zero",
            )  # fmt: skip
            self.grower.submit(Germinate(seeds=(plan,), reason="benchmark"))
        for _ in range(3):
            self._step()
        states = [cohort.state for cohort in self.grower.kasmina.cohorts.values()]
        assert states == ([Lifecycle.GRAFTING] if size.seeds else []), states

    def _step(self) -> None:
        loss = _loss(self.model, self.batch)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.grower.step(loss)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).float().square().mean()


class PlanLoop:
    """Chunk after chunk, as in the plan."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        width = size.features // size.chunks
        self.chunks = size.chunks
        self.active = set(torch.randperm(size.chunks)[: size.seeds].tolist())

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.1

        self.branches = {c: (draw(_HIDDEN, width), draw(_HIDDEN), draw(width, _HIDDEN)) for c in self.active}
        self.statistics = torch.zeros(2, size.chunks, device=device)

    def __call__(self, y: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for number, chunk in enumerate(torch.tensor_split(y, self.chunks, dim=-1)):
            variance, mean = torch.var_mean(chunk.detach().float(), correction=0)
            self.statistics[0, number], self.statistics[1, number] = mean, variance
            if number in self.active:
                w1, b1, w2 = self.branches[number]
                chunk = chunk + F.linear(F.silu(F.linear(chunk, w1, b1)), w2)
            parts.append(chunk)
        return torch.cat(parts, dim=-1)


def time_rows(clock: Clock, *, tiny: bool = False) -> Iterator[Line]:
    """One line a size: bare, with Esper, with the plan's loop; forward, and forward with backward."""
    for number, size in enumerate(TINY if tiny else FULL):
        bare = nn.Linear(size.features, size.features).to(clock.device, torch.bfloat16)
        hooked = Hooked(size, clock.device)
        few = clock.limited(3) if number == 0 else None
        yield _compare(clock, few, bare, hooked, PlanLoop(size, clock.device), size)
        hooked.grower.detach()


def _compare(clock: Clock, few: Clock | None, bare: nn.Module, hooked: Hooked, loop: PlanLoop, size: Size) -> Line:
    x = hooked.batch

    def plain() -> Tensor:
        return bare(x)

    def ours() -> Tensor:
        return hooked.model(x)

    def theirs() -> Tensor:
        return loop(bare(x))

    line: Line = {
        "what": "layer", "rows": size.rows, "features": size.features, "chunks": size.chunks, "seeds": size.seeds,
        "bar_us": _BAR_US, "aim_us": _AIM_US,
    }  # fmt: skip
    for kind, measure in (("gpu", clock.gpu_us), ("wall", clock.wall_us)):
        alone, with_esper = measure(plain), measure(ours)
        line |= {f"bare_{kind}_us": alone, f"esper_{kind}_us": with_esper, f"added_{kind}_us": with_esper - alone}
    line["met"] = max(line["added_gpu_us"], line["added_wall_us"]) < _BAR_US
    both, ours_both = clock.wall_us(_with_backward(plain)), clock.wall_us(_with_backward(ours))
    line |= {"both_ways_bare_wall_us": both, "both_ways_esper_wall_us": ours_both}
    if few is not None:
        looped = few.wall_us(theirs)
        line |= {"loop_wall_us": looped, "over_loop": looped / line["esper_wall_us"]}
        line["added_over_loop"] = (looped - line["bare_wall_us"]) / max(line["added_wall_us"], 1.0)
    return line


def _with_backward(forward: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        out = forward()
        out.backward(out.detach())

    return call
