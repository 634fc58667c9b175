"""When should the heuristic begin to grow, by how much and from which start? A grid on tuning tasks.

    python -m benchmarks.controller.defaults --work runs/defaults --out benchmarks/results/controller_defaults.json

Every setting plays the same hosts in stacks, as does no growth, each with its own learning rate of three a family. What
counts is the mean over families of the difference to no growth, and the worst family. Held-out tasks and evaluation
families stay untouched by the grid: the comparison of controllers plays the default there. Cells are kept in --work:
run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.controller.contest import runs
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.schedules import NEVER, scripted

from esper.config import TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.frontier import LEARNING_RATES, frontier_of
from esper.tamiyo import HeuristicController

TUNING = range(12)
SEEDS = (500, 501)
FAMILY_NAMES = (
    "teacher", "spirals", "tabular", "deep", "flat", "teacher_long", "spirals_long", "tabular_long",
    "teacher_1000", "spirals_1000", "tabular_1000", "teacher_5000", "spirals_5000", "tabular_5000",
)  # fmt: skip
"""Runs of 400, 2,000, 1,000 and 5,000 steps."""
FIRSTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""When the first cohort germinates, as a share of the run. Once one was kept nothing follows after ``LAST_SHARE``."""
LAST_SHARE = 0.15
GROWTHS = (0.5, 1.0, 2.0)
STARTS = ("random_zero", "tiny")
Setting = dict[str, Any]


def settings() -> dict[str, Setting]:
    """All settings by name; ``first`` is a share of the run."""
    found: dict[str, Setting] = {"never": {}}
    for first, growth, start in product(FIRSTS, GROWTHS, STARTS):
        found[_name(first, growth, start)] = {
            "first": first, "last_share": LAST_SHARE, "growth": growth, "start": start
        }  # fmt: skip
    return found


def config_of(setting: Setting, steps: int) -> TamiyoConfig:
    """The configuration on a run of so many steps."""
    words = {name: value for name, value in setting.items() if name not in ("first", "start")}
    return TamiyoConfig(first=round(setting["first"] * steps), patience=2, **words)


def _controller(setting: Setting, steps: int) -> Any:
    if not setting:
        return scripted(NEVER, (), ())
    return HeuristicController(config_of(setting, steps))


def play(
    family: str, setting: Setting, lr: float, tasks: Sequence[int] = TUNING, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    """One setting on some tasks: rewards, FLOPs, cohorts kept, share that is dearer than any static network."""
    specs = [HostSpec(family=family, task=task, seed=seed, lr=lr) for task in tasks for seed in seeds]
    steps = FAMILIES[family].steps
    controllers = [_controller(setting, steps) for _ in specs]
    ends, kept, _ = runs.run_stack(specs, controllers, start=setting.get("start"))
    most = [frontier_of(family, spec.task).flops[-1] for spec in specs]
    return {
        "rewards": [round(float(np.clip(end.reward, -10.0, 10.0)), 4) for end in ends],
        "flops": float(np.mean([end.flops for end in ends])),
        "kept": float(np.mean(kept)),
        "beyond": float(np.mean([end.flops > limit for end, limit in zip(ends, most, strict=True)])),
    }


def summary(known: dict[str, Any]) -> dict[str, Any]:
    """Each setting's difference to no growth by family, both at their best learning rates."""
    rows: dict[str, Any] = {}
    partly: dict[str, dict[str, float]] = {}
    best = {
        (name, family): max(
            (known[f"{name}/{family}/{lr:g}"] for lr in LEARNING_RATES), key=lambda run: np.mean(run["rewards"])
        )
        for name in settings()
        for family in FAMILY_NAMES
        if all(f"{name}/{family}/{lr:g}" in known for lr in LEARNING_RATES)
    }
    for name in settings():
        there = [family for family in FAMILY_NAMES if (name, family) in best and ("never", family) in best]
        table = {
            family: np.subtract(best[name, family]["rewards"], best["never", family]["rewards"]) for family in there
        }
        means = {family: round(float(values.mean()), 3) for family, values in table.items()}
        if len(there) < len(FAMILY_NAMES):
            partly[name] = means
            continue
        rows[name] = {
            "minus_never": means,
            "mean": round(float(np.mean(list(means.values()))), 3),
            "worst": min(means.values()),
            "flops": {family: best[name, family]["flops"] for family in there},
            "kept": {family: round(best[name, family]["kept"], 2) for family in there},
            "beyond": {family: round(best[name, family]["beyond"], 2) for family in there},
        }
    return {
        "command": "python -m benchmarks.controller.defaults --work runs/defaults --out "
        "benchmarks/results/controller_defaults.json",
        "settings": settings(), "tasks": len(TUNING), "seeds": len(SEEDS), "rows": rows,
        "over_the_earliest": over_the_earliest({key: run["rewards"] for key, run in best.items()}),
        "partly": partly, "incomplete": [name for name in settings() if name not in rows],
    }  # fmt: skip


def over_the_earliest(rewards: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, list[float]]]:
    """What each beginning earns over the earliest on the same hosts, mean of all sizes and starts with its standard
    error over tasks, by length of the run."""
    found: dict[str, dict[str, list[float]]] = {}
    for steps in sorted({FAMILIES[family].steps for family in FAMILY_NAMES}):
        names = [family for family in FAMILY_NAMES if FAMILIES[family].steps == steps]
        for first in FIRSTS[1:]:
            pairs = [(_name(first, g, s), _name(FIRSTS[0], g, s)) for g, s in product(GROWTHS, STARTS)]
            if any((one, family) not in rewards for pair in pairs for one in pair for family in names):
                continue
            by_task = [
                np.mean([np.subtract(rewards[a, family], rewards[b, family]) for a, b in pairs], axis=0)
                .reshape(len(TUNING), -1).mean(1)
                for family in names
            ]  # fmt: skip
            error = float(np.sqrt(sum(values.var(ddof=1) / len(values) for values in by_task))) / len(names)
            mean = float(np.mean([values.mean() for values in by_task]))
            found.setdefault(f"{steps}", {})[f"{first:g}"] = [round(mean, 3), round(error, 3)]
    return found


def _name(first: float, growth: float, start: str) -> str:
    return f"{growth:g} times from {first:g}, {start}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop and write what there is")
    given = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + (given.deadline or 1e9)
    cells = Cells(given.work / "cells.jsonl", workers=given.workers, until=until)
    wanted = {
        f"{name}/{family}/{lr:g}": (family, setting, lr)
        for family in sorted(FAMILY_NAMES, key=lambda family: -FAMILIES[family].steps)
        for name, setting in settings().items()
        for lr in LEARNING_RATES
    }
    try:
        cells.fill(play, wanted)
    finally:
        cells.close()
    replace_text(given.out, json.dumps(summary(cells.known), indent=1) + "\n")


if __name__ == "__main__":
    main()
