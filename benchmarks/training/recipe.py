"""Which parts of the growth recipe pay: one part changed at a time, every variant at its own best learning rate.

    python benchmarks/training/recipe.py mnist1d --data FOLDER --out benchmarks/results/recipe_mnist1d.json

Held-out loss at the end of training, paired by seed with the recipe as it is shipped; the test split is not touched.
All variants share a folder of finished trainings (``--cells``), so the command goes on where it was interrupted, and
they are trained side by side.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's own folder is not the root of its package

from benchmarks.training.protocol.arms import GROWN, Arm, Given, Result, train_esper
from benchmarks.training.protocol.cells import Cell
from benchmarks.training.variants import Settings, compare

import esper
from esper.config import Config
from esper.export import grown_sites
from esper.kasmina import execution
from esper.protocol import Lifecycle
from esper.runs import arms as training
from esper.runs.preset import Preset

SHIPPED = "as shipped"


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
        "fit: half its share of the training": (f"fit.max_share={(shipped.fit.max_share or 0.1) / 2:g}",),
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
        "timing: growth until four fifths of the steps": ("tamiyo.last_share=0.8",),
        "timing: four cohorts in a row may fail": (f"tamiyo.patience={tamiyo.patience + 2}",),
        "allocation: half the units": (f"tamiyo.growth={tamiyo.growth / 2:g}",),
        "allocation: twice the units": (f"tamiyo.growth={tamiyo.growth * 2:g}",),
        "allocation: twice the units, first at a fiftieth of the steps": (
            f"tamiyo.growth={tamiyo.growth * 2:g}", f"tamiyo.first={max(1, (shipped.total_steps or 0) // 50)}",
        ),
        "allocation: a multiple of the present width": ("tamiyo.compound=true",),
        "allocation: eight seeds a site, the best half kept": ("tamiyo.seeds_per_site=8", "tamiyo.keep_share=0.5"),
        "every cohort kept": ("evidence.accept=always",),
        "one look at each cohort": ("evidence.looks=1",),
        "five looks at each cohort": ("evidence.looks=5",),
        "one false discovery in five": ("evidence.fdr=0.2",),
        "confirmed at one in five": ("evidence.confirm_level=0.2",),
        "plain on/off control": ("evidence.control=plain",),
    }  # fmt: skip


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


if __name__ == "__main__":
    compare(None, __doc__, variants, CHANGED_CODE, "recipe")
