"""``fashion_mnist``: a plain convolutional net of a quarter of its inner channels.

The data folder holds ``fashion_mnist.npz`` with uint8 ``x_train (N, 28, 28)``, ``y_train``, ``x_test``, ``y_test``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from benchmarks.training.protocol import Source, Task, register_task
from torch import Tensor, nn

from esper.runs.presets.vision import Vision

SMALL = {"gpu": (16, 32), "cpu": (4, 8)}
OUT = {"gpu": 128, "cpu": 32}


class ConvNet(nn.Module):
    """conv-norm-relu three times, the last two with stride 2, then the mean over positions and a linear layer.

    ``widths`` are the channels of the first two convolutions; input ``(B, 1, H, W)``, output ``(B, num_classes)``.
    """

    def __init__(self, widths: Sequence[int], *, out_channels: int, num_classes: int) -> None:
        super().__init__()
        first, second = widths
        self.conv0 = nn.Conv2d(1, first, 3, 1, 1, bias=False)
        self.norm0 = nn.BatchNorm2d(first)
        self.conv1 = nn.Conv2d(first, second, 3, 2, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(second)
        self.conv2 = nn.Conv2d(second, out_channels, 3, 2, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(out_channels, num_classes)
        for conv in (self.conv0, self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.conv0(x)))
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return self.classifier(x.mean(dim=(2, 3)))


class FashionMnist(Vision):
    name = "fashion_mnist"

    def __init__(self, source: Source) -> None:
        super().__init__(torch.device(source.device), size=source.size, data=source.file("fashion_mnist.npz"))
        self.small_widths = SMALL[source.size]
        self.out_channels = OUT[source.size]

    def spec(self, widths: Sequence[int]) -> dict[str, Any]:
        return {"widths": list(widths), "out_channels": self.out_channels, "num_classes": self.num_classes}

    def host(self, widths: Sequence[int]) -> nn.Module:
        return ConvNet(**self.spec(widths))


register_task(Task(name="fashion_mnist", title="Fashion-MNIST, convolutional net", make=FashionMnist))
