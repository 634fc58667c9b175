"""Which parts of the growth recipe pay: one part changed at a time, every variant at its own best learning rate.

    python benchmarks/training/recipe.py mnist1d --data FOLDER --out benchmarks/results/recipe_mnist1d.json

Held-out loss at the end of training, paired by seed with the recipe as it is shipped; the test split is not touched.
All variants share a folder of finished trainings (``--cells``), so the command goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.training.protocol.arms import GROWN, Arm, Given, Result, register_arm, train_esper
from benchmarks.training.protocol.cells import Cell, CellStore, Record
from benchmarks.training.protocol.command import arguments_of, shown
from benchmarks.training.protocol.plan import Plan
from benchmarks.training.protocol.runner import run
from benchmarks.training.protocol.task import TASKS, Source, device_of, load_all

import esper
from esper.config import Config
from esper.export import grown_sites
from esper.kasmina import execution
from esper.protocol import Lifecycle
from esper.runs import arms as training
from esper.runs.preset import Preset
from esper.runs.statistics import interval

SHIPPED = "as shipped"
Settings = tuple[str, ...]


def variants(shipped: Config) -> dict[str, Settings]:
    """What is changed in each variant, from what the task ships with."""
    graft, tamiyo = shipped.graft, shipped.tamiyo
    longer = graft.settle_steps + 100
    return {
        SHIPPED: (),
        "start: random, no fit": ("fit.start=random_zero",),
        "start: reconstruction": ("fit.start=reconstruction",),
        "start: negative gradient": ("fit.start=negative_gradient",),
        "start: copies of host units": ("fit.start=copy",),
        "start: gradmax": ("fit.start=gradmax",),
        "start: tiny": ("fit.start=tiny",),
        "fit: a fifth of the steps": (f"fit.steps={max(1, shipped.fit.steps // 5)}",),
        "fit: without a ceiling on its cost": ("fit.max_share=none",),
        "fit: what is unproven is removed": ("fit.unproven=cull",),
        "boost: none": ("graft.lr_boost=1",),
        "boost: 4": ("graft.lr_boost=4",),
        "boost: without a ceiling": ("graft.lr_boost=4", "graft.lr_ceiling=none"),
        "ramp: one step": ("graft.ramp_steps=1",),
        "ramp: five times as long": (f"graft.ramp_steps={5 * graft.ramp_steps}",),
        "ramp: drift controlled": ("graft.strategy=drift_controlled",),
        "ramp: performance linked": ("graft.strategy=performance_linked",),
        "ramp: gradient norm gated": ("graft.strategy=grad_norm_gated",),
        f"judged 100 steps later ({longer} after the ramp)": (f"graft.settle_steps={longer}",),
        "timing: first at a fiftieth of the steps": (f"tamiyo.first={max(1, (shipped.total_steps or 0) // 50)}",),
        "timing: first at a fifth of the steps": (f"tamiyo.first={(shipped.total_steps or 0) // 5}",),
        "allocation: half the units": (f"tamiyo.growth={tamiyo.growth / 2:g}",),
        "allocation: twice the units": (f"tamiyo.growth={tamiyo.growth * 2:g}",),
        "allocation: eight seeds a site, the best half kept": ("tamiyo.seeds_per_site=8", "tamiyo.keep_share=0.5"),
        "every cohort kept": ("evidence.accept=always",),
        "one look at each cohort": ("evidence.looks=1",),
        "plain on/off control": ("evidence.control=plain",),
    }


class Absorbing(esper.Grower):
    """Moves what has become permanent into the host's own layers and its optimizer's state at once."""

    def step(self, loss: Any, batch: Any = None) -> None:
        super().step(loss, batch)
        if not self.kasmina.cohorts and grown_sites(self.kasmina):
            self.absorb(tolerance=math.inf)


def train_absorbed(preset: Preset, cell: Cell, given: Given) -> Result:
    """Not scored: a score needs the shape of the host that the run began with, which absorption has changed."""
    with patch.object(training, "Grower", Absorbing), patch.object(training, "score"):
        return train_esper(preset, dataclasses.replace(cell, arm=GROWN), given)


def train_frozen(preset: Preset, cell: Cell, given: Given) -> Result:
    """Branches learn nothing from the task before they are accepted."""
    learns = execution.learns_from_task

    def later(state: int) -> Any:
        return learns(state) & (state != int(Lifecycle.GRAFTING))

    with patch.object(execution, "learns_from_task", later):
        return train_esper(preset, dataclasses.replace(cell, arm=GROWN), given)


CHANGED_CODE = {
    "absorption: permanent growth joins the host's layers and optimizer": Arm(
        name="grown_absorbed", title="grown, absorbed", train=train_absorbed
    ),
    "grafting: the branch learns only once it is accepted": Arm(
        name="grown_frozen", title="grown, frozen while on trial", train=train_frozen
    ),
}
"""Variants that are no setting."""


def compared(records: list[Record], shipped: list[Record]) -> dict[str, Any]:
    """One variant's line: means over seeds, and paired differences from the shipped recipe."""
    held = [record.outcome.held_out for record in records]
    differences = [mine - theirs.outcome.held_out for mine, theirs in zip(held, shipped, strict=True)]
    flops = sum(record.outcome.flops for record in records)
    cohorts = [record.outcome.cohorts for record in records]
    return {
        "lr": records[0].cell.lr, "held_out": held,
        "minus_shipped": sum(differences) / len(differences),
        "minus_shipped_interval": interval(differences),
        "flops_ratio": flops / sum(record.outcome.flops for record in shipped),
        "germinated": sum(each["germinated"] for each in cohorts), "accepted": sum(e["accepted"] for e in cohorts),
    }  # fmt: skip


