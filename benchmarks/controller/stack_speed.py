"""What a step of a host costs: in a stack of 16, in a stack alone, and under a real grower.

    PYTHONPATH=src:. python -m benchmarks.controller.stack_speed --out benchmarks/results/controller_stack_speed.json

CPU time of whole runs of 400 steps over the number of host steps, on one thread, the best of three: without growth, and
with two cohorts of eight units on every site, judged as usual. Two minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.controller.contest.runs import run_stack

from esper.files import replace_text
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.real import RealHost
from esper.protocol import SeedPlan
from esper.tamiyo.schedule import ScheduleController, ScheduleEntry

MEASURED, LR, ROUNDS, STACK, UNITS = ("teacher", "textures", "grammar"), 1e-2, 3, 16, 8
COHORTS = (40, 140)
"""Steps at which growth is asked for."""


def growing(family: str, *, grows: bool) -> ScheduleController:
    """Two cohorts on all sites, or nothing at all."""
    seeds = tuple(SeedPlan(site=name, width=UNITS, start="random_zero") for name in body_of(family).names)
    return ScheduleController([ScheduleEntry(step=step, seeds=seeds) for step in COHORTS if grows])


def stacked(family: str, num: int, *, grows: bool) -> None:
    """One stack to its end."""
    specs = [HostSpec(family=family, task=n % 8, seed=n // 8, lr=LR) for n in range(num)]
    run_stack(specs, [growing(family, grows=grows) for _ in specs])


def real(family: str, *, grows: bool) -> None:
    """One host under a grower."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RealHost(HostSpec(family=family, task=0, seed=0, lr=LR), growing(family, grows=grows)).run()


def microseconds(work: Callable[[], None], steps: int) -> float:
    """CPU time a step, the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return round(best / steps * 1e6, 1)


def measure(family: str) -> dict[str, dict[str, float]]:
    """Without growth and with it, in each of three ways."""
    steps = FAMILIES[family].steps
    found: dict[str, dict[str, float]] = {}
    for name, grows in (("no growth", False), ("two cohorts", True)):
        found[name] = {
            f"stack of {STACK}": microseconds(partial(stacked, family, STACK, grows=grows), STACK * steps),
            "alone": microseconds(partial(stacked, family, 1, grows=grows), steps),
            "real grower": microseconds(partial(real, family, grows=grows), steps),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "command": f"PYTHONPATH=src:. python -m benchmarks.controller.stack_speed --out {given.out}",
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "microseconds": {family: measure(family) for family in MEASURED},
    }
    replace_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
