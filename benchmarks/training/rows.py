"""What tasks on rows of numbers share: splits in memory, an undersized two-layer MLP, AdamW with a cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.config import CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig, TamiyoConfig
from esper.runs.preset import Preset, batch_generator

Split = tuple[Tensor, Tensor]


class Rows(Preset):
    """``train``, ``held`` and ``test`` are ``(x, y)``: x ``(N, D)`` float32; y ``(N,)`` int64 classes (scored by
    accuracy) or float32 targets (scored by R2, standardised like the inputs).

    Means and deviations are those of the training part alone.
    """

    steps = 1500
    lrs = (1e-3, 3e-3, 1e-2)
    seeds = 5
    held_out_every = 50
    small_widths = (8, 8)
    batch = 64
    judge = 10

    def __init__(self, device: torch.device, *, train: Split, held: Split, test: Split) -> None:
        super().__init__(device)
        self.classes = 0 if train[1].is_floating_point() else int(train[1].max()) + 1
        self.score_name = "accuracy" if self.classes else "R2"
        mean, std = train[0].mean(0), train[0].std(0).clamp_min(1e-6)
        level, spread = (train[1].mean(), train[1].std()) if not self.classes else (0, 1)

        def ready(split: Split) -> Split:
            x, y = split
            return ((x - mean) / std).to(device), (y if self.classes else (y - level) / spread).to(device)

        self.train_x, self.train_y = ready(train)
        self.held_x, self.held_y = ready(held)
        self.test_x, self.test_y = ready(test)

    def spec(self, widths: Sequence[int]) -> dict[str, Any]:
        out = self.classes or 1
        return {"kind": "mlp", "in_features": self.train_x.shape[1], "widths": list(widths), "num_classes": out}

    def train_batch(self, seed: int, step: int) -> Split:
        generator = batch_generator(seed, step)
        index = torch.randint(len(self.train_x), (self.batch,), generator=generator).to(self.device)
        return self.train_x[index], self.train_y[index]

    def held_out(self) -> list[Any]:
        return list(zip(self.held_x.split(self.judge), self.held_y.split(self.judge), strict=True))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y) if self.classes else F.mse_loss(model(x).squeeze(1), y)

    def test(self, model: nn.Module) -> tuple[float, float]:
        loss = float(self.loss(model, (self.test_x, self.test_y)))
        if self.classes:
            return float((model(self.test_x).argmax(1) == self.test_y).float().mean()), loss
        return 1 - loss / float(self.test_y.var(correction=0)), loss

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)

    def schedule(self, progress: float) -> float:
        return 0.5 + 0.5 * math.cos(math.pi * progress)

    def config(self, steps: int) -> Config:
        return Config(
            capture=CaptureConfig(batches=32, rows=4096),
            fit=FitConfig(batch_rows=256),
            graft=GraftConfig(ramp_steps=30, settle_steps=100, warmup_steps=20, cull_steps=50, embargo=50),
            evidence=EvidenceConfig(confirm_share=0.25, held_out_batches=40),
            tamiyo=TamiyoConfig(
                first=max(20, steps // 20), growth=4.0, last_share=0.6, patience=2, min_gain_per_cost=0.01
            ),
            total_steps=steps,
            held_out_every=self.held_out_every,
        )


def parts(x: Tensor, y: Tensor, held: int, seed: int) -> tuple[Split, Split]:
    """``(train, held)``: ``held`` rows set apart at random, by ``seed``."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return (x[order[held:]], y[order[held:]]), (x[order[:held]], y[order[:held]])
