"""What it takes to find a good width: one growing run against a sweep of five widths and against Optuna (TPE).

    python -m benchmarks.controller.effort --work runs/effort --out benchmarks/results/controller_effort.json

Five tasks that nothing was tuned on. The target is 99% of the score (accuracy, or share of the variance) of the best
static width, each width at its own best learning rate, mean over reference seeds. Every procedure tries the same
learning rates and chooses by held-out loss; what it has chosen is scored on test rows. It succeeds when that reaches
the target; a failure pays for everything it did, and then for the sweep. Runs, FLOPs (of a growing run: everything its
ledger holds) and CPU seconds are counted until it has chosen; Optuna stops as soon as its best trial so far reaches the
target, which it could not know: that favours it. Needs pip install 'esper-morph[bench]'.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.contest.verdict import interval, mean

from esper.config import TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.family import FAMILIES, Family, HostSpec, batch_order, data_of
from esper.greenhouse.frontier import LEARNING_RATES
from esper.greenhouse.real import RealHost, make_model, mean_loss
from esper.tamiyo import HeuristicController

TASKS = (("spirals", 1031), ("tabular", 1031), ("checkers", 1031), ("shells", 1031), ("waves", 1031))
WIDTHS = (8, 16, 32, 64, 96)
START_WIDTH = 8
STEPS = 1200
REFERENCE_SEEDS = range(300, 305)
TRIALS = 30
_USUAL = TamiyoConfig(first=STEPS // 20, growth=0.5, patience=2)
SETTINGS = {
    "usual": _USUAL,
    "longer": replace(_USUAL, last_share=0.6),
    "four times": replace(_USUAL, growth=4.0),
    "doubling": replace(_USUAL, compound=True, last_share=0.4),
    "aggressive": TamiyoConfig(first=STEPS // 20, temper="aggressive", growth=2.0, last_share=0.4, patience=4),
}
"""Settings of growth; one is chosen for all tasks, on other tasks of the same families."""
SHARE = 0.99


def score(model: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Accuracy, or the share of the variance that is explained."""
    x, y = rows
    with torch.no_grad():
        out = model(x)
    if y.is_floating_point():
        return 1.0 - float(((out - y).square().mean(0) / y.var(0, correction=0)).mean())
    return float((out.argmax(1) == y).double().mean())


def static_run(family: str, task: int, width: int, lr: float, seed: int) -> dict[str, float]:
    """One fixed network, trained as a growing one is."""
    kind, started = FAMILIES[family], time.process_time()
    spec = HostSpec(family=family, task=task, seed=seed, lr=lr, widths=(width,) * kind.num_sites, steps=STEPS)
    model, data, order = make_model(spec), data_of(kind, task), batch_order(spec, kind, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=kind.weight_decay)
    x, y = data.train
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        mean_loss(model, (x[order[step]], y[order[step]])).backward()
        optimizer.step()
    return _measured(model, kind, task, static_flops(kind, width), started)


def static_flops(kind: Family, width: int) -> float:
    """Training FLOPs of a fixed network."""
    sizes = [kind.inputs, *(width,) * kind.num_sites, kind.outputs]
    return 6.0 * STEPS * kind.batch_rows * sum(a * b for a, b in pairwise(sizes))


