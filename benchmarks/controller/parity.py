"""Do stacked hosts order schedules as a real grower does? Rank correlations over scripted schedules.

    python benchmarks/controller/parity.py --out benchmarks/results/controller_parity.json

On each host every schedule runs in a stack and under a real grower with its default settings (its own draws of units,
its projected control), each with a few seeds of which the mean counts: whether one cohort is accepted is often a matter
of luck. Spearman's correlation over schedules, host by host; the mean over hosts must reach 0.8. How a grower agrees
with itself under other draws of units is measured beside it; no simulator can do better.
"""

from __future__ import annotations

import argparse
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

from benchmarks.controller.headroom import play
from benchmarks.controller.schedules import Schedule, controller, schedules

from esper.greenhouse.family import FAMILIES, HostSpec, all_kept
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.real import RealHost

BAR = 0.8
QUANTITIES = ("reward", "loss", "flops")


def real(spec: HostSpec, plan: Schedule, draw: int = 0, *, keep_all: bool = False) -> dict[str, float]:
    """One schedule under a grower; ``draw`` changes what the grower draws, and nothing else."""
    config = replace(FAMILIES[spec.family].config, seed=draw)
    if keep_all:
        config = all_kept(config)
    end = RealHost(spec, controller(plan, Hosts([spec]), 0), config).run()
    return {"reward": end.reward, "loss": end.loss, "flops": end.flops, "params": end.params}


def means(runs: Sequence[dict[str, float]], num: int) -> list[dict[str, float]]:
    """Every ``num`` runs of a schedule as one."""
    return [
        {name: round(float(np.mean([run[name] for run in runs[at : at + num]])), 6) for name in (*QUANTITIES, "params")}
        for at in range(0, len(runs), num)
    ]


def spearman(first: list[float], second: list[float]) -> float:
    """Correlation of ranks, ties sharing their mean rank."""
    a, b = (_ranks(np.array(values)) for values in (first, second))
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean correlations over hosts, and pooled gaps."""
    found: dict[str, Any] = {"bar": BAR, "hosts": len(runs)}
    for pair in (("stack", "real"), ("real", "real again")):
        name = f"{pair[0]} and {pair[1]}"
        found[name] = {}
        for quantity in QUANTITIES:
            values = [
                spearman([run[quantity] for run in host[pair[0]]], [run[quantity] for run in host[pair[1]]])
                for host in runs.values()
                if all(side in host for side in pair)
            ]
            known = [value for value in values if not math.isnan(value)]
            if known:
                error = float(np.std(known, ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else None
                found[name][quantity] = {
                    "mean": round(float(np.mean(known)), 4),
                    "standard_error": None if error is None else round(error, 4),
                    "by_host": [round(value, 3) for value in known],
                }  # fmt: skip
    gaps = [
        stacked["reward"] - grown["reward"]
        for host in runs.values()
        for stacked, grown in zip(host["stack"], host["real"], strict=True)
    ]
    found["mean_reward_gap"] = round(float(np.mean(gaps)), 4)
    found["passes"] = found["stack and real"]["reward"]["mean"] >= BAR
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--hosts", type=int, default=2, help="of each family")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep-all", action="store_true", help="keep whatever reaches judgement (a diagnosis)")
    parser.add_argument("--again", type=int, default=1, help="of these, so many also under other draws of units")
    parser.add_argument("--schedules", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {"runs": {}}
    for name in given.family or ["spirals", "teacher"]:
        family = FAMILIES[name]
        every = schedules(family.config.interval, family.steps, family.num_sites)
        plans = [every[row] for row in np.linspace(0, len(every) - 1, given.schedules).round().astype(int)]
        for task in range(1000, 1000 + given.hosts):
            key = f"{name}/{task}"
            if key in known["runs"]:
                continue
            specs = [HostSpec(family=name, task=task, seed=20 + n, lr=family.lr) for n in range(given.seeds)]
            pairs = [(spec, plan) for plan in plans for spec in specs]
            found: dict[str, Any] = {"lr": family.lr, "seeds": given.seeds}
            stacked = play([spec for spec, _ in pairs], [plan for _, plan in pairs], keep_all=given.keep_all)
            found["stack"] = means(stacked, given.seeds)
            found["real"] = means([real(spec, plan, keep_all=given.keep_all) for spec, plan in pairs], given.seeds)
            if task < 1000 + given.again:
                found["real again"] = means(
                    [real(spec, plan, draw=1, keep_all=given.keep_all) for spec, plan in pairs], given.seeds
                )
            known["runs"][key] = found
            temporary = given.out.with_suffix(".tmp")
            temporary.write_text(json.dumps({"summary": summary(known["runs"]), **known}, indent=1) + "\n", "utf-8")
            os.replace(temporary, given.out)
            print(key, json.dumps(summary(known["runs"])["stack and real"]), file=sys.stderr, flush=True)
    print(json.dumps(summary(known["runs"]), indent=1))


if __name__ == "__main__":
    main()
