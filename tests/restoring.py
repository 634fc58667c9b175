"""Trainings as a user would write them, on any device: mixed precision, a loss scaler, momentum, a schedule, noise."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from tests.models import DEVICE, Task, mse
from tests.rigs import QUICK, Idle
from torch import Tensor

import esper
from esper.protocol import AnyEvent, Germinate, Lifecycle, Refused, SeedPlan
from esper.safety.training import Training
from esper.safety.tree import digest

NUM_BATCHES = 12
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""fp16 runs under a GradScaler, the others have none."""


class Course:
    """One training of a task, with or without a grower; the same seeds give the same course.

    Parameters
    ----------
    seed:
        Of the weights and of all global streams: another one for a process into which a checkpoint is loaded.
    """

    def __init__(self, task: Task, precision: str = "fp32", *, grows: bool, seed: int = 1) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.precision = precision
        self.model = task.build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9, nesterov=True)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=400)
        scaled = precision == "fp16"
        self.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0, growth_interval=7, enabled=scaled)
        self.batches = esper.Batches(task.batches(NUM_BATCHES))
        tracked = [self.scheduler, self.scaler, self.batches]
        self.training = Training(self.model, [self.optimizer], tracked)
        self.events: list[AnyEvent] = []
        self.grower: Any = None
        if grows:
            ours = {
                "evidence": esper.EvidenceConfig(accept="always"),
                "safety": esper.SafetyConfig(window=20, recovery=5),
            }
            self.grower = esper.Grower(
                self.model, self.optimizer, loss=mse, evaluate=task.batches(16, seed=7), track=tracked,
                controller=Idle(), config=esper.Config(**{**QUICK, **ours}), on_event=self.events.append,
            )  # fmt: skip

    def train(self, steps: int = 1) -> None:
        dtype = PRECISIONS[self.precision]
        for _ in range(steps):
            x, wanted = next(self.batches)
            noisy = x + 0.01 * torch.randn_like(x) if x.is_floating_point() else x  # drawn on the device
            with torch.autocast(DEVICE.type, dtype or torch.float32, enabled=dtype is not None):
                loss: Tensor = (self.model(noisy).float() - wanted).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            if self.grower is not None:
                self.grower.step(loss)
            self.scheduler.step()

    def bring(self, state: Lifecycle, *, start: str = "negative_gradient") -> None:
        """Train until one cohort over all sites is in ``state``."""
        self.train(3)
        names = [info.name for info in self.grower.sites()]
        seeds = tuple(SeedPlan(site=name, width=3, start=start) for name in names)
        self.grower.submit(Germinate(seeds=seeds))
        self.train()
        for _ in range(60):
            if self.cohort is None or self.cohort.state is state:
                break
            self.train()
        assert self.cohort is not None and self.cohort.state is state, (self.told(Refused), self.grower.verdicts)

    @torch.no_grad()
    def damage(self) -> None:
        """Spoil the host itself: weights, buffers, moments, the schedule, the place in the data, all streams."""
        for value in [*self.model.parameters(), *self.model.buffers()]:
            if value.is_floating_point():
                value.add_(torch.randn_like(value))
        for entry in self.optimizer.state.values():
            entry["momentum_buffer"].zero_()
        self.scheduler.step()
        next(self.batches)
        random.random()
        np.random.rand()
        torch.rand(3)
        torch.rand(3, device=DEVICE)

    @property
    def cohort(self) -> Any:
        return next(iter(self.grower.kasmina.cohorts.values()), None)

    def hash(self) -> str:
        """All of the host's side: weights, buffers, moments, schedule, scale, place in the data, random streams."""
        return digest(self.training.state())

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]
