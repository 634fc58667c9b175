"""Do designs that Karn breeds come to be among the best? The whole loop on small hosts, as runs with ``--karn`` do it.

    PYTHONPATH=src:. python -m benchmarks.controller.bred --out benchmarks/results/controller_bred.json

It begins with the experience that comes with Esper. Then host after host of the training families trains under a real
grower: Karn proposes from all that is known, the run's reports are filed, and every few runs new designs are bred from
the best and tested. In the end all designs that were grown often enough are ranked by their mean gain per cost (one
report of zero added). One process, one thread; a few minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.controller.contest.policies import draw_hosts

from esper.config import TamiyoConfig
from esper.files import replace_text
from esper.greenhouse.field import TRAINING
from esper.greenhouse.real import RealHost
from esper.karn import AdvisedController, Architect, Collector, Database, Snapshot, read_snapshot
from esper.karn.experience import standings
from esper.karn.snapshot import SHIPPED
from esper.runs.advice import breed_into
from esper.tamiyo import HeuristicController

BETWEEN = 10
"""Runs between two broods ..."""
BROOD = 8
"""... of so many designs."""
FEWEST = 5
"""Reports from which a design is ranked."""
BEST = 10
BUILT_IN = ("menu", "observed")


def loop(database: Database, runs: int, seed: int) -> dict[str, int]:
    """Train, file, breed; returns how many designs of each kind passed and failed their test."""
    made = {"passed": 0, "failed": 0}
    for number, spec in enumerate(draw_hosts(np.random.default_rng([seed, 1 << 23]), runs, TRAINING)):
        if number % BETWEEN == 0:
            for design in breed_into(database, BROOD, seed=seed * runs + number):
                made["passed" if design.status == "passed" else "failed"] += 1
        architect = Architect(Snapshot.of(database))
        collector = Collector(f"bred-{seed}-{number}", job=spec.family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller = AdvisedController(HeuristicController(TamiyoConfig()), architect, seed=spec.seed)
            RealHost(spec, controller, on_event=collector.on_event).run()
        database.file(collector.reports())
    return made


def ranking(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Designs that were grown often enough, the best first."""
    known = {design.name: design for design in snapshot.designs}
    ranked = sorted(standings(snapshot).items(), key=lambda item: -item[1].efficiency)
    return [
        {
            "design": name, "operator": known[name].operator, "generation": known[name].generation,
            "blueprint": known[name].choice.blueprint, "start": known[name].choice.start,
            "growth": round(known[name].choice.growth, 3), "seeds": known[name].choice.seeds,
            "scale": known[name].choice.scale, "lr_scale": known[name].choice.lr_scale, "reports": found.num,
            "kept": found.kept, "gain_per_cost": round(found.efficiency, 4),
        }
        for name, found in ranked
        if found.num >= FEWEST and name in known
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Database(Path(folder) / "karn.db") as database:
        shipped = read_snapshot(SHIPPED)
        database.file(shipped.reports)
        before = len(shipped.reports)
        made = loop(database, given.runs, given.seed)
        snapshot = Snapshot.of(database)
    ranked = ranking(snapshot)
    bred = [row for row in ranked if row["operator"] not in BUILT_IN]
    told = {
        "command": f"PYTHONPATH=src:. python -m benchmarks.controller.bred --out FILE --runs {given.runs} "
        f"--seed {given.seed}",
        "runs": given.runs, "reports_before": before, "reports": len(snapshot.reports), "bred": made,
        "ranked": len(ranked), "bred_among_ranked": len(bred),
        "bred_among_best": sum(row["operator"] not in BUILT_IN for row in ranked[:BEST]),
        "best": ranked[:BEST], "best_bred": bred[:BEST],
    }  # fmt: skip
    replace_text(given.out, json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
