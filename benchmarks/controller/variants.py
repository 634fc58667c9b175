"""Small changes to the heuristic of decision 0024 on tuning tasks of runs of 400, 1,000 and 2,000 steps, real growers.

    PYTHONPATH=src:. python -m benchmarks.controller.variants --work runs/variants --out FILE

What the default of decision 0025 was chosen from: mean rewards by length of the run, paired differences with standard
errors over tasks to *default*, which is that of 0024, each family at the better of two learning rates. A choice still
has to hold on fresh tasks (``compare.py``). Two hours of one core; cells are kept in --work.
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
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.field import TRAINING
from esper.greenhouse.real import RealHost
from esper.protocol import SITE_FEATURES, Command, Germinate, Observation, SeedPlan
from esper.tamiyo import Controller, HeuristicController

TASKS, SEEDS, MOST = range(12), (711, 712), 10.0
LEARNING_RATES = (2e-2, 4e-2)
GROUPS = {
    400: TRAINING,
    1000: ("teacher_1000", "spirals_1000", "tabular_1000"),
    2000: ("teacher_long", "spirals_long", "tabular_long"),
}
"""Families by the steps that they train."""
_READS, _WRITES = (SITE_FEATURES.index(name) for name in ("log_in", "log_out"))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is asked for instead of what the default asks for.

    ``first``: shares of runs of 400, 1,000 and 2,000 steps after which growth begins; ``None``: the default's.
    ``trimmed``: no more units than a span has outputs, or inputs and a bias. ``site``: one site alone, counted from 0
    (-1: the last).
    """

    growth: float = 0.5
    trimmed: bool = False
    patience: int = 2
    first: tuple[float, float, float] | None = None
    start: str | None = None
    last_share: float = TamiyoConfig().last_share
    site: int | None = None
    least: int | None = None
    """Fewest units, where fewer than the default's fewest (4) may be asked for."""

    def tamiyo(self, steps: int) -> TamiyoConfig:
        """Settings of the heuristic that is asked."""
        first = None
        if self.first is not None:
            first = round(steps * dict(zip(GROUPS, self.first, strict=True))[steps])
        return TamiyoConfig(growth=self.growth, patience=self.patience, first=first, last_share=self.last_share)


KINDS = ("textures", "grammar")
"""Hosts of other kinds, by themselves: at one learning rate, the best one of all that was tried there."""
KINDS_LR = 2e-2
ON_KINDS = {
    "default": TamiyoConfig(growth=0.5, patience=2),
    "half the width, patience 1": TamiyoConfig(growth=0.5, patience=1),
    "the width, patience 1": TamiyoConfig(growth=1.0, patience=1),
    "twice the width, patience 1": TamiyoConfig(growth=2.0, patience=1),
    "four times the width, patience 1": TamiyoConfig(growth=4.0, patience=1),
    "as it comes": TamiyoConfig(),
}
"""Settings that are played on them; *as it comes* asks for as much as adds half of the host's FLOPs."""
SLOW = (0.2, 0.3, 0.4)
VARIANTS = {
    "default": Variant(),
    "patience 1": Variant(patience=1),
    "trimmed": Variant(trimmed=True),
    "trimmed, patience 1": Variant(trimmed=True, patience=1),
    "trimmed whole width, patience 1": Variant(trimmed=True, growth=1.0, patience=1),
    "trimmed quarter, patience 1": Variant(trimmed=True, growth=0.25, patience=1, least=2),
    "trimmed, patience 1, from 20, 30, 40%": Variant(trimmed=True, patience=1, first=SLOW),
    "trimmed, patience 1, from 20%": Variant(trimmed=True, patience=1, first=(0.2, 0.2, 0.2)),
    "half, at least 2, patience 1": Variant(least=2, patience=1),
    "third, at least 2, patience 1": Variant(growth=1 / 3, least=2, patience=1),
    "quarter, at least 2, patience 1": Variant(growth=0.25, least=2, patience=1),
    "patience 1, from 20, 30, 40%": Variant(patience=1, first=SLOW),
    "tiny": Variant(start="tiny"),
    "tiny twice the width, patience 1, from 20, 30, 40%": Variant(
        start="tiny", trimmed=True, growth=2.0, patience=1, first=SLOW
    ),
    "tiny twice the width, patience 1, from 20%": Variant(
        start="tiny", trimmed=True, growth=2.0, patience=1, first=(0.2, 0.2, 0.2)
    ),
    "trimmed, until 60%": Variant(trimmed=True, last_share=0.6),
    "trimmed, patience 1, first site": Variant(trimmed=True, patience=1, site=0),
    "trimmed, patience 1, last site": Variant(trimmed=True, patience=1, site=-1),
}


class Changed:
    """The heuristic with a variant's seeds."""

    def __init__(self, variant: Variant, steps: int) -> None:
        self._variant, self._inner = variant, HeuristicController(variant.tamiyo(steps))

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        return tuple(self._changed(command, observation) for command in self._inner.decide(observation))

    def state(self) -> dict[str, Any]:
        return self._inner.state()

    def load(self, state: dict[str, Any]) -> None:
        self._inner.load(state)

    def _changed(self, command: Command, observation: Observation) -> Command:
        if not isinstance(command, Germinate):
            return command
        plans, site = command.seeds, self._variant.site
        if site is not None:
            plans = tuple(plan for plan in plans if plan.site == observation.site_names[site]) or plans[:1]
        return msgspec.structs.replace(command, seeds=tuple(self._seed(plan, observation) for plan in plans))

    def _seed(self, plan: SeedPlan, observation: Observation) -> SeedPlan:
        row = observation.site_names.index(plan.site)
        reads, writes = (round(math.exp(observation.sites[row][column])) for column in (_READS, _WRITES))
        width = plan.width or writes
        if self._variant.least is not None:
            width = max(self._variant.least, round(self._variant.growth * int(observation.hidden[row])))
        width = min(width, writes, reads + 1) if self._variant.trimmed else width
        return msgspec.structs.replace(plan, width=width, start=self._variant.start)


