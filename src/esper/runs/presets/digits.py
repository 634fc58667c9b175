"""``digits``: scikit-learn's 1,797 handwritten digits, an undersized two-layer MLP. About a minute on two cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.config import CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig, TamiyoConfig
from esper.errors import DataError
from esper.runs.preset import Preset, batch_generator

_TRAIN, _HELD_OUT, _BATCH, _JUDGE = 1000, 400, 64, 5


class Digits(Preset):
    """1,000 images to train on, 400 to judge with, 397 to score on; the split is fixed."""

    name = "digits"
    score_name = "accuracy"
    steps = 1500
    lrs = (1e-3, 3e-3, 1e-2)
    seeds = 5
    held_out_every = 50
    small_widths = (8, 8)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise DataError(
                "the digits preset needs scikit-learn, which is not installed; pip install 'esper-morph[demo]'"
            ) from error
        bunch: Any = load_digits()
        order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
        self.x = (torch.tensor(bunch.data, dtype=torch.float32) / 16)[order].to(device)
        self.y = torch.tensor(bunch.target, dtype=torch.int64)[order].to(device)

    def spec(self, widths: Sequence[int]) -> dict[str, Any]:
        return {"kind": "mlp", "in_features": 64, "widths": list(widths), "num_classes": 10}

    def train_batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(_TRAIN, (_BATCH,), generator=batch_generator(seed, step)).to(self.device)
        return self.x[index], self.y[index]

    def held_out(self) -> list[Any]:
        end = _TRAIN + _HELD_OUT
        return [(self.x[i : i + _JUDGE], self.y[i : i + _JUDGE]) for i in range(_TRAIN, end, _JUDGE)]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def test(self, model: nn.Module) -> tuple[float, float]:
        part = slice(_TRAIN + _HELD_OUT, None)
        logits, truth = model(self.x[part]), self.y[part]
        return float((logits.argmax(1) == truth).float().mean()), float(F.cross_entropy(logits, truth))

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
