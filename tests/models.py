"""Small hosts that tests attach to, and the loop that trains them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = tuple[Tensor, Tensor]

DEVICE = torch.device(os.environ.get("ESPER_TEST_DEVICE", "cpu"))
"""Where the hosts of `TASKS` live and `trajectory` trains them."""

# ----------------------------------------------------------------------------------------------------------------------
# Hosts


class Mlp(nn.Module):
    """Three Linear layers: two chained spans, fc1-fc2 and fc2-fc3."""

    def __init__(self, hidden: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, hidden), nn.Linear(hidden, 12), nn.Linear(12, 4)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.drop(F.relu(self.fc2(self.drop(F.relu(self.fc1(x)))))))


class Pair(nn.Module):
    """The smallest host: one span."""

    def __init__(self, hidden: int = 6, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, hidden), nn.Linear(hidden, 4)
        self.act = act or nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvBlock(nn.Module):
    """A residual block: conv, norm, activation, conv, norm."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.norm2(self.conv2(self.act(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(ConvBlock(6, 5), ConvBlock(6, 5))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)), inplace=True)).mean((2, 3)))


class Ffn(nn.Module):
    """A transformer's feed-forward part, with a functional activation."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.out_norm = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.gelu(self.up(self.norm(x))), self.dropout, self.training)
        return self.out_norm(x + self.down(h))


class Transformer(nn.Module):
    """Embedding, attention and feed-forward blocks; ``recompute`` checkpoints each feed-forward part."""

    def __init__(self, dropout: float = 0.0, recompute: str | None = None, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.attention = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(depth))
        self.ffn = nn.ModuleList(Ffn(8, dropout) for _ in range(depth))
        self.head = nn.Linear(8, 16)
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            x = x + attention(x, x, x, need_weights=False)[0]
            if self.recompute is None or not self.training:
                x = ffn(x)
            else:
                x = checkpoint(ffn, x, use_reentrant=self.recompute == "reentrant")
        return self.head(x)


# ----------------------------------------------------------------------------------------------------------------------
# Data and losses


def rows(num: int, seed: int = 1, size: int = 16) -> list[Batch]:
    """Batches of a small regression: a network of 16 hidden units made the targets, a narrow one cannot."""
    teacher, source = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    inner, outer = torch.randn(8, 16, generator=teacher), torch.randn(16, 4, generator=teacher)
    drawn = [torch.randn(size, 8, generator=source) for _ in range(num)]
    return [(x, F.relu(x @ inner) @ outer / 8) for x in drawn]


def images(num: int, seed: int = 1, size: int = 6) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 5, 5, generator=source), torch.randn(size, 4, generator=source)) for _ in range(num)]


def tokens(num: int, seed: int = 1, size: int = 4) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(16, (size, 7), generator=source) for _ in range(num)]
    return [(t[:, :-1], F.one_hot(t[:, 1:], 16).float()) for t in drawn]


def mse(model: nn.Module, batch: Batch) -> Tensor:
    x, wanted = batch
    return (model(x) - wanted).square().mean()


@dataclass(frozen=True)
class Task:
    """A host, its data, and how it is called in a test's name."""

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[..., list[Batch]]

    def __str__(self) -> str:
        return self.name


def _placed(build: Callable[..., nn.Module], **arguments: float) -> Callable[[], nn.Module]:
    return lambda: build(**arguments).to(DEVICE)


def _fed(batches: Callable[..., list[Batch]]) -> Callable[..., list[Batch]]:
    return lambda *args, **kwargs: [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(*args, **kwargs)]


MLP = Task("mlp", _placed(Mlp), _fed(rows))
DROPOUT_MLP = Task("mlp-dropout", _placed(Mlp, dropout=0.3), _fed(rows))
CONV = Task("conv", _placed(ResNet), _fed(images))
TRANSFORMER = Task("transformer", _placed(Transformer, dropout=0.2), _fed(tokens))
TASKS = (MLP, DROPOUT_MLP, CONV, TRANSFORMER)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Equal bit for bit: NaN equals NaN of the same bits, and 0.0 is not -0.0."""
    assert list(one) == list(two)
    for name, value in one.items():
        assert same_bits(value, two[name]), f"{name} differs by {float((value - two[name]).abs().max())}"


def same_bits(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8))