def play(name: str, family: str, seed: int, lr: float) -> list[float]:
    """Rewards on all tasks with one seed."""
    found: list[float] = []
    for task in TASKS:
        controller: Controller = (
            scripted(NEVER, (), ()) if name == "never" else Changed(VARIANTS[name], FAMILIES[family].steps)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = RealHost(HostSpec(family=family, task=task, seed=seed, lr=lr), controller).run()
        found.append(round(float(np.clip(end.reward, -MOST, MOST)), 4))
    return found


def play_kinds(name: str, family: str, seed: int) -> list[float]:
    """The same on hosts of another kind."""
    found: list[float] = []
    for task in TASKS:
        controller: Controller = scripted(NEVER, (), ()) if name == "never" else HeuristicController(ON_KINDS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = RealHost(HostSpec(family=family, task=task, seed=seed, lr=KINDS_LR), controller).run()
        found.append(round(float(np.clip(end.reward, -MOST, MOST)), 4))
    return found


def on_kinds(known: dict[str, Any]) -> dict[str, Any]:
    """Each setting's reward on hosts of other kinds, and minus that of no growth: mean and standard error."""
    found: dict[str, Any] = {}
    for name in ("never", *ON_KINDS):
        found[name] = {}
        for family in KINDS:
            values, never = (
                np.mean([known[f"kinds/{one}/{family}/{seed}"] for seed in SEEDS], axis=0) for one in (name, "never")
            )
            gap = values - never
            found[name][family] = {
                "reward": round(float(values.mean()), 3), "minus_never": round(float(gap.mean()), 3),
                "standard_error": round(float(gap.std(ddof=1)) / math.sqrt(len(gap)), 3),
            }  # fmt: skip
    return found


def by_task(known: dict[str, Any], name: str, family: str) -> np.ndarray:
    """``(tasks,)`` mean rewards over seeds, at the learning rate with the better mean."""
    tried = [np.mean([known[f"{name}/{family}/{seed}/{lr:g}"] for seed in SEEDS], axis=0) for lr in LEARNING_RATES]
    return max(tried, key=lambda values: float(values.mean()))


def summary(known: dict[str, Any]) -> dict[str, Any]:
    """Each variant's reward and its difference to the default, by length of the run and over all of them."""
    names = ("never", *VARIANTS)
    values = {(n, f): by_task(known, n, f) for n in names for group in GROUPS.values() for f in group}
    found: dict[str, Any] = {}
    for name in names:
        found[name] = {"reward": {}, "minus_default": {}, "minus_never": {}, "families_minus_never": {}}
        for steps, group in {**GROUPS, "all": tuple(f for some in GROUPS.values() for f in some)}.items():
            found[name]["reward"][str(steps)] = round(float(np.mean([values[name, f] for f in group])), 3)
            for other in ("default", "never"):
                gaps = [values[name, f] - values[other, f] for f in group]
                error = math.sqrt(sum(float(gap.var(ddof=1)) / len(gap) for gap in gaps)) / len(gaps)
                told = {"value": round(float(np.mean(gaps)), 3), "standard_error": round(error, 3)}
                found[name][f"minus_{other}"][str(steps)] = told
        for family in (f for group in GROUPS.values() for f in group):
            gap = values[name, family] - values["never", family]
            found[name]["families_minus_never"][family] = [
                round(float(gap.mean()), 3), round(float(gap.std(ddof=1)) / math.sqrt(len(gap)), 3)
            ]  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=0, help="processes of one thread each; 0: this one alone")
    parser.add_argument("--deadline", type=float, help="seconds after which to stop; a later call goes on")
    given = parser.parse_args()
    cells = Cells(given.work / "cells.jsonl", workers=given.workers, until=time.monotonic() + (given.deadline or 1e9))
    families = [f for steps in reversed(GROUPS) for f in GROUPS[steps]]  # what takes longest first
    wanted = {
        f"{n}/{f}/{s}/{lr:g}": (n, f, s, lr)
        for f in families for n in ("never", *VARIANTS) for s in SEEDS for lr in LEARNING_RATES
    }  # fmt: skip
    others = {f"kinds/{n}/{f}/{s}": (n, f, s) for f in KINDS for n in ("never", *ON_KINDS) for s in SEEDS}
    try:
        is_done = cells.fill(play, wanted) and cells.fill(play_kinds, others)
    finally:
        cells.close()
    if not is_done:
        missing = (wanted.keys() | others.keys()) - cells.known.keys()
        raise SystemExit(f"{len(missing)} of {len(wanted) + len(others)} cells are missing: call again")
    head = {
        "command": "PYTHONPATH=src:. python -m benchmarks.controller.variants --work runs/variants --out "
        "benchmarks/results/controller_variants.json",
        "tasks": len(TASKS), "seeds": len(SEEDS), "learning_rates": LEARNING_RATES,
    }  # fmt: skip
    replace_text(
        given.out,
        json.dumps({**head, "variants": summary(cells.known), "other_kinds": on_kinds(cells.known)}, indent=1) + "\n",
    )


if __name__ == "__main__":
    main()
