"""What proving a cohort costs in a short run: FLOPs by part, and the reward with and without the proof counted.

    PYTHONPATH=src:. python -m benchmarks.controller.proof --out benchmarks/results/controller_proof.json

The default heuristic under real growers on the first tuning tasks of two families; a minute. Only what is counted
differs between the two rewards, not what is done.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.config import TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.frontier import frontier_of
from esper.greenhouse.real import RealHost
from esper.tamiyo import HeuristicController

FAMILY_NAMES = ("teacher", "shells")
TASKS = range(5)
LR = 4e-2


def measure(family: str) -> dict[str, Any]:
    """Means over tasks: MFLOP of each part of the ledger, and both rewards."""
    parts: list[dict[str, float]] = []
    rewards: list[tuple[float, float]] = []
    for task in TASKS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = RealHost(HostSpec(family=family, task=task, seed=0, lr=LR), HeuristicController(TamiyoConfig())).run()
        without = frontier_of(family, task).reward(end.loss, end.flops - end.parts["evidence"])
        parts.append(end.parts)
        rewards.append((end.reward, without))
    counted, uncounted = np.mean(rewards, axis=0).tolist()
    return {
        "tasks": len(TASKS), "lr": LR, "steps": FAMILIES[family].steps,
        "mflop": {name: round(float(np.mean([one[name] for one in parts])) / 1e6, 2) for name in parts[0]},
        "reward": round(counted, 3), "reward_without_the_proof": round(uncounted, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = {"command": "PYTHONPATH=src:. python -m benchmarks.controller.proof --out FILE"}
    found = head | {family: measure(family) for family in FAMILY_NAMES}
    replace_text(given.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
