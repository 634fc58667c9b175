"""The plain loop of a trial, with and without a grower: the same batches and learning rates by the trial's number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esper.config import CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig, TamiyoConfig
from esper.evidence.paired import PairedResult, paired_difference
from esper.kasmina.isolation import undisturbed
from esper.runs.trials.tasks import Rows, Task, make_task, pick, task_name

STEPS = 600


@dataclass(frozen=True)
class Recipe:
    """How a host is trained: drawn, so that trials differ."""

    optimizer: str
    lr: float
    decays: bool

    @classmethod
    def drawn(cls, choose: torch.Generator, task: Task) -> Recipe:
        lr = (3e-3, 1e-2, 2e-2)[pick(choose, 3)]
        is_sgd = pick(choose, 3) == 0 and task.family != "transformer"
        return cls("sgd" if is_sgd else "adamw", 5 * lr if is_sgd else lr, bool(pick(choose, 2)))

    def build(self, model: nn.Module) -> Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(model.parameters(), self.lr, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), self.lr)

    def factor(self, progress: float) -> float:
        """Of the learning rate, at ``progress`` in [0, 1): constant, or a cosine down to zero."""
        return 0.5 + 0.5 * math.cos(math.pi * progress) if self.decays else 1.0


@dataclass
class Setup:
    """A trial before anything has grown; the whole of it follows from its number."""

    number: int
    task: Task
    recipe: Recipe
    batches: torch.Generator
    """Draws the training batches."""

    @classmethod
    def of(cls, number: int, *, task: str | None = None, gate_rows: int | None = None) -> Setup:
        """``task`` and ``gate_rows``: the kind and the rows of a held-out batch, where they are not the number's."""
        choose = torch.Generator().manual_seed(number)
        made = make_task(task or task_name(number), choose, gate_rows)
        return cls(number, made, Recipe.drawn(choose, made), choose)

    def described(self) -> dict[str, Any]:
        """What a record says of it."""
        task, recipe = self.task, self.recipe
        return {
            "task": task.name, "family": task.family, "width": task.width, "noise": task.noise,
            "gate_rows": len(task.gate[0][0]), "optimizer": recipe.optimizer, "lr": recipe.lr, "decays": recipe.decays,
        }  # fmt: skip

    def host(self, scale: int = 1) -> nn.Module:
        """The host with its inner widths times ``scale``; the same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.number)
            return self.task.build(scale)


def take_step(setup: Setup, model: nn.Module, optimizer: Optimizer, batch: Rows, step: int) -> torch.Tensor:
    """Forward, backward, step; returns the loss, not read."""
    for group in optimizer.param_groups:
        group["lr"] = setup.recipe.lr * setup.recipe.factor(step / STEPS)
    loss = setup.task.loss(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def train_plainly(setup: Setup, model: nn.Module, *, steps: int = STEPS) -> nn.Module:
    """Train a host without Esper, on the batches that a trial of the same number sees."""
    choose = setup.batches.clone_state()
    optimizer = setup.recipe.build(model)
    for step in range(steps):
        take_step(setup, model, optimizer, setup.task.batch(choose), step)
    return model


def audit_losses(task: Task, model: nn.Module) -> list[float]:
    """Loss of each audit batch, in evaluation mode."""
    with undisturbed(model):
        return [float(task.loss(model, batch)) for batch in task.audit]


@dataclass(frozen=True)
class Contrast:
    """A mean paired difference as a share of the reference's loss, positive where the other one is better."""

    gain: float
    low: float
    high: float

    @classmethod
    def between(cls, reference: Sequence[float], other: Sequence[float]) -> Contrast:
        """NaN throughout where either is not finite."""
        result: PairedResult = paired_difference([a - b for a, b in zip(reference, other, strict=True)])
        level = sum(reference) / len(reference)
        if not math.isfinite(level) or level <= 0:
            return cls(math.nan, math.nan, math.nan)
        return cls(result.mean / level, result.low / level, result.high / level)


def trial_config(seed: int, *, twins: bool = True) -> Config:
    """Growth fast enough that several cohorts live and end within a trial; every cohort gets a twin if asked."""
    return Config(
        capture=CaptureConfig(batches=4, rows=4096),
        fit=FitConfig(steps=40, batch_rows=512),
        graft=GraftConfig(
            ramp_steps=10, settle_steps=40, timeout=150, stabilize_steps=5, stabilize_window=16, fine_tune_steps=10,
            cull_steps=5, warmup_steps=10, embargo=20,
        ),
        evidence=EvidenceConfig(twin_share=1.0 if twins else 0.0, twin_steps=90),
        tamiyo=TamiyoConfig(
            first=40, spacing=110, growth=2.0, patience=2, min_gain_per_cost=1e-6, last_share=0.85
        ),
        interval=10,
        total_steps=STEPS,
        seed=seed,
    )  # fmt: skip
