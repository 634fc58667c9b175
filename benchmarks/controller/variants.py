"""Small changes to the default heuristic, under real growers on tuning tasks of the short training families.

    PYTHONPATH=src:. python -m benchmarks.controller.variants --work runs/variants --out FILE

What might be tried next, and what was tried: paired differences to the default, with standard errors over tasks, all at
one learning rate. Nothing is chosen by it alone: a change has to hold on fresh tasks (``compare.py``). Five minutes of
two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.schedules import NEVER, scripted

from esper.config import TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.family import HostSpec
from esper.greenhouse.field import TRAINING
from esper.greenhouse.real import RealHost
from esper.protocol import SITE_FEATURES, Command, Germinate, Observation, SeedPlan
from esper.tamiyo import Controller, HeuristicController

TASKS, SEEDS, LR, MOST = range(12), (711, 712), 4e-2, 10.0
_READS, _WRITES = (SITE_FEATURES.index(name) for name in ("log_in", "log_out"))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """``trimmed``: no more units than a span has outputs, or inputs and a bias."""

    start: str | None = None
    trimmed: bool = False
    lr_scale: float = 1.0
    patience: int = TamiyoConfig().patience


VARIANTS = {
    "default": Variant(),
    "patience 1": Variant(patience=1),
    "trimmed": Variant(trimmed=True),
    "trimmed, patience 1": Variant(trimmed=True, patience=1),
    "tiny": Variant(start="tiny"),
    "twice the learning rate": Variant(lr_scale=2.0),
    "four times the learning rate": Variant(lr_scale=4.0),
}


class Changed:
    """The heuristic with a variant's seeds."""

    def __init__(self, variant: Variant) -> None:
        self._variant, self._inner = variant, HeuristicController(TamiyoConfig(patience=variant.patience))

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        return tuple(self._changed(command, observation) for command in self._inner.decide(observation))

    def state(self) -> dict[str, Any]:
        return self._inner.state()

    def load(self, state: dict[str, Any]) -> None:
        self._inner.load(state)

    def _changed(self, command: Command, observation: Observation) -> Command:
        if not isinstance(command, Germinate):
            return command
        return msgspec.structs.replace(command, seeds=tuple(self._seed(plan, observation) for plan in command.seeds))

    def _seed(self, plan: SeedPlan, observation: Observation) -> SeedPlan:
        sizes = observation.sites[observation.site_names.index(plan.site)]
        reads, writes = (round(math.exp(sizes[column])) for column in (_READS, _WRITES))
        width = min(plan.width or writes, writes, reads + 1) if self._variant.trimmed else plan.width
        return msgspec.structs.replace(plan, width=width, start=self._variant.start, lr_scale=self._variant.lr_scale)


def play(name: str, family: str, seed: int) -> list[float]:
    """Rewards on all tasks with one seed."""
    found: list[float] = []
    for task in TASKS:
        controller: Controller = scripted(NEVER, (), ()) if name == "never" else Changed(VARIANTS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = RealHost(HostSpec(family=family, task=task, seed=seed, lr=LR), controller).run()
        found.append(round(float(np.clip(end.reward, -MOST, MOST)), 4))
    return found


def summary(known: dict[str, Any]) -> dict[str, Any]:
    """Each variant minus the default."""
    by_task = {
        name: np.array([np.mean([known[f"{name}/{family}/{seed}"] for seed in SEEDS], axis=0) for family in TRAINING])
        for name in ("never", *VARIANTS)
    }  # (families, tasks)
    found: dict[str, Any] = {}
    for name, values in by_task.items():
        difference = values - by_task["default"]
        error = math.sqrt(float(difference.var(axis=1, ddof=1).sum()) / len(TASKS)) / len(TRAINING)
        found[name] = {
            "reward": round(float(values.mean()), 3), "minus_default": round(float(difference.mean()), 3),
            "standard_error": round(error, 3),
            "families": {f: round(float(row.mean()), 3) for f, row in zip(TRAINING, difference, strict=True)},
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    given = parser.parse_args()
    cells = Cells(given.work / "cells.jsonl", workers=given.workers, until=time.monotonic() + 1e9)
    names = ("never", *VARIANTS)
    try:
        cells.fill(play, {f"{n}/{f}/{s}": (n, f, s) for n in names for f in TRAINING for s in SEEDS})
    finally:
        cells.close()
    head = {
        "command": "PYTHONPATH=src:. python -m benchmarks.controller.variants --work runs/variants --out "
        "benchmarks/results/controller_variants.json",
        "tasks": len(TASKS), "seeds": len(SEEDS), "lr": LR,
    }  # fmt: skip
    replace_text(given.out, json.dumps(head | summary(cells.known), indent=1) + "\n")


if __name__ == "__main__":
    main()
