"""Models that are trained with and without Esper: GPT-2's smallest shape, and the small hosts of ``esper run``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.config import SitesConfig
from esper.runs.hosts import MLP, ResNet

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, as in GPT-2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Token ids ``(B, T)`` to logits ``(B, T, V)``; the head shares the embedding's weight."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(shape.symbols, shape.dim), nn.Embedding(shape.context, shape.dim)
        self.blocks = nn.ModuleList(Block(shape.dim, shape.dim // 64) for _ in range(shape.blocks))
        self.norm, self.head = nn.LayerNorm(shape.dim), nn.Linear(shape.dim, shape.symbols, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Shape:
    """Of a transformer and its batches."""

    dim: int = 768
    blocks: int = 12
    symbols: int = 50_304
    context: int = 1024
    batch: int = 16


class Chain(nn.Sequential):
    """Many narrow layers in a row: what does one more site cost?"""

    def __init__(self, width: int, num_sites: int) -> None:
        layers: list[nn.Module] = [nn.Linear(width, width)]
        for _ in range(num_sites):
            layers += [nn.GELU(), nn.Linear(width, width)]
        super().__init__(*layers)


@dataclass(frozen=True)
class Host:
    """A model, its data (``batch(scale)``), and how it is trained."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[bool], Batch]
    """Takes whether the batch is for training (full size) or for evaluation (small)."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    loss: Callable[[nn.Module, Batch], Tensor]
    sites: SitesConfig
    compiled: bool = False


def _classify(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def gpt2(device: torch.device, *, shape: Shape | None = None, compiled: bool = True) -> Host:
    """bf16 autocast, fused AdamW, every Linear layer and every span of the blocks a site."""
    given = shape or Shape()

    def batch(full: bool) -> Batch:
        ids = torch.randint(given.symbols, (given.batch if full else 1, given.context + 1), device=device)
        return ids[:, :-1], ids[:, 1:]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return _classify(model, batch)

    return Host(
        "gpt2", lambda: GPT2(given).to(device), batch,
        lambda model: torch.optim.AdamW(model.parameters(), 1e-4, fused=True), loss,
        SitesConfig(include=("blocks.*",), exclude=("*norm*",), layers=True, chunks="feature"), compiled=compiled,
    )  # fmt: skip


def digits(device: torch.device) -> Host:
    """The host of the preset ``digits``: 64 pixels, two layers of 8, batches of 64."""

    def batch(full: bool) -> Batch:
        size = 64 if full else 5
        return torch.randn(size, 64, device=device), torch.randint(10, (size,), device=device)

    return Host(
        "digits", lambda: MLP(64, [8, 8], 10).to(device), batch,
        lambda model: torch.optim.AdamW(model.parameters(), 3e-3), _classify, SitesConfig(),
    )  # fmt: skip


def mlp(device: torch.device) -> Host:
    """A digits MLP of the usual size: 64 pixels, two layers of 512, batches of 256."""

    def batch(full: bool) -> Batch:
        size = 256 if full else 16
        return torch.randn(size, 64, device=device), torch.randint(10, (size,), device=device)

    return Host(
        "mlp", lambda: MLP(64, [512, 512], 10).to(device), batch,
        lambda model: torch.optim.AdamW(model.parameters(), 1e-3), _classify, SitesConfig(),
    )  # fmt: skip


def resnet(device: torch.device) -> Host:
    """A small ResNet on 32 x 32 images, batches of 32, SGD."""

    def batch(full: bool) -> Batch:
        size = 32 if full else 2
        return torch.randn(size, 3, 32, 32, device=device), torch.randint(10, (size,), device=device)

    return Host(
        "resnet",
        lambda: ResNet([4, 4, 8, 8, 16, 16], trunk=[16, 32, 64], in_channels=3, num_classes=10).to(device), batch,
        lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), _classify, SitesConfig(),
    )  # fmt: skip


def chain(device: torch.device, num_sites: int, *, width: int = 64, rows: int = 256) -> Host:
    """``num_sites`` spans one after the other."""

    def batch(full: bool) -> Batch:
        return torch.randn(rows if full else 8, width, device=device), torch.zeros(0)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).square().mean()

    return Host(
        f"chain-{num_sites}", lambda: Chain(width, num_sites).to(device), batch,
        lambda model: torch.optim.SGD(model.parameters(), 1e-4), loss, SitesConfig(),
    )  # fmt: skip
