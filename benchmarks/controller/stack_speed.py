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
from pathlib import Path
from typing import Any

import torch
from benchmarks.controller.schedules import NEVER, Schedule

from esper.files import replace_text
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.greenhouse.real import RealHost
from esper.greenhouse.stages import finish
from esper.protocol import SeedPlan
from esper.tamiyo.schedule import ScheduleController, ScheduleEntry

MEASURED, LR, ROUNDS, STACK, UNITS = ("teacher", "textures", "grammar"), 1e-2, 3, 16, 8
COHORTS = (40, 140)
"""Steps at which growth is asked for."""


def growing(family: str, plan: Schedule | None) -> ScheduleController:
    """Two cohorts on all sites, or nothing at all."""
    seeds = tuple(SeedPlan(site=name, width=UNITS, start="random_zero") for name in body_of(family).names)
    return ScheduleController([] if plan is NEVER else [ScheduleEntry(step=step, seeds=seeds) for step in COHORTS])


def stacked(family: str, num: int, plan: Schedule | None) -> None:
    """One stack to its end."""
    hosts = Hosts([HostSpec(family=family, task=n % 8, seed=n // 8, lr=LR) for n in range(num)])
    controllers = [growing(family, plan) for _ in range(num)]
    while not hosts.done:
        hosts.advance(hosts.config.interval)
        for number, controller in enumerate(controllers):
            if hosts.lives[number].stopped is None and not hosts.done:
                for command in controller.decide(observe(hosts, number)):
                    apply(hosts, number, command)
    finish(hosts)


def real(family: str, plan: Schedule | None) -> None:
    """One host under a grower."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RealHost(HostSpec(family=family, task=0, seed=0, lr=LR), growing(family, plan)).run()


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
    return {
        name: {
            f"stack of {STACK}": microseconds(lambda plan=plan: stacked(family, STACK, plan), STACK * steps),
            "alone": microseconds(lambda plan=plan: stacked(family, 1, plan), steps),
            "real grower": microseconds(lambda plan=plan: real(family, plan), steps),
        }
        for name, plan in (("no growth", NEVER), ("two cohorts", None))
    }


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
