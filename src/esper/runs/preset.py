"""What a preset offers: data with its own splits, a host of any inner widths, an optimizer and a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.config import Config
from esper.runs.hosts import build


class Preset(ABC):
    """One task. Batches are a pure function of seed and step, so a run can be rewound and arms are paired."""

    name: str
    score_name: str
    steps: int
    lrs: tuple[float, ...]
    seeds: int
    held_out_every: int = 100
    small_widths: tuple[int, ...]
    """Inner widths of the spans of the undersized host, in the order in which sites are found."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def spec(self, widths: Sequence[int]) -> dict[str, Any]:
        """Arguments of :func:`esper.runs.hosts.build`: the host with these inner widths."""

    def host(self, widths: Sequence[int]) -> nn.Module:
        """A fresh host on the CPU, its weights drawn from the global stream."""
        return build(self.spec(widths))

    @abstractmethod
    def train_batch(self, seed: int, step: int) -> Any: ...

    @abstractmethod
    def held_out(self) -> list[Any]:
        """Small batches for judging; never trained on, never scored."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    @abstractmethod
    def test(self, model: nn.Module) -> tuple[float, float]:
        """``(score, loss)`` on the test split; called once, at the end."""

    @abstractmethod
    def optimizer(self, model: nn.Module, lr: float) -> Optimizer: ...

    @abstractmethod
    def schedule(self, progress: float) -> float:
        """Learning rate factor at ``progress`` in [0, 1)."""

    @abstractmethod
    def config(self, steps: int) -> Config:
        """Esper's settings for this task."""

    def clip(self, model: nn.Module) -> None:  # noqa: B027  (most recipes clip nothing)
        """Gradient clipping, if the recipe has any."""

    def describe_widths(self, widths: Sequence[int]) -> dict[str, int]:
        return {f"span {number}": int(width) for number, width in enumerate(widths)}


def batch_generator(seed: int, step: int) -> torch.Generator:
    """A CPU generator for one batch of one run; independent of every other stream."""
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
