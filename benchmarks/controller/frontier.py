"""Measure the static frontier of a family: what fixed networks reach at which FLOPs, each at its own learning rate.

    python benchmarks/controller/frontier.py --family teacher --tasks 0:32 --tasks 1000:1016

Writes into the package (``src/esper/greenhouse/frontiers/FAMILY.json``), task by task: run again, it goes on. A network
of a shape costs its training alone, three forwards a step. Its learning rate is the one with the least mean held-out
loss; the loss that counts is that of the test rows, mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.greenhouse.family import FAMILIES, Family, HostSpec
from esper.greenhouse.frontier import LEARNING_RATES, shapes_of
from esper.greenhouse.hosts import Hosts

FOLDER = Path(__file__).resolve().parents[2] / "src" / "esper" / "greenhouse" / "frontiers"
FIRST_SEED = 100
"""Seeds of static networks; growing arms use others."""


def measure(family: Family, task: int, seeds: int) -> dict[str, Any]:
    """All shapes of one task: ``{shapes, flops, losses, lrs, deviation}``."""
    found: dict[str, Any] = {"shapes": [], "flops": [], "losses": [], "lrs": []}
    variances: list[float] = []
    for shape in shapes_of(family, task):
        specs = [
            HostSpec(family=family.name, task=task, seed=FIRST_SEED + seed, lr=lr, widths=shape)
            for lr in LEARNING_RATES
            for seed in range(seeds)
        ]
        hosts = Hosts(specs)
        hosts.advance(hosts.total_steps)
        held_out = hosts.held_out_losses().view(len(LEARNING_RATES), seeds).mean(1)
        test = hosts.test_losses().view(len(LEARNING_RATES), seeds)
        best = int(held_out.argmin())
        found["shapes"].append(list(shape))
        found["flops"].append(3.0 * hosts.host_flops(0, family.batch_rows) * hosts.total_steps)
        found["losses"].append(round(float(test[best].mean()), 6))
        found["lrs"].append(LEARNING_RATES[best])
        variances.append(float(test[best].var()))
    found["deviation"] = round(float(np.sqrt(np.mean(variances))), 6)
    return found


def run(family: Family, tasks: list[int], seeds: int) -> None:
    """Measure what is missing, and keep each task as it is done."""
    path = FOLDER / f"{family.name}.json"
    empty = {
        "family": family.name,
        "steps": family.steps,
        "learning_rates": LEARNING_RATES,
        "seeds": seeds,
        "tasks": {},
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
    for task in tasks:
        if str(task) in known["tasks"]:
            continue
        known["tasks"][str(task)] = measure(family, task, seeds)
        known["tasks"] = dict(sorted(known["tasks"].items(), key=lambda item: int(item[0])))
        temporary = path.with_suffix(".tmp")
        temporary.write_text(_written(known), encoding="utf-8")
        os.replace(temporary, path)
        print(f"{family.name} {task}: {known['tasks'][str(task)]['losses']}", file=sys.stderr, flush=True)


def _written(known: dict[str, Any]) -> str:
    """JSON with one task a line."""
    head = json.dumps({name: value for name, value in known.items() if name != "tasks"})[:-1]
    lines = [f'"{task}": {json.dumps(value)}' for task, value in known["tasks"].items()]
    return head + ', "tasks": {\n' + ",\n".join(lines) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="default: all")
    parser.add_argument("--tasks", action="append", help="START:STOP; default: what headroom.py needs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in given.family or list(FAMILIES):
        family = FAMILIES[name]
        ranges = given.tasks or {"training": ["0:32", "1000:1016"], "evaluation": ["0:16", "1000:1016"]}.get(
            family.purpose, ["0:8", "1000:1008"]
        )
        numbers = [number for part in ranges for number in range(*map(int, part.split(":")))]
        run(family, numbers, given.seeds)


if __name__ == "__main__":
    main()
