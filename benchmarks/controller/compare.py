"""Train policies and compare them with every control, on tasks and families that nothing was trained or tuned on.

    python -m benchmarks.controller.compare --work runs/contest --out benchmarks/results/controller_contest.json

Stages: training (five and more seeds of the full recipe, fewer of each ablation), tuning (a learning rate for each arm
and family, schedules, a static width), experience for Karn, evaluation in stacks (all arms) and under real growers
(those that the verdict is about). Cells are kept in --work: run again, it goes on; with --deadline it stops in time and
writes what there is. ``--workers N``: processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.controller.contest import runs
from benchmarks.controller.contest.arms import ADVISED, CONTROLS, HEURISTICS
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.contest.policies import Extent, train
from benchmarks.controller.contest.recipes import RECIPES
from benchmarks.controller.contest.verdict import summary
from benchmarks.controller.schedules import Growth, Schedule, schedules, tuned_schedules

from esper.files import replace_text
from esper.greenhouse.family import FAMILIES
from esper.greenhouse.frontier import LEARNING_RATES

TUNED = ("teacher", "spirals", "tabular")
"""Training families that schedules are tuned on, and evaluated on by other tasks."""
FAMILY_NAMES = (*TUNED, *(name for name, family in FAMILIES.items() if family.purpose == "evaluation"))
RETUNED = ("always", *HEURISTICS, "bandit", "never")
"""Controls without schedules, whose learning rate is looked for."""


USUAL = Extent(updates=70, hosts=15, copies=6, teachers=20, tried=12)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    policies: int = 6
    ablations: int = 3
    seeds: int = 5
    stack_tasks: int = 16
    real_tasks: int = 8
    chunks: int = 40
    chunk: int = 9
    extent: Extent = USUAL
    train_seconds: float | None = None
    families: tuple[str, ...] = FAMILY_NAMES
    schedules: int | None = None
    """Only so many of each list; ``None``: all."""

    @property
    def trained(self) -> list[tuple[str, int]]:
        """Recipes and seeds, the full recipe first."""
        counts = {name: self.policies if name == "policy" else self.ablations for name in RECIPES}
        return [(name, seed) for name, num in counts.items() for seed in range(num)]


TINY = Scale(
    policies=2, ablations=1, seeds=1, stack_tasks=2, real_tasks=1, chunks=2, chunk=3, schedules=4,
    families=(*TUNED, "waves"),
    extent=Extent(updates=2, hosts=5, copies=2, teachers=5, tried=2),
)  # fmt: skip


class Contest:
    """One contest in a folder."""

    def __init__(self, work: Path, scale: Scale, *, workers: int, until: float) -> None:
        self.work, self.scale = work.resolve(), scale
        self.cells = Cells(self.work / "cells.jsonl", workers=workers, until=until)
        self.plan_path = self.work / "plan.json"

    def run(self) -> None:
        """Everything, in order, as far as time allows."""
        try:
            if self.train() and self.tune():
                self.evaluate()
        finally:
            self.cells.close()

    def train(self) -> bool:
        """All policies; whether all are done."""
        extent = asdict(self.scale.extent)
        wanted = {
            f"train/{name}/{seed}": (
                name, seed, str(self.work / "policies" / f"{name}-{seed}"), extent, self.scale.train_seconds
            )
            for name, seed in self.scale.trained
        }  # fmt: skip
        return self.cells.fill(train, wanted)

    def tune(self) -> bool:
        """Schedules, static widths, and a learning rate for each arm and family."""
        fixed: dict[str, Sequence[Any]] = {
            f"tune/{kind}/{family}/{lr:g}": (family, kind, lr, self.scale.schedules)
            for kind in ("search", "even") for family in self.scale.families for lr in LEARNING_RATES
        }  # fmt: skip
        done = self.cells.fill(runs.tune_schedules, fixed)
        done &= self.cells.fill(
            runs.tune_static, {f"tune/static/{family}": (family,) for family in self.scale.families}
        )
        if not done:
            return False
        plan = self._tuned_schedules()
        self._write(plan)
        arms = [*RETUNED, *self.arms_of("policy"), *self.learned("cloned"), *self.ablations()]
        if not self.cells.fill(runs.tune_arm, {
            f"tune/arm/{arm}/{family}": (arm, family, str(self.work)) for arm in arms for family in self.scale.families
        }):  # fmt: skip
            return False
        for arm in arms:
            plan["lr"][arm] = {
                family: float(_best(self.cells.known[f"tune/arm/{arm}/{family}"]["lr"]))
                for family in self.scale.families
            }
        plan["rate"] = self._rate(plan)
        plan["lr"]["random"] = plan["lr"]["heuristic"]
        for arm in self.arms_of("policy"):
            name = arm.replace("policy", "replay")
            plan["schedules"][name] = {family: self._mean_schedule(plan, arm, family) for family in self.scale.families}
        self._write(plan)
        return True

    def _tuned_schedules(self) -> dict[str, Any]:
        """The best schedules: over all training families (``even``, ``search``), and of each family by itself."""
        known = self.cells.known
        plan: dict[str, Any] = {"lr": {}, "schedules": {}, "static": {}}
        for kind in ("even", "search"):
            table = {
                (family, lr): np.array(known[f"tune/{kind}/{family}/{lr:g}"])
                for family in self.scale.families for lr in LEARNING_RATES
            }  # fmt: skip
            bests = {
                family: np.max([table[family, lr] for lr in LEARNING_RATES], axis=0) for family in self.scale.families
            }
            # sites differ between families: of the searched list only what all families have can be shared
            shared = int(np.mean([bests[family] for family in TUNED], axis=0).argmax())
            plan["schedules"][kind] = _growths(_list(kind, "teacher")[shared])
            own = {family: int(bests[family].argmax()) for family in self.scale.families}
            plan["schedules"][f"{kind}-own"] = {f: _growths(_list(kind, f)[number]) for f, number in own.items()}
            for name, chosen in ((kind, dict.fromkeys(self.scale.families, shared)), (f"{kind}-own", own)):
                plan["lr"][name] = {
                    f: float(max(LEARNING_RATES, key=lambda lr: table[f, lr][chosen[f]])) for f in self.scale.families
                }
        for (
            family
        ) in self.scale.families:  # a list for other sites has other schedules: the shared one was not tried there
            if FAMILIES[family].num_sites != FAMILIES["teacher"].num_sites:
                plan["lr"]["search"][family] = plan["lr"]["even"][family]
        for family in self.scale.families:
            plan["static"][family] = max(known[f"tune/static/{family}"], key=lambda found: found["reward"])
        return plan

    def _rate(self, plan: dict[str, Any]) -> float:
        """Germinations of the heuristic a decision, on tuning tasks of the training families."""
        asked = [
            len(run)
            for family in TUNED
            for run in self.cells.known[f"tune/arm/heuristic/{family}"]["asked"][str(plan["lr"]["heuristic"][family])]
        ]
        return float(np.mean(asked)) / 19

    def _mean_schedule(self, plan: dict[str, Any], arm: str, family: str) -> list[dict[str, Any]]:
        """What a policy usually does on a family: its commonest times, sites and sizes."""
        runs_of = self.cells.known[f"tune/arm/{arm}/{family}"]["asked"][str(plan["lr"][arm][family])]
        num = round(float(np.mean([len(run) for run in runs_of])))
        times = Counter(step for run in runs_of for step, _, _ in run)
        steps = sorted(step for step, _ in times.most_common(num))
        found: list[Growth] = []
        for step in steps:
            there = [(site, size) for run in runs_of for at, site, size in run if at == step]
            site = Counter(site for site, _ in there).most_common(1)[0][0]
            size = float(np.median([size for at, size in there if at == site]))
            found.append(Growth(step, site, size, None))
        return _growths(tuple(found))

    def arms_of(self, recipe: str) -> list[str]:
        """Trained policies of a recipe."""
        return [f"{name}:{seed}" for name, seed in self.scale.trained if name == recipe]

    def learned(self, head: str) -> list[str]:
        """The same under another name."""
        return [f"{head}:{seed}" for seed in range(self.scale.policies)]

    def ablations(self) -> list[str]:
        """Policies of all other recipes."""
        return [f"{name}:{seed}" for name, seed in self.scale.trained if name != "policy"]

    def evaluate(self) -> bool:
        """Experience for Karn, then what the verdict needs on some seeds, ablations, and the other seeds."""
        scale = self.scale
        if not self.cells.fill(runs.gather, {f"gather/{n}": (n, scale.chunk) for n in range(scale.chunks)}):
            return False
        reports = [report for n in range(scale.chunks) for report in self.cells.known[f"gather/{n}"]]
        if not (self.work / "reports.json").exists():
            replace_text(self.work / "reports.json", json.dumps(reports))
        policies, karn = self.arms_of("policy"), [*ADVISED, *self.learned("karn-policy")]
        stacked = ["static", *CONTROLS, *policies]
        replays = self.learned("replay")
        others = [*self.learned("cloned"), *replays, *self.learned("shuffled"), *self.ablations()]
        others += self.learned("sampled")
        some, all_of = range(min(2, scale.seeds)), range(scale.seeds)
        done = [
            self._evaluate(mode, arms, seeds)
            for mode, arms, seeds in (
                ("stack", stacked, some), ("real", [*CONTROLS, *policies], some), ("stack", others, some),
                ("real", karn, some), ("real", [*CONTROLS, *policies], all_of), ("stack", [*stacked, *others], all_of),
                ("real", [*karn, *replays], all_of),
            )
        ]  # fmt: skip
        return all(done)

    def _evaluate(self, mode: str, arms: Sequence[str], seeds: Sequence[int]) -> bool:
        is_stack = mode == "stack"
        num_tasks = self.scale.stack_tasks if is_stack else self.scale.real_tasks
        return self.cells.fill(runs.evaluate_stack if is_stack else runs.evaluate_real, {
            f"{mode}/{arm}/{family}/{seed}": (arm, family, seed, str(self.work), num_tasks)
            for seed in seeds for arm in arms for family in self.scale.families
        })  # fmt: skip

    def _write(self, plan: dict[str, Any]) -> None:
        replace_text(self.plan_path, json.dumps(plan, indent=1) + "\n")


def _best(rewards: dict[str, float]) -> str:
    return max(rewards, key=lambda lr: rewards[lr])


def _list(kind: str, family: str) -> list[Schedule]:
    found = FAMILIES[family]
    if kind == "even":
        return tuned_schedules(found.config.interval, found.steps)
    return schedules(found.config.interval, found.steps, found.num_sites)


def _growths(schedule: Schedule) -> list[dict[str, Any]]:
    return [asdict(growth) for growth in schedule]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="summary; default: WORK/summary.json")
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop and write what there is")
    parser.add_argument("--train-seconds", type=float, help="most seconds of one training")
    parser.add_argument("--policies", type=int, default=Scale.policies, help="trainings of the full recipe")
    parser.add_argument("--ablations", type=int, default=Scale.ablations, help="trainings of each other recipe")
    parser.add_argument("--tiny", action="store_true", help="a few cells, to see that everything works")
    parser.add_argument("--only-summary", action="store_true", help="of what is there")
    given = parser.parse_args()
    until = time.monotonic() + (given.deadline or 1e9)
    base = asdict(TINY if given.tiny else Scale()) | {"train_seconds": given.train_seconds}
    if not given.tiny:
        base |= {"policies": given.policies, "ablations": given.ablations}
    scale = Scale(**{**base, "extent": (TINY if given.tiny else Scale()).extent})
    contest = Contest(given.work, scale, workers=given.workers, until=until)
    if not given.only_summary:
        contest.run()
    found = summary(contest.cells.known, contest.cells.seconds, contest.plan_path)
    out = given.out or given.work / "summary.json"
    replace_text(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
