"""Small hosts that tests attach to, and the loop that trains them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.kasmina.cohort import Cohort
from esper.protocol import AnyEvent, Command, Germinate, Lifecycle, Observation, SeedPlan

Batch = tuple[Tensor, Tensor]

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
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.gelu(self.up(self.norm(x))), self.dropout, self.training)
        return x + self.down(h)


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
    return [
        (torch.randn(size, 3, 5, 5, generator=source), torch.randn(size, 4, generator=source)) for _ in range(num)
    ]


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


MLP = Task("mlp", Mlp, rows)
DROPOUT_MLP = Task("mlp-dropout", lambda: Mlp(dropout=0.3), rows)
CONV = Task("conv", ResNet, images)
TRANSFORMER = Task("transformer", lambda: Transformer(dropout=0.2), tokens)
TASKS = (MLP, DROPOUT_MLP, CONV, TRANSFORMER)


# ----------------------------------------------------------------------------------------------------------------------
# Growers


class Idle:
    """A controller that does nothing: tests submit their own commands."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class Rig:
    """A host under a grower, with a loop in the order that the documentation shows."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    grower: esper.Grower
    batches: list[Batch]
    events: list[AnyEvent] = field(default_factory=list)
    turn: int = 0

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            loss = mse(self.model, self.batches[self.turn % len(self.batches)])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.grower.step(loss)
            self.turn += 1

    def backward(self) -> Tensor:
        """One forward and backward on the first batch; gradients stay."""
        self.optimizer.zero_grad()
        loss = mse(self.model, self.batches[0])
        loss.backward()
        return loss

    def order(self, command: Command) -> None:
        """Submit a command and take the step in which it is judged."""
        self.grower.submit(command)
        self.train()

    def germinate(self, *sites: str, start: str = "random_zero", width: int = 3, **plan: Any) -> Cohort:
        names = sites or tuple(info.name for info in self.grower.sites())
        seeds = tuple(SeedPlan(site=name, start=start, width=width, **plan) for name in names)
        self.order(Germinate(seeds=seeds))
        refusals = [event for event in self.events if type(event).__name__ == "Refused"]
        assert self.grower.kasmina.cohorts, refusals[-1:]
        return list(self.grower.kasmina.cohorts.values())[-1]

    def until(self, cohort: Cohort, state: Lifecycle, limit: int = 300) -> Cohort:
        for _ in range(limit):
            if cohort.state is state:
                return cohort
            self.train()
        raise AssertionError(f"{state.name} was not reached in {limit} steps, it is {cohort.state.name}")

    def bank(self, cohort: Cohort, site: str | None = None) -> Any:
        return self.grower.kasmina.sites[site or cohort.sites[0]].banks[cohort.number]

    def refused(self) -> list[Any]:
        return [event for event in self.events if type(event).__name__ == "Refused"]


QUICK = {
    "capture": esper.CaptureConfig(batches=4, rows=640),
    "fit": esper.FitConfig(steps=10, batch_rows=32, min_t=-1e9),
    "graft": esper.GraftConfig(
        ramp_steps=4, timeout=40, stabilize_steps=3, stabilize_window=8, fine_tune_steps=5, cull_steps=4,
        warmup_steps=1, embargo=20,
    ),
    "telemetry": esper.TelemetryConfig(every=3),
    "interval": 5,
}  # fmt: skip
"""Settings under which a whole life takes some thirty steps."""


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    batches: list[Batch] | None = None,
    held_out: Iterable[Batch] | None = None,
    loss: Callable[..., Tensor] = mse,
    track: Sequence[Any] = (),
    controller: Any = None,
    **settings: Any,
) -> Rig:
    """A rig with quick settings and an idle controller; ``settings`` are those of ``Config``."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 3e-3)
    events: list[AnyEvent] = []
    grower = esper.Grower(
        model,
        optimizer,
        loss=loss,
        evaluate=rows(12, seed=7) if held_out is None else held_out,
        track=track,
        config=esper.Config(**{**QUICK, **settings}),
        controller=controller or Idle(),
        on_event=events.append,
    )
    return Rig(model, optimizer, grower, rows(10) if batches is None else batches, events)


# ----------------------------------------------------------------------------------------------------------------------
# The same training with and without a grower


@dataclass
class Trajectory:
    """Everything a run leaves behind that Esper must not touch."""

    losses: list[Tensor]
    outputs: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    moments: list[Tensor]
    random: tuple[float, float, float]
    """The next draw of Python's, NumPy's and torch's global streams."""

    def assert_equals(self, other: Trajectory) -> None:
        assert_same_state({str(i): v for i, v in enumerate(self.losses)}, dict(_numbered(other.losses)))
        assert same_bits(self.outputs, other.outputs)
        assert_same_state(self.gradients, other.gradients)
        assert_same_state(self.state, other.state)
        assert_same_state(dict(_numbered(self.moments)), dict(_numbered(other.moments)))
        assert self.random == other.random


def _numbered(values: Iterable[Tensor]) -> Iterable[tuple[str, Tensor]]:
    return ((str(i), value) for i, value in enumerate(values))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3, nesterov=True)


def trajectory(
    task: Task,
    steps: int,
    join: Callable[[nn.Module, torch.optim.Optimizer, Task], Rig] | None = None,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    bf16: bool = False,
    clip: float | None = None,
    each: Callable[[Rig, int], None] | None = None,
) -> Trajectory:
    """Train from the same seeds; ``join`` attaches a grower, ``each`` is called after each step of it."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    model = task.build()
    batches = task.batches(10)
    stepper = optimizer(model)
    rig = None if join is None else join(model, stepper, task)
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        x, wanted = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = (model(x + 0.1 * torch.randn_like(x) if x.is_floating_point() else x) - wanted).square().mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.detach())
        if rig is not None:
            rig.grower.step(loss)
            if each is not None:
                each(rig, step)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = model(batches[0][0])
    moments = [v for entry in stepper.state.values() for v in entry.values() if isinstance(v, Tensor)]
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    return Trajectory(losses, outputs, gradients, snapshot(model), moments, drawn)


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
