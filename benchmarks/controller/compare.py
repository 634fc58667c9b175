"""Train policies and compare them with every control, on tasks and families that nothing was trained or tuned on.

    python -m benchmarks.controller.compare --work runs/contest --out benchmarks/results/controller_contest.json

Stages: training (five and more seeds of the full recipe, fewer of each ablation), tuning (a learning rate for each arm
and family, schedules, a static width), experience for Karn, evaluation in stacks (all arms) and under real growers
(those that the verdict is about). Families are short and longer ones, and hosts of other kinds. Cells are kept in
--work: run again, it goes on; with --deadline it stops in time and writes what there is. ``--workers N``: processes of
one thread each.

``--policies 0 --ablations 0`` is controls alone. It can run beside a training in another folder: append its cells.jsonl
to the other's, and call again there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.controller.contest import runs
from benchmarks.controller.contest.arms import ADVISED, ADVISED_LONGER, CONTROLS, HEURISTICS
from benchmarks.controller.contest.cells import Cells
from benchmarks.controller.contest.policies import Extent, train
from benchmarks.controller.contest.recipes import RECIPES
from benchmarks.controller.contest.verdict import GROUPS, OTHER_KINDS, cell_name, group_of, summary
from benchmarks.controller.schedules import Growth, Schedule

from esper.files import replace_text
from esper.greenhouse.family import DECISIONS, FAMILIES
from esper.greenhouse.frontier import LEARNING_RATES

TUNED = ("teacher", "spirals", "tabular", "teacher_long", "spirals_long", "tabular_long")
"""Families that schedules are tuned on, and evaluated on by other tasks."""
SHORT = ("teacher", "spirals", "tabular", "checkers", "waves", "shells")
FAMILY_NAMES = (*SHORT, *(f"{name}_long" for name in SHORT))
KINDS = ("textures", "grammar")
"""Hosts of other kinds: convolutional nets and transformers, that no schedule, policy or report is from ..."""
ON_KINDS = ("never", "always", "even", "random", *HEURISTICS, "bandit", *ADVISED_LONGER)
"""... and what is played on them, under real growers."""
ON_REAL = ("never", "always", "even", *HEURISTICS, "bandit")
"""Those of them whose learning rate is looked for there."""
RETUNED = ("always", *HEURISTICS, "bandit", "never")
"""Controls without schedules, whose learning rate is looked for."""
USUAL = Extent(updates=70, hosts=16, copies=6, teachers=16, tried=12)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything."""

    policies: int = 6
    ablations: int = 3
    seeds: int = 5
    tasks: tuple[int, ...] = tuple(runs.EVALUATED)
    """Evaluated ones: of short families in stacks ..."""
    few_tasks: int = 8
    """... and so many of them under real growers and of all other families."""
    part: int = 4
    """Tasks in one cell under real growers, but of short families."""
    chunks: int = 80
    chunk: int = 9
    """Runs that reports are gathered from: so many parts of so many."""
    extent: Extent = USUAL
    train_seconds: float | None = None
    go_on: bool = False
    """Train further what ran out of its seconds."""
    families: tuple[str, ...] = FAMILY_NAMES
    kinds: tuple[str, ...] = KINDS
    schedules: int | None = None
    """Only so many of each list; ``None``: all."""

    @property
    def trained(self) -> list[tuple[str, int]]:
        """Recipes and seeds, the full recipe first."""
        counts = {name: self.policies if name == "policy" else self.ablations for name in RECIPES}
        return [(name, seed) for name, num in counts.items() for seed in range(num)]


