"""A task whose trainings are formulas: held-out loss is the distance of the rate from the arm's best one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from benchmarks.training.protocol import Arm, Cell, Outcome, Result, Source, Task
from benchmarks.training.protocol.arms import Given
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.config import Config
from esper.runs.preset import Preset

BEST = {"grown": 2.0, "wide": 8.0, "small": 0.3, "fragile": 2.0, "hopeless": 2.0}
"""The rate at which each arm does best; the grid is 1, 2, 4."""


class FakePreset(Preset):
    name = "fake"
    score_name = "accuracy"
    steps = 10
    lrs = (1.0, 2.0, 4.0)
    seeds = 3
    small_widths = (4,)

    def spec(self, widths: Sequence[int]) -> dict[str, Any]:
        return {"kind": "mlp", "in_features": 2, "widths": list(widths), "num_classes": 2}

    def train_batch(self, seed: int, step: int) -> Any:
        return torch.zeros(1, 2)

    def held_out(self) -> list[Any]:
        return [self.train_batch(0, 0)]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch).sum()

    def test(self, model: nn.Module) -> tuple[float, float]:
        return 0.0, 0.0

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return torch.optim.SGD(model.parameters(), lr)

    def schedule(self, progress: float) -> float:
        return 1.0

    def config(self, steps: int) -> Config:
        return Config(total_steps=steps)


def make(source: Source) -> FakePreset:
    return FakePreset(torch.device(source.device))


def train(preset: Preset, cell: Cell, given: Given) -> Result:
    held = abs(math.log(cell.lr / BEST[cell.arm])) + 0.01 * cell.seed
    if (cell.arm == "fragile" and (cell.lr > 2 or cell.seed == 2)) or cell.arm == "hopeless":
        held = math.inf
    width = 10 + cell.seed if cell.arm == "grown" else int(given.get("width", 4))
    outcome = Outcome(
        held_out=held, flops=100.0 * width, params=width, seconds=0.5, widths=(width,),
        cohorts={"germinated": 2, "accepted": 1, "culled": 1}, stopped="patience",
    )  # fmt: skip
    score = 1 / (1 + held)
    return Result(outcome=outcome, score=score if math.isfinite(held) else math.nan, loss=held)


def width_of_twin(preset: Preset, twin: Outcome, steps: int) -> Given:
    return {"width": twin.widths[0]}


ARMS = {
    "grown": Arm(name="grown", title="grown", train=train, priority=0),
    "wide": Arm(name="wide", title="final shape", train=train, follows_grown=True, derive=width_of_twin, priority=1),
    "small": Arm(name="small", title="small", train=train, priority=2),
}
BAD_ARMS = {
    "fragile": Arm(name="fragile", title="diverges at high rates and on the third seed", train=train),
    "hopeless": Arm(name="hopeless", title="always diverges", train=train),
}
TASK = Task(name="fake", title="A task of formulas", make=make)
