"""The presets' host networks. Plain PyTorch: an export carries this file along, and needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear-ReLU layers of the given inner ``widths``."""

    def __init__(self, in_features: int, widths: Sequence[int], num_classes: int) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(in_features, width), nn.ReLU()]
            in_features = width
        super().__init__(*layers, nn.Linear(in_features, num_classes))


class FeedForward(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, dim: int, num_heads: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = FeedForward(dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.norm2(x))


class ByteTransformer(nn.Module):
    """Byte-level language model; ``widths`` are the blocks' inner widths. Input and output: ``(B, T)`` int64 bytes,
    ``(B, T, 256)`` logits."""

    def __init__(self, widths: Sequence[int], *, dim: int, num_heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, width) for width in widths)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * len(widths)) if residual else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResidualBlock(nn.Module):
    """conv1-norm-relu-conv2 beside a shortcut; ``width`` is what conv1 puts out."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Small residual net on ``(B, C, H, W)`` images: two blocks a stage, ``widths`` are the blocks' inner channels."""

    def __init__(self, widths: Sequence[int], *, trunk: Sequence[int], in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, trunk[0], 3, 1, 1, bias=False), nn.BatchNorm2d(trunk[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        channels = trunk[0]
        for number, width in enumerate(widths):
            out_channels = trunk[number // 2]
            stride = 2 if number % 2 == 0 and number > 0 else 1
            blocks.append(ResidualBlock(channels, out_channels, stride, width))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def build(spec: dict[str, object]) -> nn.Module:
    """The host that a run's ``structure.json`` describes."""
    kinds = {"mlp": MLP, "byte_transformer": ByteTransformer, "resnet": ResNet}
    arguments = {key: value for key, value in spec.items() if key != "kind"}
    return kinds[str(spec["kind"])](**arguments)  # type: ignore[reportArgumentType]


def widen(model: nn.Module, layers: dict[str, dict[str, int]]) -> nn.Module:
    """Give the named layers their grown sizes (fresh weights: load a state_dict afterwards)."""
    for name, sizes in layers.items():
        old = model.get_submodule(name)
        new: nn.Module
        if isinstance(old, nn.Linear):
            biased = getattr(old, "bias", None) is not None  # torch annotates it as always there
            new = nn.Linear(sizes["in_features"], sizes["out_features"], bias=biased)
        elif isinstance(old, nn.Conv2d):
            new = nn.Conv2d(
                sizes["in_channels"],
                sizes["out_channels"],
                old.kernel_size,  # type: ignore[reportArgumentType]
                old.stride,  # type: ignore[reportArgumentType]
                old.padding,  # type: ignore[reportArgumentType]
                old.dilation,  # type: ignore[reportArgumentType]
                bias=old.bias is not None,
            )
        elif isinstance(old, nn.BatchNorm2d):
            new = nn.BatchNorm2d(sizes["num_features"], old.eps, old.momentum, old.affine)
        else:
            raise TypeError(f"{name} is a {type(old).__name__}, which never grows")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.to(next(old.parameters()).dtype))
    return model


__all__ = ["MLP", "ByteTransformer", "ResNet", "build", "widen"]
