"""Measure the static frontier of a family: what fixed networks reach at which FLOPs, each at its own learning rate.

    python -m benchmarks.controller.frontier --family teacher --tasks 0:32 --tasks 1000:1016

Writes into the package (``src/esper/greenhouse/frontiers/FAMILY.json``), as tasks are done: run again, it goes on, and
measures of each task only the shapes that are missing. A network of a shape costs its training alone, three forwards a
step. Its learning rate is the one with the least mean held-out loss; the loss that counts is that of the test rows,
mean over seeds. A task's deviation, the unit of its rewards, is that of the shapes that were measured first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.controller.contest.cells import Cells

from esper.files import replace_text
from esper.greenhouse.family import FAMILIES, Family, HostSpec
from esper.greenhouse.frontier import LEARNING_RATES, shapes_of
from esper.greenhouse.hosts import Hosts

FOLDER = Path(__file__).resolve().parents[2] / "src" / "esper" / "greenhouse" / "frontiers"
FIRST_SEED = 100
"""Seeds of static networks; growing arms use others."""


def measure(name: str, task: int, shapes: Sequence[Sequence[int]], seeds: int) -> dict[str, Any]:
    """Some shapes on a task: ``{shapes, flops, losses, lrs, variances}``."""
    family = FAMILIES[name]
    found: dict[str, Any] = {"shapes": [], "flops": [], "losses": [], "lrs": [], "variances": []}
    for shape in shapes:
        specs = [
            HostSpec(family=name, task=task, seed=FIRST_SEED + seed, lr=lr, widths=tuple(shape))
            for lr in LEARNING_RATES
            for seed in range(seeds)
        ]
        hosts = Hosts(specs)
        hosts.advance(hosts.total_steps)
        best = int(hosts.held_out_losses().view(len(LEARNING_RATES), seeds).mean(1).argmin())
        test = hosts.test_losses().view(len(LEARNING_RATES), seeds)[best]
        found["shapes"].append(list(shape))
        found["flops"].append(3.0 * hosts.host_flops(0, family.batch_rows) * hosts.total_steps)
        found["losses"].append(round(float(test.mean()), 6))
        found["lrs"].append(LEARNING_RATES[best])
        found["variances"].append(float(test.var()))
    return found


def missing(family: Family, task: int, known: dict[str, Any] | None, *, own: bool) -> list[tuple[int, ...]]:
    """Shapes of a task that are not in what is known of it."""
    there = {tuple(shape) for shape in known["shapes"]} if known else set[tuple[int, ...]]()
    return [shape for shape in shapes_of(family, task, own=own) if shape not in there]


def joined(known: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """What is known of a task with what was found now, whose deviation counts only where none is known."""
    variances = found["variances"]
    if known is None:
        parts = {name: list(values) for name, values in found.items() if name != "variances"}
        return parts | {"deviation": round(math.sqrt(float(np.mean(variances))), 6)}
    return known | {name: known[name] + values for name, values in found.items() if name != "variances"}


Measures = dict[str, tuple[str, int, list[tuple[int, ...]], int]]
"""Arguments of :func:`measure` by the name of the cell."""


def wanted(family: Family, tasks: Sequence[int], seeds: int, *, own: bool) -> Measures:
    """What is missing."""
    found: Measures = {}
    known = _known(family, seeds)["tasks"]
    for task in tasks:
        if shapes := missing(family, task, known.get(str(task)), own=own):
            found[f"{family.name}/{task}/{seeds}/{shapes}"] = (family.name, task, shapes, seeds)
    return found


def run(family: Family, tasks: Sequence[int], seeds: int, *, own: bool, cells: Cells | None = None) -> None:
    """Measure what is missing, or take it from ``cells``, and write the frontier as far as it is known."""
    known = _known(family, seeds)
    for name, (_, task, shapes, _) in wanted(family, tasks, seeds, own=own).items():
        if cells is not None and name not in cells.known:
            continue
        found = cells.known[name] if cells is not None else measure(family.name, task, shapes, seeds)
        print(f"{family.name} {task}: {found['losses']}", file=sys.stderr, flush=True)
        known["tasks"][str(task)] = joined(known["tasks"].get(str(task)), found)
        known["tasks"] = dict(sorted(known["tasks"].items(), key=lambda item: int(item[0])))
        replace_text(FOLDER / f"{family.name}.json", _written(known))


def _known(family: Family, seeds: int) -> dict[str, Any]:
    path = FOLDER / f"{family.name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    head = {"family": family.name, "steps": family.steps, "learning_rates": LEARNING_RATES, "seeds": seeds}
    return {**head, "tasks": {}}


def _written(known: dict[str, Any]) -> str:
    """JSON with one task a line."""
    head = json.dumps({name: value for name, value in known.items() if name != "tasks"})[:-1]
    lines = [f'"{task}": {json.dumps(value)}' for task, value in known["tasks"].items()]
    return head + ', "tasks": {\n' + ",\n".join(lines) + "\n}}\n"


def tasks_measured(family: Family) -> list[int]:
    """Tasks whose frontier is needed: those known already, or those of the comparison of controllers."""
    path = FOLDER / f"{family.name}.json"
    if path.exists():
        return [int(task) for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]]
    return [*range(12)] if family.purpose == "pace" else [*range(12), *range(1016, 1024)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="default: all")
    parser.add_argument("--tasks", action="append", help="START:STOP; default: those that are known, or else needed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--own", action="store_true", help="the host's own shape alone, at its several scales")
    parser.add_argument("--work", type=Path, help="folder of finished cells; with it tasks are measured side by side")
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop and write what there is")
    given = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    ranges = [range(*map(int, part.split(":"))) for part in given.tasks or ()]
    chosen = [number for part in ranges for number in part]
    tasks = {name: chosen or tasks_measured(FAMILIES[name]) for name in given.family or list(FAMILIES)}
    cells = None
    if given.work is not None:
        until = time.monotonic() + (given.deadline or 1e9)
        cells = Cells(given.work / "cells.jsonl", workers=given.workers, until=until)
        everything: Measures = {}
        for name, numbers in tasks.items():
            everything |= wanted(FAMILIES[name], numbers, given.seeds, own=given.own)
        # the longest first: nothing is left to do beside them at the end
        order = sorted(everything, key=lambda name: -FAMILIES[everything[name][0]].steps)
        cells.fill(measure, {name: everything[name] for name in order})
        cells.close()
    for name, numbers in tasks.items():
        run(FAMILIES[name], numbers, given.seeds, own=given.own, cells=cells)


if __name__ == "__main__":
    main()
