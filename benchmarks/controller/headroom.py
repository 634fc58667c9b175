"""Is there anything to win? Oracle against the best even schedule and against no growth, family by family.

    python benchmarks/controller/headroom.py --out benchmarks/results/controller_headroom.json

For each family: a learning rate and then an even schedule are tuned on its training tasks; then 64 schedules run on
each of some further tasks with two seeds, the best one of each task runs again on eight fresh seeds beside the best
even schedule, no growth and the heuristic as it comes (paired: same tasks, same seeds). Rewards are seed deviations
below the static frontier, everything counted. Of hosts that stacks know one start of all schedules have that one. Cells
are kept as they are done: run again, it goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.controller.schedules import NEVER, Schedule, controller, schedules, tuned_schedules

from esper.config import TamiyoConfig
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.episodes import outcome
from esper.greenhouse.family import FAMILIES, FIRST_HELD_OUT, Family, HostSpec, all_kept
from esper.greenhouse.frontier import LEARNING_RATES, frontier_of, tasks_of
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.greenhouse.stages import finish
from esper.tamiyo import HeuristicController

TUNING = range(12)
HELD_OUT = range(FIRST_HELD_OUT, FIRST_HELD_OUT + 16)
"""Most tasks; ``--tasks`` takes fewer."""
SCOUTS = (1, 3, 7)
"""Even schedules that the learning rate is chosen with."""
SELECTION_SEEDS = (0, 1)
FRESH_SEEDS = tuple(range(10, 18))


Plan = Schedule | None
"""A schedule; ``None``: what the heuristic does."""


def playable(plan: Schedule, family: Family) -> Schedule:
    """The schedule with a start that stacks of the family's hosts know."""
    known = body_of(family.name).starts
    return tuple(replace(growth, start=growth.start if growth.start in known else known[0]) for growth in plan)


def play(specs: Sequence[HostSpec], plans: Sequence[Plan], *, keep_all: bool = False) -> list[dict[str, float]]:
    """Each host under its schedule: reward, loss and FLOPs; ``keep_all`` leaves out the judgement of cohorts."""
    config = FAMILIES[specs[0].family].config
    if keep_all:
        config = all_kept(config)
    hosts = Hosts(specs, replace(config, total_steps=specs[0].steps or config.total_steps))
    players = [
        HeuristicController(TamiyoConfig()) if plan is None else controller(plan, hosts, number)
        for number, plan in enumerate(plans)
    ]
    while not hosts.done:
        hosts.advance(hosts.config.interval)
        for number, player in enumerate(players):
            life = hosts.lives[number]
            if life.stopped is None and not hosts.done:
                for command in player.decide(observe(hosts, number)):
                    apply(hosts, number, command)
    finish(hosts)
    ended = [
        outcome(hosts, number, loss, frontier_of(spec.family, spec.task))
        for number, (spec, loss) in enumerate(zip(specs, hosts.test_losses().tolist(), strict=True))
    ]
    return [
        {"reward": round(end.reward, 4), "loss": round(end.loss, 6), "flops": end.flops, "params": end.params}
        for end in ended
    ]


Cell = tuple[list[HostSpec], list[Plan]]
TOGETHER = 4
"""Cells played as one stack."""


