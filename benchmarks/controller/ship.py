"""Put the best trained policy of a contest into the package, if the comparison allows it.

    python -m benchmarks.controller.ship --work runs/contest --out benchmarks/results/controller_shipped.json

The policy is chosen by its rewards on tuning tasks, never on what it is reported on; what is reported is that one
policy under real growers. It may ship (``--controller neural``) if no family shows it to be worse than the heuristic,
which decides where there is no policy, and it may become the default if besides it is better than the heuristic over
all and no family shows it to be worse than growing nothing. With it goes the experience of Karn that was compared
(``esper karn import shipped``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.controller.contest.arms import CONTROLS
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.contest.policies import LEARNED_ON, learned_on
from benchmarks.controller.contest.verdict import against, arms, table, win

from esper.files import replace_text
from esper.karn import FieldReport, Snapshot
from esper.karn.snapshot import SHIPPED
from esper.tamiyo.neural import policy_file

MOST_REPORTS = 1000
"""As many as ``karn-1000`` has in the comparison."""
MOST_WORSE = 0.5
"""Seed deviations below another arm on a family that count as worse whatever the interval says."""


def worse(differences: dict[str, Any]) -> list[str]:
    """Families on which an arm is shown to be worse than another one."""
    return [
        f"{family} {entry['value']:+.2f} ({entry['low']:+.2f} to {entry['high']:+.2f})"
        for family, entry in differences["families"].items()
        if entry["high"] < 0 or entry["value"] < -MOST_WORSE
    ]


def alone(cells: dict[str, Any], seed: str) -> dict[str, Any]:
    """One policy under real growers: rewards by family, and paired differences to every control."""
    arm = f"policy:{seed}"
    kept = {name: value for name, value in cells.items() if name.startswith("real/") and _is_told(name, arm)}
    known = table(kept, "real")
    return {
        "rewards": arms(known)["policy"],
        "differences": against(known, "policy", [name for name in known if name != "policy"]),
    }


def _is_told(name: str, arm: str) -> bool:
    who = name.split("/")[1]
    return who == arm or who in CONTROLS


def decision(differences: dict[str, Any]) -> dict[str, Any]:
    """What the rewards under real growers allow."""
    than = {name: worse(differences[name]) for name in ("never", "heuristic")}
    above = differences["heuristic"]["overall"]["low"] > 0
    return {
        "worse": than, "may_ship": not than["heuristic"], "may_be_default": not any(than.values()) and above,
        "win": win(differences),
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
    parser.add_argument("--out", type=Path, required=True, help="what is told of the chosen policy")
    parser.add_argument("--write", action="store_true", help="write it into the package, where it may ship")
    parser.add_argument("--training", type=int, help="tell of this one, which ships already, also on its card")
    given = parser.parse_args()
    cells = Cells(given.work / "cells.jsonl", workers=0, until=0.0).known
    seed = best_policy(cells) if given.training is None else str(given.training)
    found = alone(cells, seed)
    told = decision(found["differences"])
    which = "" if given.training is None else f" --training {given.training}"
    head = {
        "command": f"python -m benchmarks.controller.ship --work runs/contest --out {given.out}{which}",
        "seed": int(seed),
    }
    training = {key: cells[f"train/policy/{seed}"][key] for key in ("updates", "planned", "episodes", "seconds")}
    replace_text(given.out, json.dumps(head | {"training": training} | told | found, indent=1) + "\n")
    print(json.dumps({"seed": seed, **told}, indent=1))
    ships = given.write and told["may_ship"] and given.training is None
    if not ships and given.training is None:
        return
    policy, card = policy_file.load(given.work / "policies" / f"policy-{seed}" / "policy")
    limits = (
        f"trained on {learned_on()}",
        "a run without total_steps, with a ceiling, or outside the ranges above is left to the heuristic",
        *(f"not shown to be better than {name}" for name in told["win"]["not_above"]),
        *(f"worse than {other} on {family}" for other, families in told["worse"].items() for family in families),
    )
    scores = {family: row["reward"] for family, row in found["rewards"].items()}
    scores |= {f"{family}, minus the heuristic": row["value"] for family, row in _by_family(found, "heuristic")}
    scores |= {f"{family}, minus no growth": row["value"] for family, row in _by_family(found, "never")}
    policy_file.save(policy_file.SHIPPED, policy, msgspec.structs.replace(card, scores=scores, limits=limits))
    if not ships:
        return
    text = (given.work / "reports.json").read_text(encoding="utf-8")
    Snapshot(reports=msgspec.json.decode(text, type=tuple[FieldReport, ...])[:MOST_REPORTS]).write(SHIPPED)


def _by_family(found: dict[str, Any], other: str) -> list[tuple[str, dict[str, float]]]:
    return list(found["differences"][other]["families"].items())


if __name__ == "__main__":
    main()
