"""Put the best trained policy of a contest into the package, if the comparison allows it.

    python -m benchmarks.controller.ship --work runs/contest --summary benchmarks/results/controller_contest.json

The policy is chosen by its rewards on tuning tasks, never on what it is reported on. It may ship (``--controller
neural``) if no family shows it to be worse than growing nothing, and it may become the default if it is shown to be
worse than neither that nor the heuristic on any family, and better than the heuristic over all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.contest.policies import LEARNED_ON, learned_on

from esper.tamiyo.neural import policy_file

MOST_WORSE = 0.5
"""Seed deviations below another arm on a family that count as worse whatever the interval says."""


def worse(differences: dict[str, Any]) -> list[str]:
    """Families on which an arm is shown to be worse than another one."""
    return [
        f"{family} {entry['value']:+.2f} ({entry['low']:+.2f} to {entry['high']:+.2f})"
        for family, entry in differences["families"].items()
        if entry["high"] < 0 or entry["value"] < -MOST_WORSE
    ]


def decision(found: dict[str, Any]) -> dict[str, Any]:
    """What the rewards under real growers allow."""
    policy = found["real"]["differences"]["policy"]
    than = {name: worse(policy[name]) for name in ("never", "heuristic")}
    above = policy["heuristic"]["overall"]["low"] > 0
    return {
        "worse": than, "may_ship": not than["never"], "may_be_default": not any(than.values()) and above,
        "win": found["real"]["win"],
    }  # fmt: skip


def best_policy(cells: dict[str, Any]) -> str:
    """The training that did best on tuning tasks of the families that it was trained on."""
    scores: dict[str, list[float]] = {}
    for name, value in cells.items():
        if name.startswith("tune/arm/policy:"):
            _, _, arm, family = name.split("/")
            if family in LEARNED_ON:
                scores.setdefault(arm.partition(":")[2], []).append(max(value["lr"].values()))
    return max(scores, key=lambda seed: sum(scores[seed]) / len(scores[seed]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--summary", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="write it, where it may ship")
    given = parser.parse_args()
    found = json.loads(given.summary.read_text(encoding="utf-8"))
    told = decision(found)
    seed = best_policy(Cells(given.work / "cells.jsonl", workers=0, until=0.0).known)
    print(json.dumps({"seed": seed, **told}, indent=1))
    if not (given.write and told["may_ship"]):
        return
    policy, card = policy_file.load(given.work / "policies" / f"policy-{seed}" / "policy")
    rewards = found["real"]["arms"]["policy"]
    limits = (
        f"trained on {learned_on()}",
        "a run without total_steps, with a ceiling, or outside the ranges above is left to the heuristic",
        *(f"not shown to be better than {name}" for name in told["win"]["not_above"]),
    )
    scores = {f"{family}, mean of all trainings": row["reward"] for family, row in rewards.items()}
    policy_file.save(policy_file.SHIPPED, policy, msgspec.structs.replace(card, scores=scores, limits=limits))


if __name__ == "__main__":
    main()