class Cells:
    """Finished cells of one run, in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def fill(self, wanted: dict[str, Cell], *, keep_all: bool = False) -> None:
        """Play what is missing, some cells side by side."""
        missing = [name for name in wanted if name not in self.known]
        for first in range(0, len(missing), TOGETHER):
            group = missing[first : first + TOGETHER]
            specs = [spec for name in group for spec in wanted[name][0]]
            plans = [plan for name in group for plan in wanted[name][1]]
            runs = play(specs, plans, keep_all=keep_all)
            for name in group:
                num = len(wanted[name][0])
                self.known[name], runs = runs[:num], runs[num:]
                mean = float(np.mean([run["reward"] for run in self.known[name]]))
                print(name, round(mean, 3), file=sys.stderr, flush=True)
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.known), encoding="utf-8")
            os.replace(temporary, self.path)


def rewards(
    runs: Sequence[dict[str, float]], family: Family, tasks: Sequence[int], *, any_shape: bool = False
) -> np.ndarray:
    """``(tasks, seeds)``; cells are played task by task."""
    num = len(runs) // len(tasks)
    frontiers = [frontier_of(family.name, task, any_shape=any_shape) for task in tasks for _ in range(num)]
    values = [frontier.reward(run["loss"], run["flops"]) for frontier, run in zip(frontiers, runs, strict=True)]
    return np.array(values).reshape(len(tasks), num)


def measure(family: Family, cells: Cells, num_tasks: int, *, keep_all: bool = False) -> dict[str, Any]:
    """Everything for one family."""
    interval, steps = family.config.interval, family.steps
    held_out, tuning = HELD_OUT[:num_tasks], TUNING[:num_tasks]
    prefix = f"{family.name}{'/all-kept' if keep_all else ''}"
    never_lr, even, lr = tune(family, cells, tuning, prefix, keep_all=keep_all)
    plans = [playable(plan, family) for plan in schedules(interval, steps, family.num_sites)]
    names = {f"{prefix}/select/{number}/{lr:g}/{num_tasks}": plan for number, plan in enumerate(plans)}
    wanted = {name: cell(family, held_out, SELECTION_SEEDS, lr, plan) for name, plan in names.items()}
    cells.fill(wanted, keep_all=keep_all)
    selected = [rewards(cells.known[name], family, held_out) for name in names]
    table = np.stack(selected)  # (64, tasks, seeds)
    best = table.mean(2).argmax(0)
    arms: dict[str, tuple[float, list[Plan]]] = {
        "never": (never_lr, [NEVER] * len(held_out)),
        "even": (lr, [even] * len(held_out)),
        "oracle": (lr, [plans[number] for number in best]),
        "heuristic": (lr, [None] * len(held_out)),
    }
    fresh: dict[str, np.ndarray] = {}
    strict: dict[str, np.ndarray] = {}
    costs: dict[str, float] = {}
    for name, (rate, chosen) in arms.items():
        specs = [
            HostSpec(family=family.name, task=task, seed=seed, lr=rate) for task in held_out for seed in FRESH_SEEDS
        ]
        scripts = [plan for plan in chosen for _ in FRESH_SEEDS]
        place = f"{prefix}/fresh/{name}/{rate:g}/{hash_of(chosen)}"
        cells.fill({place: (specs, scripts)}, keep_all=keep_all)
        runs = cells.known[place]
        fresh[name] = rewards(runs, family, held_out)
        if set(held_out) <= set(tasks_of(family.name, any_shape=True)):
            strict[name] = rewards(runs, family, held_out, any_shape=True)
        costs[name] = float(np.mean([run["flops"] for run in runs]))
    found = {
        "family": family.name, "purpose": family.purpose, "tasks": num_tasks, "keep_all": keep_all,
        "never_lr": never_lr, "lr": lr,
        "even": [vars(growth) for growth in even], "oracle_schedules": [int(number) for number in best],
        "selection_mean": round(float(table.mean()), 4),
        "oracle_at_selection": round(float(table.mean(2).max(0).mean()), 4),
        "mean_mflops": {name: round(value / 1e6, 2) for name, value in costs.items()},
        "reward": {name: interval_of(values.mean(1)) for name, values in fresh.items()},
        "oracle_minus_even": interval_of((fresh["oracle"] - fresh["even"]).mean(1)),
        "oracle_minus_never": interval_of((fresh["oracle"] - fresh["never"]).mean(1)),
        "even_minus_never": interval_of((fresh["even"] - fresh["never"]).mean(1)),
        "heuristic_minus_even": interval_of((fresh["heuristic"] - fresh["even"]).mean(1)),
        "heuristic_minus_never": interval_of((fresh["heuristic"] - fresh["never"]).mean(1)),
    }  # fmt: skip
    if strict:
        found |= {
            "reward_any_shape": {name: interval_of(values.mean(1)) for name, values in strict.items()},
            "oracle_minus_even_any_shape": interval_of((strict["oracle"] - strict["even"]).mean(1)),
            "oracle_minus_never_any_shape": interval_of((strict["oracle"] - strict["never"]).mean(1)),
        }
    return found


def cell(family: Family, tasks: Sequence[int], seeds: Sequence[int], lr: float, plan: Schedule) -> Cell:
    """Every task with every seed under one schedule."""
    specs = [HostSpec(family=family.name, task=task, seed=seed, lr=lr) for task in tasks for seed in seeds]
    return specs, [plan] * len(specs)


def tune(
    family: Family, cells: Cells, tasks: Sequence[int], prefix: str, *, keep_all: bool
) -> tuple[float, Schedule, float]:
    """Learning rate of no growth, the best even schedule and its learning rate, on training tasks."""
    every = [playable(plan, family) for plan in tuned_schedules(family.config.interval, family.steps)]
    plans = [NEVER, *dict.fromkeys(every)]

    def scores(asked: Sequence[tuple[int, float]]) -> dict[tuple[int, float], float]:
        """Mean reward of schedules (0 is no growth) at learning rates."""
        names = {(number, lr): f"{prefix}/tune/{number}/{lr:g}/{len(tasks)}" for number, lr in asked}
        cells.fill(
            {name: cell(family, tasks, (0,), lr, plans[number]) for (number, lr), name in names.items()},
            keep_all=keep_all,
        )
        return {key: float(rewards(cells.known[name], family, tasks).mean()) for key, name in names.items()}

    first = scores([(number, lr) for number in (0, *SCOUTS) for lr in LEARNING_RATES])
    never_lr = max(LEARNING_RATES, key=lambda lr: first[0, lr])
    lr = max(LEARNING_RATES, key=lambda lr: max(first[number, lr] for number in SCOUTS))
    all_even = scores([(number, lr) for number in range(1, len(plans))])
    return never_lr, plans[max(all_even, key=lambda key: all_even[key])[0]], lr


def hash_of(plans: Sequence[Plan]) -> str:
    """What tells cells of other schedules apart."""
    return hashlib.sha256(repr(plans).encode()).hexdigest()[:8]


def interval_of(values: np.ndarray) -> dict[str, float]:
    """Mean over tasks and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return {"mean": round(float(values.mean()), 4), "standard_error": round(error, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=Path, help="default: beside the result")
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="default: all but probes")
    parser.add_argument("--tasks", type=int, default=len(HELD_OUT), help="held-out tasks, and as many to tune on")
    parser.add_argument("--keep-all", action="store_true", help="keep whatever reaches judgement (a diagnosis)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(given.cells or given.out.with_suffix(".cells.json"))
    names = given.family or [name for name, family in FAMILIES.items() if family.purpose not in ("probe", "pace")]
    result: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    for name in names:
        key = f"{name}, all kept" if given.keep_all else name
        result[key] = measure(FAMILIES[name], cells, given.tasks, keep_all=given.keep_all)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result[key]["oracle_minus_even"]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
