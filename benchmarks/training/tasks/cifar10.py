"""``cifar10``: the ``vision`` preset, a small residual net of a quarter of its inner channels; ``cifar10_adamw``: the
same under AdamW instead of SGD.

The data folder holds ``cifar10.npz`` with uint8 ``x_train (N, 32, 32, 3)``, ``y_train``, ``x_test``, ``y_test``.
"""

from __future__ import annotations

import torch
from benchmarks.training.protocol import Source, Task, register_task
from torch import nn
from torch.optim import Optimizer

from esper.runs.presets.vision import Vision


class VisionAdamW(Vision):
    name = "vision_adamw"

    def __init__(self, source: Source) -> None:
        super().__init__(torch.device(source.device), size=source.size, data=source.file("cifar10.npz"))
        self.lrs = (2e-3, 4e-3, 8e-3)

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=5e-2)


def make(source: Source) -> Vision:
    return Vision(torch.device(source.device), size=source.size, data=source.file("cifar10.npz"))


register_task(Task(name="cifar10", title="CIFAR-10, small residual net", make=make))
register_task(Task(name="cifar10_adamw", title="CIFAR-10, small residual net under AdamW", make=VisionAdamW))
