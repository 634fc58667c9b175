"""Does what a cohort gained when it was proven say how its run ends? Even draws of designs against the default.

    PYTHONPATH=src:. python -m benchmarks.controller.worth --work runs/worth --out FILE

Karn learns from reports: gain, gain per cost, and whether a cohort was kept. Here training hosts (tuning tasks, short
runs, real growers) grow what is drawn evenly from its candidates, and once more by the heuristic with the same seed.
What the first report says is set against the difference of the rewards at the end. Five minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.controller.contest.cells import Cells

from esper.config import TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.field import TRAINING
from esper.greenhouse.real import RealHost
from esper.karn import AdvisedController, Architect, Collector, Snapshot
from esper.tamiyo import HeuristicController

TASKS, SEEDS, MOST = range(12), range(2000, 2004), 10.0
TOLD = ("efficiency", "gain", "kept")
"""What a report's targets are."""


def play(family: str, seed: int) -> list[dict[str, Any]]:
    """A row a task whose first cohort has a report that says something: its targets, its starts by their shares, and
    the reward minus that of the default."""
    found: list[dict[str, Any]] = []
    architect = Architect(Snapshot(), uniform=True)
    for task in TASKS:
        spec = HostSpec(family=family, task=task, seed=seed, lr=FAMILIES[family].lr)
        collector = Collector(f"{family}-{task}-{seed}", job=family)
        drawing = AdvisedController(HeuristicController(TamiyoConfig()), architect, seed=seed * 100 + task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drawn = RealHost(spec, drawing, on_event=collector.on_event).run()
            usual = RealHost(spec, HeuristicController(TamiyoConfig())).run()
        reports = [report for report in collector.reports() if report.targets is not None]
        if reports and reports[0].targets is not None:
            gap = float(np.clip(drawn.reward, -MOST, MOST) - np.clip(usual.reward, -MOST, MOST))
            starts: dict[str, float] = {}
            for part in reports[0].placements:
                starts[part.choice.start] = starts.get(part.choice.start, 0.0) + part.share
            found.append({
                "gap": round(gap, 4), **dict(zip(TOLD, reports[0].targets, strict=True)), "starts": starts,
                "growth": sum(part.share * part.choice.growth for part in reports[0].placements),
            })  # fmt: skip
    return found


def correlation(x: np.ndarray, y: np.ndarray) -> list[float]:
    """Pearson's, and its 95% interval (Fisher's z)."""
    value = float(np.corrcoef(x, y)[0, 1])
    low, high = (math.tanh(math.atanh(value) + side * 1.96 / math.sqrt(len(x) - 3)) for side in (-1, 1))
    return [round(number, 3) for number in (value, low, high)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Correlations of what reports tell with the difference at the end, and that difference by start."""
    gaps = np.array([row["gap"] for row in rows])
    starts = sorted({start for row in rows for start in row["starts"]})
    found: dict[str, Any] = {"runs": len(rows), "correlation": {}, "by_start": {}}
    for name in TOLD:
        found["correlation"][name] = correlation(np.array([float(row[name]) for row in rows]), gaps)
    for start in starts:
        chosen = [row for row in rows if row["starts"].get(start, 0.0) > 0.5]
        values = np.array([row["gap"] for row in chosen])
        if len(chosen) > 1:
            found["by_start"][start] = {
                "runs": len(chosen), "reward_minus_default": round(float(values.mean()), 3),
                "standard_error": round(float(values.std(ddof=1)) / math.sqrt(len(values)), 3),
                **{name: round(float(np.mean([row[name] for row in chosen])), 4) for name in TOLD},
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    given = parser.parse_args()
    cells = Cells(given.work / "cells.jsonl", workers=given.workers, until=time.monotonic() + 1e9)
    try:
        cells.fill(play, {f"{family}/{seed}": (family, seed) for seed in SEEDS for family in TRAINING})
    finally:
        cells.close()
    head = {
        "command": "PYTHONPATH=src:. python -m benchmarks.controller.worth --work runs/worth --out "
        "benchmarks/results/controller_worth.json"
    }
    rows = [row for found in cells.known.values() for row in found]
    replace_text(given.out, json.dumps(head | summary(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
