"""Can it be seen, when growth would begin, whether it will pay? What a policy sees there against what comes of it.

    python -m benchmarks.controller.foresight --work runs/foresight --out benchmarks/results/controller_foresight.json

Every training host runs twice with the same seed, with the heuristic and without growth. The difference of their
rewards is predicted by ridge regression from the features of the decision at which the first cohort germinates: of
families that the regression has not seen, and of further tasks of families it has. Two seeds of a task say how much
there is to predict: where their differences do not agree, nothing that is the same for both can tell them apart.
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
from benchmarks.controller.schedules import NEVER, scripted

from esper.config import TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.episodes import SCOPE
from esper.greenhouse.family import FAMILIES, FIRST_HELD_OUT, HostSpec
from esper.greenhouse.frontier import LEARNING_RATES, tasks_of
from esper.protocol import Command, Observation
from esper.tamiyo import HeuristicController
from esper.tamiyo.features import FeatureReader, Features
from esper.tamiyo.sight import see

FAMILY_NAMES = tuple(name for name, family in FAMILIES.items() if family.purpose == "training")
MOST_TASKS = 24
SEEDS = (700, 701, 702, 703)
MOST = 6.0
"""Differences are held within so many seed deviations."""
STRENGTH = 30.0
"""Of the ridge."""
FOLDS = 6


class Looking:
    """The heuristic, and what a policy would have seen when it first germinated."""

    def __init__(self) -> None:
        self._inner, self._reader = HeuristicController(TamiyoConfig()), FeatureReader()
        self.seen: Features | None = None

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        features = see(self._reader, observation, SCOPE).features if self.seen is None else None
        found = self._inner.decide(observation)
        self.seen = features if found and self.seen is None else self.seen
        return found


def play(family: str, lr: float, seed: int) -> list[list[float]]:
    """A row a task: number of the task, reward with growth minus reward without, features."""
    tasks = [task for task in tasks_of(family) if task < FIRST_HELD_OUT][:MOST_TASKS]
    specs = [HostSpec(family=family, task=task, seed=seed, lr=lr) for task in tasks]
    lookers = [Looking() for _ in specs]
    grown, _, _ = runs.run_stack(specs, lookers)
    plain, _, _ = runs.run_stack(specs, [scripted(NEVER, (), ()) for _ in specs])
    found: list[list[float]] = []
    for task, one, other, looker in zip(tasks, grown, plain, lookers, strict=True):
        if looker.seen is not None:
            sites = looker.seen.sites
            features = [*looker.seen.world.tolist(), *sites.mean(0).tolist(), *sites.max(0).tolist()]
            found.append([task, one.reward - other.reward, *features])
    return found


def predicted(features: np.ndarray, values: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Each group's values from a regression on all others."""
    scale = features.std(0)
    used = np.clip((features - features.mean(0))[:, scale > 1e-9] / scale[scale > 1e-9], -4.0, 4.0)
    x, labels = np.c_[np.ones(len(used)), used], np.array(groups)
    found = np.zeros(len(values))
    for group in dict.fromkeys(groups):
        known, penalty = labels != group, STRENGTH * np.eye(x.shape[1])
        penalty[0, 0] = 0.0
        weights = np.linalg.solve(x[known].T @ x[known] + penalty, x[known].T @ values[known])
        found[~known] = x[~known] @ weights
    return found


def agreement(rows: dict[int, list[list[float]]]) -> float:
    """Mean correlation of the differences of two seeds over the tasks that all seeds have."""
    by_seed = [{int(row[0]): row[1] for row in found} for found in rows.values()]
    tasks = sorted(set.intersection(*(set(found) for found in by_seed)))
    table = np.clip([[found[task] for task in tasks] for found in by_seed], -MOST, MOST)
    return float(np.corrcoef(table)[np.triu_indices(len(table), 1)].mean())


def summary(known: dict[str, Any]) -> dict[str, Any]:
    """How well differences can be told in advance, and what a rule would earn that grows where they look positive."""
    rows = [(family, lr, row) for family in FAMILY_NAMES for lr in LEARNING_RATES for seed in SEEDS
            for row in known[f"{family}/{lr:g}/{seed}"]]  # fmt: skip
    families = [family for family, _, _ in rows]
    values = np.clip([row[1] for _, _, row in rows], -MOST, MOST)
    features = np.nan_to_num(np.array([row[2:] for _, _, row in rows]))
    folds = [f"{family} {int(row[0]) % FOLDS}" for family, _, row in rows]
    made: dict[str, Any] = {"hosts": len(rows), "features": features.shape[1], "by_family": {}, "told_from": {}}
    for name, groups in (("other families", families), ("other tasks", folds)):
        guess = predicted(features, values, groups)
        made["told_from"][name] = {
            "correlation": round(float(np.corrcoef(guess, values)[0, 1]), 3),
            "earned": {f: round(float(np.where(guess > 0, values, 0.0)[np.array(families) == f].mean()), 3)
                       for f in FAMILY_NAMES},
        }  # fmt: skip
    for family in FAMILY_NAMES:
        mine = values[np.array(families) == family]
        made["by_family"][family] = {
            "growing": round(float(mine.mean()), 3), "knowing": round(float(np.maximum(mine, 0.0).mean()), 3),
            "seeds_agree": {
                f"{lr:g}": round(agreement({seed: known[f"{family}/{lr:g}/{seed}"] for seed in SEEDS}), 2)
                for lr in LEARNING_RATES
            },
        }  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(given.work / "cells.jsonl", workers=given.workers, until=time.monotonic() + 1e9)
    wanted = {
        f"{family}/{lr:g}/{seed}": (family, lr, seed)
        for family in FAMILY_NAMES for lr in LEARNING_RATES for seed in SEEDS
    }  # fmt: skip
    try:
        cells.fill(play, wanted)
    finally:
        cells.close()
    head = {
        "command": "python -m benchmarks.controller.foresight --work runs/foresight --out "
        "benchmarks/results/controller_foresight.json"
    }
    replace_text(given.out, json.dumps(head | summary(cells.known), indent=1) + "\n")


if __name__ == "__main__":
    main()
