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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.greenhouse.family import FAMILIES, Family, HostSpec
from esper.greenhouse.frontier import LEARNING_RATES, shapes_of
from esper.greenhouse.hosts import Hosts

FOLDER = Path(__file__).resolve().parents[2] / "src" / "esper" / "greenhouse" / "frontiers"
TOGETHER = 4
"""Tasks measured side by side."""
FIRST_SEED = 100
"""Seeds of static networks; growing arms use others."""


def measure(family: Family, tasks: Sequence[int], seeds: int, *, own: bool) -> list[dict[str, Any]]:
    """All shapes of some tasks, side by side: ``{shapes, flops, losses, lrs, deviation}`` each."""
    shapes = [shapes_of(family, task, own=own) for task in tasks]
    found: list[dict[str, Any]] = [{"shapes": [], "flops": [], "losses": [], "lrs": []} for _ in tasks]
    variances: list[list[float]] = [[] for _ in tasks]
    for number in range(max(map(len, shapes))):
        there = [row for row, known in enumerate(shapes) if number < len(known)]
        specs = [
            HostSpec(family=family.name, task=tasks[row], seed=FIRST_SEED + seed, lr=lr, widths=shapes[row][number])
            for row in there
            for lr in LEARNING_RATES
            for seed in range(seeds)
        ]
        hosts = Hosts(specs)
        hosts.advance(hosts.total_steps)
        held_out = hosts.held_out_losses().view(len(there), len(LEARNING_RATES), seeds).mean(2)
        test = hosts.test_losses().view(len(there), len(LEARNING_RATES), seeds)
        for place, row in enumerate(there):
            best = int(held_out[place].argmin())
            host = place * len(LEARNING_RATES) * seeds
            found[row]["shapes"].append(list(shapes[row][number]))
            found[row]["flops"].append(3.0 * hosts.host_flops(host, family.batch_rows) * hosts.total_steps)
            found[row]["losses"].append(round(float(test[place, best].mean()), 6))
            found[row]["lrs"].append(LEARNING_RATES[best])
            variances[row].append(float(test[place, best].var()))
    for row, values in enumerate(variances):
        found[row]["deviation"] = round(float(np.sqrt(np.mean(values))), 6)
    return found


def run(family: Family, tasks: list[int], seeds: int, *, own: bool) -> None:
    """Measure what is missing, and keep each group of tasks as it is done."""
    path = FOLDER / f"{family.name}.json"
    empty = {
        "family": family.name,
        "steps": family.steps,
        "learning_rates": LEARNING_RATES,
        "seeds": seeds,
        "tasks": {},
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else empty
    missing = [task for task in tasks if str(task) not in known["tasks"]]
    for first in range(0, len(missing), TOGETHER):
        group = missing[first : first + TOGETHER]
        for task, found in zip(group, measure(family, group, seeds, own=own), strict=True):
            known["tasks"][str(task)] = found
            print(f"{family.name} {task}: {found['losses']}", file=sys.stderr, flush=True)
        known["tasks"] = dict(sorted(known["tasks"].items(), key=lambda item: int(item[0])))
        temporary = path.with_suffix(".tmp")
        temporary.write_text(_written(known), encoding="utf-8")
        os.replace(temporary, path)


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
    parser.add_argument("--own", action="store_true", help="the host's own shape alone, at its several scales")
    given = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in given.family or list(FAMILIES):
        family = FAMILIES[name]
        ranges = given.tasks or {"training": ["0:32", "1000:1016"], "evaluation": ["0:16", "1000:1016"]}.get(
            family.purpose, ["0:8", "1000:1008"]
        )
        numbers = [number for part in ranges for number in range(*map(int, part.split(":")))]
        run(family, numbers, given.seeds, own=given.own)


if __name__ == "__main__":
    main()
