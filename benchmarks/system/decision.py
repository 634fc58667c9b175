"""How long do an observation, a decision and a change of state take with a million seeds?

Run from the repository root (half a minute on one core)::

    PYTHONPATH=src python benchmarks/system/decision.py

A real host with 123 spans of 8,192 output features gets a real grower with one chunk a feature; then one cohort of one
seed a chunk is germinated through the gates. Timed, in milliseconds (median, least and largest of the repetitions):

``dormant``
    an observation and the decision that germinates on every site, with gradient energies known for all chunks, one
    of them another than at the look before (what is pressing is remembered while none changes);
``alive``
    the same two calls with every chunk owned by a live seed (the decision is to wait);
``transition``, ``tick``, ``set_alpha``
    one call of the seed table over all seeds.

It writes ``benchmarks/results/decision.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import esper
from esper.observation import observe
from esper.protocol import Germinate, Lifecycle, Observation, SeedPlan
from esper.tamiyo import make_controller
from esper.verdicts import Verdicts

RESULT = Path(__file__).parents[1] / "results" / "decision.json"
WAY = (Lifecycle.TRAINING, Lifecycle.GRAFTING, Lifecycle.STABILIZATION, Lifecycle.EVALUATING, Lifecycle.FINE_TUNING)


class ManySpans(nn.Module):
    """Parallel narrow spans with wide outputs: many chunks, few weights."""

    def __init__(self, num_sites: int, features: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(num_sites))
        self.tails = nn.ModuleList(nn.Linear(2, features) for _ in range(num_sites))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.heads, self.tails, strict=True)
        return torch.stack([tail(torch.tanh(head(x))).mean() for head, tail in pairs]).sum()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square()


def attach(num_sites: int, chunks: int) -> esper.Grower:
    torch.manual_seed(0)
    model = ManySpans(num_sites, chunks)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    config = esper.Config(
        sites=esper.SitesConfig(chunks=chunks), tamiyo=esper.TamiyoConfig(growth=1.0, seeds_per_site=chunks)
    )
    held_out = [torch.randn(4, 2) for _ in range(16)]
    grower = esper.Grower(model, optimizer, loss=loss, evaluate=held_out, config=config)
    value = loss(model, torch.randn(4, 2))
    value.backward()
    optimizer.step()
    grower.step(value)
    for site in grower.kasmina.sites.values():
        assert site.telemetry is not None
        site.telemetry.gradient_energy.copy_(torch.rand(chunks))
    return grower


def look(grower: esper.Grower) -> Observation:
    return observe(
        grower.kasmina, step=100, total_steps=None, held_out=1.0, held_out_initial=1.0,
        host_flops=grower.accounts.host_flops_per_step, budget_params=None, budget_flops=None, verdicts=Verdicts(),
        stopped=None,
    )  # fmt: skip


def decide(grower: esper.Grower, observation: Observation, *, germinates: bool) -> None:
    commands = make_controller("heuristic", grower.config.tamiyo).decide(observation)
    assert bool(commands) == germinates and all(isinstance(command, Germinate) for command in commands)


def change(grower: esper.Grower) -> None:
    telemetry = next(iter(grower.kasmina.sites.values())).telemetry
    assert telemetry is not None
    telemetry.gradient_energy[0] += 1.0


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    values: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        values.append(1000 * (time.perf_counter() - start))
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def measure(grower: esper.Grower, repeats: int) -> dict[str, Any]:
    def dormant() -> None:
        change(grower)
        decide(grower, look(grower), germinates=True)

    result: dict[str, Any] = {"dormant": timed(dormant, repeats)}
    start = time.perf_counter()
    plans = [SeedPlan(site=i.name, seeds=i.num_chunks, width=1, start="random_zero") for i in grower.sites()]
    cohort = grower.kasmina.germinate(plans, step=100, host_flops=1.0, budget_params=None, budget_flops=None)
    result["germination_once"] = round(1000 * (time.perf_counter() - start), 1)
    table = grower.kasmina.table
    slots = table.occupied()
    assert len(slots) == table.owner.size == cohort.num_seeds  # type: ignore[union-attr]
    result["alive"] = timed(lambda: decide(grower, look(grower), germinates=False), repeats)
    steps = iter(WAY)
    result["transition"] = timed(lambda: table.transition(slots, next(steps), 101), len(WAY))
    result["set_alpha"] = timed(lambda: table.set_alpha(slots, 1.0), repeats)
    result["tick"] = timed(table.tick, repeats)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=123)
    parser.add_argument("--chunks", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    milliseconds = measure(attach(arguments.sites, arguments.chunks), arguments.repeats)
    result = {
        "command": f"PYTHONPATH=src python benchmarks/system/decision.py --sites {arguments.sites} "
        f"--chunks {arguments.chunks} --repeats {arguments.repeats}",
        "device": f"cpu, 1 of {os.cpu_count()} cores ({platform.machine()})",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "sites": arguments.sites,
        "chunks_a_site": arguments.chunks,
        "seeds": arguments.sites * arguments.chunks,
        "milliseconds": milliseconds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