TINY = Scale(
    policies=2, ablations=0, seeds=1, tasks=(1016, 1017, 1018), few_tasks=2, part=1, chunks=2, chunk=3, schedules=4,
    families=("teacher", "waves", "teacher_long", "waves_long"), kinds=("textures",),
    extent=Extent(updates=2, hosts=4, copies=2, teachers=4, tried=2),
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
        known = self.cells.known
        again = [
            name for name in wanted
            if self.scale.go_on and name in known and known[name]["updates"] < known[name]["planned"]
        ]  # fmt: skip
        self.cells.forget(measured_of(known, again))
        return self.cells.fill(train, wanted, again=again)

    def tune(self) -> bool:
        """Schedules, static widths, and a learning rate for each arm and family."""
        families = sorted(self.scale.families, key=lambda family: -FAMILIES[family].steps)  # what takes longest first
        fixed: dict[str, Sequence[Any]] = {
            f"tune/{kind}/{family}/{lr:g}/{part[0]}": (family, kind, lr, part)
            for family in families for kind in ("search", "even") for lr in LEARNING_RATES
            for part in self._parts(kind, family)
        }  # fmt: skip
        static = {f"tune/static/{family}/{lr:g}": (family, lr) for family in families for lr in LEARNING_RATES}
        done = self.cells.fill(runs.tune_schedules, fixed)
        if not self.cells.fill(runs.tune_static, static) or not done:
            return False
        arms = [*RETUNED, *self.arms_of("policy"), *self.learned("cloned"), *self.ablations()]
        self._write(self._plan(arms))
        if not self.cells.fill(runs.tune_arm, {
            f"tune/arm/{arm}/{family}": (arm, family, str(self.work)) for family in families for arm in arms
        }):  # fmt: skip
            return False
        if not self.cells.fill(runs.tune_arm_real, {
            f"tune/real/{arm}/{family}": (arm, family, str(self.work)) for family in self.scale.kinds for arm in ON_REAL
        }):  # fmt: skip
            return False
        plan = self._plan(arms)
        plan["rate"] = self._rate(plan)
        plan["lr"]["random"] = plan["lr"]["heuristic"]
        for arm in self.arms_of("policy"):
            name = arm.replace("policy", "replay")
            plan["schedules"][name] = {family: self._mean_schedule(plan, arm, family) for family in self.scale.families}
        self._write(plan)
        return True

    @property
    def _tuned(self) -> list[str]:
        return [family for family in TUNED if family in self.scale.families]

    def _parts(self, kind: str, family: str) -> list[list[int]]:
        """Numbers of schedules that are played together, few enough to be done soon."""
        numbers = list(range(len(runs.listed(kind, family))))[: self.scale.schedules]
        return [numbers[first : first + runs.TOGETHER] for first in range(0, len(numbers), runs.TOGETHER)]

    def _plan(self, arms: Sequence[str]) -> dict[str, Any]:
        """What the finished cells of tuning say: schedules, widths, and learning rates of those arms that have all."""
        plan = self._tuned_schedules()
        for arm in arms:
            tuned = {family: self.cells.known.get(f"tune/arm/{arm}/{family}") for family in self.scale.families}
            if None not in tuned.values():
                plan["lr"][arm] = {family: float(_best(found["lr"])) for family, found in tuned.items() if found}
        for family in self.scale.kinds:
            plan["schedules"]["even"][family] = plan["schedules"]["even"][TUNED[0]]
            for arm in ON_REAL:
                if found := self.cells.known.get(f"tune/real/{arm}/{family}"):
                    plan["lr"].setdefault(arm, {})[family] = float(_best(found["lr"]))
        return plan

    def _tuned_schedules(self) -> dict[str, Any]:
        """The best schedules: over all training families (``even``, ``search``), and of each family by itself."""
        known, families = self.cells.known, self.scale.families
        plan: dict[str, Any] = {"lr": {}, "schedules": {}, "static": {}}
        for kind in ("even", "search"):
            table = {
                (family, lr): np.concatenate([
                    known[f"tune/{kind}/{family}/{lr:g}/{part[0]}"] for part in self._parts(kind, family)
                ])
                for family in families for lr in LEARNING_RATES
            }  # fmt: skip
            bests = {family: np.max([table[family, lr] for lr in LEARNING_RATES], axis=0) for family in families}
            # sites differ between families: of the searched list only what all families have can be shared
            shared = int(np.mean([bests[family] for family in self._tuned], axis=0).argmax())
            own = {family: int(bests[family].argmax()) for family in families}
            for name, chosen, like in ((kind, dict.fromkeys(families, shared), TUNED[0]), (f"{kind}-own", own, None)):
                plan["schedules"][name] = {f: _growths(runs.listed(kind, f, like)[chosen[f]]) for f in families}
                plan["lr"][name] = {
                    f: float(max(LEARNING_RATES, key=lambda lr: table[f, lr][chosen[f]])) for f in families
                }
        for family in families:  # a list for other sites has other schedules: the shared one was not tried there
            if FAMILIES[family].num_sites != FAMILIES[TUNED[0]].num_sites:
                plan["lr"]["search"][family] = plan["lr"]["even"][family]
            widths = [found for lr in LEARNING_RATES for found in known[f"tune/static/{family}/{lr:g}"]]
            plan["static"][family] = max(widths, key=lambda found: found["reward"])
        return plan

    def _rate(self, plan: dict[str, Any]) -> float:
        """Germinations of the heuristic a decision, on tuning tasks of the families that schedules are tuned on."""
        asked = [
            len(run)
            for family in self._tuned
            for run in self.cells.known[f"tune/arm/heuristic/{family}"]["asked"][str(plan["lr"]["heuristic"][family])]
        ]
        return float(np.mean(asked)) / (DECISIONS - 1)

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
        replace_text(self.work / "reports.json", json.dumps(reports))
        policies, karn = self.arms_of("policy"), [*ADVISED, *self.learned("karn-policy")]
        stacked = ["static", *CONTROLS, *policies]
        replays = self.learned("replay")
        others = [*self.learned("cloned"), *replays, *self.learned("shuffled"), *self.ablations()]
        others += self.learned("sampled")
        some, all_of = range(min(2, scale.seeds)), range(scale.seeds)
        wanted: dict[str, Sequence[Any]] = {}
        other = (OTHER_KINDS,)
        for mode, arms, groups, seeds in (
            ("real", [*CONTROLS, *policies], GROUPS, some), ("real", karn, GROUPS[:1], some),
            ("real", ADVISED_LONGER, GROUPS[1:], some), ("real", [*ON_KINDS], other, some),
            ("real", [*CONTROLS, *policies], GROUPS, all_of), ("real", [*ON_KINDS], other, all_of),
            ("real", karn, GROUPS[:1], all_of), ("real", ADVISED_LONGER, GROUPS[1:], all_of),
            ("stack", stacked, GROUPS, some), ("stack", others, GROUPS, some), ("real", replays, GROUPS[:1], all_of),
            ("stack", [*stacked, *others], GROUPS, all_of),
        ):  # fmt: skip
            for group in groups:
                wanted |= self._cases(mode, arms, group, seeds)
        return self.cells.fill(runs.evaluate, wanted)

    def _cases(self, mode: str, arms: Sequence[str], group: str, seeds: Sequence[int]) -> dict[str, Sequence[Any]]:
        """Cells of an evaluation on the families of a group."""
        is_short = group == "short"
        tasks = self.scale.tasks if mode == "stack" and is_short else self.scale.tasks[: self.scale.few_tasks]
        size = len(tasks) if mode == "stack" or is_short else self.scale.part
        parts = [tasks[first : first + size] for first in range(0, len(tasks), size)]
        return {
            cell_name(mode, arm, family, seed, row, len(parts)): (mode, arm, family, seed, str(self.work), part)
            for seed in seeds for arm in arms for family in (*self.scale.families, *self.scale.kinds)
            if group_of(family) == group
            for row, part in enumerate(parts, 1)
        }  # fmt: skip

    def _write(self, plan: dict[str, Any]) -> None:
        replace_text(self.plan_path, json.dumps(plan, indent=1) + "\n")


OF_A_POLICY = ("policy", "sampled", "shuffled", "replay", "karn-policy")
"""Arms that a policy of the full recipe is asked in."""


def measured_of(cells: Collection[str], trainings: Collection[str]) -> list[str]:
    """Cells that say how the policies of some trainings do."""
    arms: set[str] = set()
    for training in trainings:
        _, name, seed = training.split("/")
        arms |= {f"{head}:{seed}" for head in (OF_A_POLICY if name == "policy" else (name,))}
    return [cell for cell in cells if arms & set(cell.split("/"))]


def _best(rewards: dict[str, float]) -> str:
    return max(rewards, key=lambda lr: rewards[lr])


def _growths(schedule: Schedule) -> list[dict[str, Any]]:
    return [asdict(growth) for growth in schedule]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="summary; default: WORK/summary.json")
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop and write what there is")
    parser.add_argument("--train-seconds", type=float, help="most seconds of one training")
    parser.add_argument(
        "--go-on",
        action="store_true",
        help="train further what ran out of --train-seconds; what was measured of those policies is measured anew",
    )
    parser.add_argument("--policies", type=int, help="trainings of the full recipe")
    parser.add_argument("--ablations", type=int, help="trainings of each other recipe")
    parser.add_argument("--tiny", action="store_true", help="a few cells, to see that everything works")
    parser.add_argument("--only-summary", action="store_true", help="of what is there")
    given = parser.parse_args()
    until = time.monotonic() + (given.deadline or 1e9)
    scale = TINY if given.tiny else Scale()
    scale = replace(
        scale, train_seconds=given.train_seconds, go_on=given.go_on,
        policies=scale.policies if given.policies is None else given.policies,
        ablations=scale.ablations if given.ablations is None else given.ablations,
    )  # fmt: skip
    contest = Contest(given.work, scale, workers=given.workers, until=until)
    if not given.only_summary:
        contest.run()
    found = summary(contest.cells.known, contest.cells.seconds, contest.plan_path)
    out = given.out or given.work / "summary.json"
    replace_text(out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