def growing_run(family: str, task: int, lr: float, seed: int, settings: str = "usual") -> dict[str, float]:
    """One run of the heuristic from the smallest width."""
    kind, started = FAMILIES[family], time.process_time()
    widths = (START_WIDTH,) * kind.num_sites
    spec = HostSpec(family=family, task=task, seed=seed, lr=lr, widths=widths, steps=STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = RealHost(spec, HeuristicController(SETTINGS[settings]))
        while len(host.losses) < host.steps:
            host.step()
        host.grower.finish()
    host.model.eval()
    found = _measured(host.model, kind, task, host.grower.ledger.total, started)
    return {**found, "params": host.grower.kasmina.params}


def _measured(model: torch.nn.Module, kind: Family, task: int, flops: float, started: float) -> dict[str, float]:
    data = data_of(kind, task)
    with torch.no_grad():
        held_out = float(mean_loss(model, data.held_out))
    return {
        "held_out": held_out, "score": score(model, data.test), "flops": flops,
        "cpu_s": round(time.process_time() - started, 3),
    }  # fmt: skip


def optuna_search(family: str, task: int, seed: int, target: float) -> dict[str, Any]:
    """Trials of TPE over width and learning rate, until the best by held-out loss reaches the target."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    made: list[dict[str, float]] = []
    for _ in range(TRIALS):
        trial = study.ask()
        width = trial.suggest_int("width", 4, max(WIDTHS), log=True)
        lr = trial.suggest_categorical("lr", list(LEARNING_RATES))
        made.append(static_run(family, task, width, lr, seed))
        study.tell(trial, made[-1]["held_out"])
        if min(made, key=lambda run: run["held_out"])["score"] >= target:
            break
    return spent(made, target)


def spent(made: Sequence[dict[str, float]], target: float) -> dict[str, Any]:
    """What a procedure that has made these runs has spent, and whether what it chooses reaches the target."""
    best = min(made, key=lambda run: run["held_out"])
    return {
        "runs": len(made), "flops": sum(run["flops"] for run in made),
        "cpu_s": round(sum(run["cpu_s"] for run in made), 3), "score": round(best["score"], 5),
        "reached": best["score"] >= target,
    }  # fmt: skip


def reference(family: str, task: int, width: int) -> float:
    """Mean score of a width at its best learning rate."""
    made = {lr: [static_run(family, task, width, lr, seed) for seed in REFERENCE_SEEDS] for lr in LEARNING_RATES}
    best = min(made, key=lambda lr: sum(run["held_out"] for run in made[lr]))
    return float(np.mean([run["score"] for run in made[best]]))


def procedures(family: str, task: int, seed: int, target: float, settings: str) -> dict[str, Any]:
    """All three on one task and seed."""
    growing = spent([growing_run(family, task, lr, seed, settings) for lr in LEARNING_RATES], target)
    sweep = spent([static_run(family, task, width, lr, seed) for width in WIDTHS for lr in LEARNING_RATES], target)
    return {"growing": growing, "sweep": sweep, "optuna": optuna_search(family, task, seed, target)}


def paid(found: dict[str, Any], name: str, what: str) -> float:
    """What it costs in the end: after a failure the sweep comes on top."""
    extra = found["sweep"][what] if not found[name]["reached"] and name != "sweep" else 0.0
    return float(found[name][what] + extra)


def summary(targets: dict[str, float], found: dict[str, Any]) -> dict[str, Any]:
    """Ratios of what growing costs to what the others cost (geometric means with intervals), and failures."""
    made: dict[str, Any] = {"targets": targets, "cells": found, "reached": {}, "ratio": {}}
    names = sorted({name.rsplit("/", 1)[0] for name in found})
    for name in ("growing", "sweep", "optuna"):
        made["reached"][name] = f"{sum(cell[name]['reached'] for cell in found.values())} of {len(found)}"
    for other in ("sweep", "optuna"):
        for what in ("flops", "runs", "cpu_s"):
            logs = {n: math.log(paid(c, "growing", what) / paid(c, other, what)) for n, c in found.items()}
            ratios = np.array([[v for n, v in logs.items() if n.rsplit("/", 1)[0] == task] for task in names]).T[None]
            over = interval([ratios], mean)
            made["ratio"][f"{what} over {other}"] = {
                key: round(math.exp(over[key]), 3) for key in ("value", "low", "high")
            }
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--deadline", type=float)
    given = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + (given.deadline or 1e9)
    cells = Cells(given.work / "cells.jsonl", workers=given.workers, until=until)
    try:
        wanted = {f"reference/{f}/{t}/{w}": (f, t, w) for f, t in TASKS for w in WIDTHS}
        if not cells.fill(reference, wanted):
            return
        targets = {f"{f}/{t}": SHARE * max(cells.known[f"reference/{f}/{t}/{w}"] for w in WIDTHS) for f, t in TASKS}
        tried = {f"settings/{n}/{f}/{s}": (f, 0, 2e-2, s, n) for n in SETTINGS for f, _ in TASKS for s in range(2)}
        if not cells.fill(growing_run, tried):
            return
        means = {
            n: float(np.mean([cells.known[f"settings/{n}/{f}/{s}"]["score"] for f, _ in TASKS for s in range(2)]))
            for n in SETTINGS
        }
        best = max(means, key=lambda name: means[name])
        runs = {f"run/{f}/{t}/{s}": (f, t, s, targets[f"{f}/{t}"], best) for s in range(given.seeds) for f, t in TASKS}
        if not cells.fill(procedures, runs):
            return
    finally:
        cells.close()
    found = {name[4:]: cells.known[name] for name in runs}
    replace_text(given.out, json.dumps(summary(targets, found) | {"settings": means}, indent=1) + "\n")


if __name__ == "__main__":
    main()
