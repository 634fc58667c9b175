"""Small hosts with one span of each kind, as the models that people train write them, and data made by a wider one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tests.models import Batch, Pair
from torch import Tensor, nn


class Conv1D(nn.Module):
    """GPT-2's layer as ``transformers`` writes it: a Linear layer with its weight as (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Gpt2Mlp(nn.Module):
    """GPT-2's feed-forward part."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(hidden, 8), Conv1D(4, hidden)
        self.dropout = nn.Dropout(0.0)
        for layer in (self.c_fc, self.c_proj):  # with GPT-2's 0.02 so few units hardly do anything
            nn.init.normal_(layer.weight, std=layer.nx**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class GatedFfn(nn.Module):
    """LLaMA's feed-forward part: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, hidden: int = 6, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, hidden, bias=bias), nn.Linear(8, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FusedGatedFfn(nn.Module):
    """A GeGLU whose gate is the second half of one layer's output."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(8, 2 * hidden), nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(h * F.gelu(gate))


_LAYERS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


class ConvNet(nn.Module):
    """conv, norm, ReLU, conv in 1, 2 or 3 dimensions; pooled."""

    def __init__(self, dims: int, hidden: int = 5) -> None:
        super().__init__()
        conv, norm = _LAYERS[dims]
        self.conv1, self.norm = conv(3, hidden, 3, padding=1, bias=False), norm(hidden)
        self.conv2 = conv(hidden, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(F.relu(self.norm(self.conv1(x)))).flatten(2).mean(2))


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions, with one in-place ReLU for everything."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, hidden, 3, stride, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class BottleneckBlock(nn.Module):
    """ResNet's block of a 1x1, a 3x3 and a 1x1 convolution: two chained spans."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, stride, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResidualNet(nn.Module):
    """A stem and two blocks, the second with a stride and a projection on its skip path."""

    def __init__(self, block: type[BasicBlock | BottleneckBlock], hidden: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(block(6, hidden, 6, 1), block(6, hidden, 8, 2))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# Data


@dataclass(frozen=True)
class SpanHost:
    """A host of any hidden width, what it reads, its spans and the width that its seeds get in a test."""

    name: str
    build: Callable[[int], nn.Module]
    x_shape: tuple[int, ...]
    spans: tuple[str, ...]
    kind: str
    blueprint: str

    def batches(self, num: int, *, seed: int, size: int = 48, hidden: int = 12) -> list[Batch]:
        """Batches whose targets a host of ``hidden`` units made, in training mode as the student runs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1234)
            teacher = self.build(hidden)
            for value in teacher.parameters():
                if value.dim() > 1:
                    value.data.mul_(2.0)
        source = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(size, *self.x_shape, generator=source) for _ in range(num)]
        with torch.no_grad():
            made = [(x, teacher(x)) for x in drawn]
            every = torch.cat([y.flatten(0, -2) for _, y in made])
            mean, spread = every.mean(0), every.std(0)
        return [(x, (y - mean) / spread) for x, y in made]


LINEAR = SpanHost("linear", Pair, (8,), ("fc1-fc2",), "linear_span", "bottleneck")
GPT2 = SpanHost("gpt2", Gpt2Mlp, (5, 8), ("c_fc-c_proj",), "linear_span", "bottleneck")
GATED = SpanHost("gated", GatedFfn, (8,), ("gate_proj-down_proj",), "linear_gated_span", "gated")
FUSED = SpanHost("fused", FusedGatedFfn, (3, 8), ("proj-out",), "linear_gated_span", "gated")
CONV_1D = SpanHost("conv1d", lambda h: ConvNet(1, h), (3, 8), ("conv1-conv2",), "conv_span", "bottleneck_conv")
CONV_3D = SpanHost("conv3d", lambda h: ConvNet(3, h), (3, 4, 4, 4), ("conv1-conv2",), "conv_span", "bottleneck_conv")
BASIC = SpanHost(
    "basic-block", lambda h: ResidualNet(BasicBlock, h), (3, 6, 6),
    ("blocks.0.conv1-conv2", "blocks.1.conv1-conv2"), "conv_span", "bottleneck_conv",
)  # fmt: skip
BOTTLENECK = SpanHost(
    "bottleneck-block", lambda h: ResidualNet(BottleneckBlock, h), (3, 6, 6),
    ("blocks.0.conv1-conv2", "blocks.0.conv2-conv3", "blocks.1.conv1-conv2", "blocks.1.conv2-conv3"), "conv_span",
    "bottleneck_conv",
)  # fmt: skip
SPAN_HOSTS = (LINEAR, GPT2, GATED, FUSED, CONV_1D, CONV_3D, BASIC, BOTTLENECK)
