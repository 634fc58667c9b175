"""``cifar10``: the ``vision`` preset, a small residual net of a quarter of its inner channels.

The data folder holds ``cifar10.npz`` with uint8 ``x_train (N, 32, 32, 3)``, ``y_train``, ``x_test``, ``y_test``.
"""

from __future__ import annotations

import torch
from benchmarks.training.protocol import Source, Task, register_task

from esper.runs.presets.vision import Vision


def make(source: Source) -> Vision:
    return Vision(torch.device(source.device), size=source.size, data=source.file("cifar10.npz"))


register_task(Task(name="cifar10", title="CIFAR-10, small residual net", make=make))
