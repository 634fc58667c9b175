"""Which settings should the heuristic have by default? A grid on tuning tasks of training families, short and long.

    python -m benchmarks.controller.defaults --work runs/defaults --out benchmarks/results/controller_defaults.json

Every setting plays the same hosts in stacks, as does no growth, each with its own learning rate of three a family. What
counts is the mean over families of the difference to no growth, and the worst family. Held-out tasks and evaluation
families stay untouched by the grid; the default that was chosen is confirmed on them once, beside the one before it.
Cells are kept in --work: run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.controller.contest import runs
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.contest.verdict import interval, iqm, mean
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
)  # fmt: skip
FIRSTS = (0.05, 0.1)
LAST_SHARES = (0.15, 0.6)
"""Where the run is this far nothing germinates any more; a cohort of these hosts takes about 200 steps."""
GROWTHS = (0.25, 0.5, 1.0, 2.0)
CONFIRMED = ("teacher", "spirals", "tabular", "checkers", "waves", "shells")
"""Families that the chosen default is confirmed on, each at its own length and at five times that."""
EVALUATED, FRESH = range(1016, 1024), tuple(range(1000, 1005))
Setting = dict[str, Any]
BEFORE: dict[str, Setting] = {"until now": {"first": 0.1, "last_share": 0.15, "growth": 1.0}}
"""The default of decision 0021."""


def settings() -> dict[str, Setting]:
    """All settings by name; ``first`` is a share of the run."""
    found: dict[str, Setting] = {"never": {}}
    for first in FIRSTS:
        for last in LAST_SHARES:
            if last > first:
                for growth in GROWTHS:
                    found[f"{growth:g} times from {first:g} to {last:g}"] = {
                        "first": first, "last_share": last, "growth": growth
                    }  # fmt: skip
                found[f"doubling from {first:g} to {last:g}"] = {
                    "first": first, "last_share": last, "growth": 1.0, "compound": True
                }  # fmt: skip
    return found


def config_of(setting: Setting, steps: int) -> TamiyoConfig:
    """The configuration on a run of so many steps."""
    words = {name: value for name, value in setting.items() if name not in ("first", "first_step")}
    first = setting["first_step"] if "first_step" in setting else _step(setting.get("first"), steps)
    return TamiyoConfig(first=first, **words)


def _step(share: float | None, steps: int) -> int | None:
    return None if share is None else round(share * steps)


def play(
    family: str, setting: Setting, lr: float, tasks: Sequence[int] = TUNING, seeds: Sequence[int] = SEEDS
) -> dict[str, Any]:
    """One setting on some tasks: rewards, FLOPs, cohorts kept, share that is dearer than any static network."""
    specs = [HostSpec(family=family, task=task, seed=seed, lr=lr) for task in tasks for seed in seeds]
    steps = FAMILIES[family].steps
    controllers = [
        HeuristicController(config_of(setting, steps)) if setting else scripted(NEVER, (), ()) for _ in specs
    ]
    ends, kept, _ = runs.run_stack(specs, controllers)
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
        "partly": partly, "incomplete": [name for name in settings() if name not in rows],
    }  # fmt: skip


ARMS: dict[str, Setting] = {"never": {}, "default": {"growth": TamiyoConfig().growth}, **BEFORE}


def confirm(cells: Cells) -> dict[str, Any]:
    """The default on tasks and families that it was not chosen on, in stacks, each arm at its own learning rate."""
    families = [name for one in CONFIRMED for name in (f"{one}_long", one)]
    families.sort(key=lambda name: -FAMILIES[name].steps)
    tuned = {
        f"tuned/{arm}/{family}/{lr:g}": (family, setting, lr)
        for family in families for arm, setting in ARMS.items() for lr in LEARNING_RATES
    }  # fmt: skip
    found: dict[str, Any] = {}
    if not cells.fill(play, tuned):
        return found
    wanted: dict[str, tuple[Any, ...]] = {}
    for family in families:
        for arm, setting in ARMS.items():
            means = {lr: np.mean(cells.known[f"tuned/{arm}/{family}/{lr:g}"]["rewards"]) for lr in LEARNING_RATES}
            best = max(means, key=lambda lr: means[lr])
            wanted[f"confirmed/{arm}/{family}"] = (family, setting, best, list(EVALUATED), list(FRESH))
    if not cells.fill(play, wanted):
        return found
    for arm in ARMS:
        for family in CONFIRMED:
            for name in (family, f"{family}_long"):
                values = {which: _rewards(cells, which, name) for which in (arm, "never")}
                run = cells.known[f"confirmed/{arm}/{name}"]
                found.setdefault(arm, {})[name] = {
                    "reward": round(float(values[arm].mean()), 3),
                    "minus_never": interval([(values[arm] - values["never"])[None]], mean),
                    **{key: run[key] for key in ("flops", "kept", "beyond")},
                }
        for names in (CONFIRMED, [f"{family}_long" for family in CONFIRMED]):
            parts = [(_rewards(cells, arm, name) - _rewards(cells, "never", name))[None] for name in names]
            found[arm]["all, five times as long" if names is not CONFIRMED else "all"] = interval(parts, iqm)
    return found


def _rewards(cells: Cells, arm: str, family: str) -> np.ndarray:
    """``(seeds, tasks)``."""
    return np.reshape(cells.known[f"confirmed/{arm}/{family}"]["rewards"], (len(EVALUATED), -1)).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop and write what there is")
    parser.add_argument("--confirm", action="store_true", help="leave the grid as it is; only confirm the default")
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
    confirmed: dict[str, Any] = {}
    try:
        if given.confirm or cells.fill(play, wanted):
            confirmed = confirm(cells)
    finally:
        cells.close()
    replace_text(given.out, json.dumps(summary(cells.known) | {"confirmed": confirmed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