def main() -> None:
    started = time.monotonic()
    load_all()
    options = arguments_of(__doc__, None, None)
    store = CellStore(options.cells or options.out.with_suffix(".cells"))
    source = Source(device=device_of(options.size), size=options.size, data=options.data)
    preset = TASKS[options.task].preset(source)
    changes = variants(preset.config(options.steps or preset.steps))
    plans = {
        label: Plan(
            TASKS[options.task], seeds=range(options.first_seed, options.first_seed + options.seeds), source=source,
            code=options.code, arms=[GROWN], lrs=options.lr, steps=options.steps,
            settings=(*options.settings, *settings),
        )
        for label, settings in changes.items()
    }  # fmt: skip
    for label, arm in CHANGED_CODE.items():
        plans[label] = Plan(
            TASKS[options.task], seeds=plans[SHIPPED].seeds, source=source, code=options.code,
            arms=[register_arm(arm).name], lrs=options.lr, steps=options.steps, settings=tuple(options.settings),
        )  # fmt: skip
    lines: dict[str, Any] = {}
    for label, plan in plans.items():
        run(plan, store, workers=options.workers, deadline=started + options.deadline, note=lambda record: None)
        arm = CHANGED_CODE[label].name if label in CHANGED_CODE else GROWN
        records, shipped = plan.complete(arm), plans[SHIPPED].complete(GROWN)
        if records is None or shipped is None:
            continue
        lines[label] = {"settings": list(changes.get(label, ()))} | compared(records, shipped)
        line = lines[label]
        print(
            f"{time.monotonic() - started:5.0f} s  {label:52s} {line['minus_shipped']:+.4f} "
            f"{line['minus_shipped_interval']}, "
            f"{line['flops_ratio']:.2f} FLOPs, {line['accepted']} of {line['germinated']} kept, lr {line['lr']:g}",
            flush=True,
        )
        report = {
            "task": options.task, "title": TASKS[options.task].title, "seeds": options.seeds, "code": options.code,
            "command": shown(sys.argv, f"recipe_{options.task}", "recipe"), "environment": records[0].environment,
            "variants": lines, "missing": [name for name in plans if name not in lines],
        }  # fmt: skip
        options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
