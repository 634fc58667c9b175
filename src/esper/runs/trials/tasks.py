"""Small hosts with data of their own, each drawn from a number: what trials and the soak train.

A task is one file section: a function from a generator and the rows of a gate batch to a :class:`Task`, entered in
:data:`TASKS`. Everything about it (data, noise, widths) follows from the generator.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.runs.hosts import MLP, Block

BATCH_ROWS = 32
TRAIN_ROWS = 512
AUDIT_ROWS = 4096
AUDIT_BATCH = 64
GATE_BATCHES = 56
"""Held-out batches of a few rows; half of them judge."""

Rows = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Rows], Tensor]
Make = Callable[[torch.Generator, int], "Task"]


@dataclass
class Task:
    """A host with data in three disjoint parts.

    ``build(scale)`` makes the host with its inner widths times ``scale``, its weights from the global stream. ``noise``
    is the standard deviation added to targets, or the share of labels that are wrong.
    """

    name: str
    family: str
    """mlp, conv or transformer."""
    build: Callable[[int], nn.Module]
    loss: Loss
    width: int
    noise: float
    train: Rows
    gate: list[Rows]
    audit: list[Rows]

    def batch(self, choose: torch.Generator) -> Rows:
        """A training batch drawn from ``choose`` (on the CPU)."""
        x, y = self.train
        rows = torch.randint(len(x), (BATCH_ROWS,), generator=choose).to(x.device)
        return x[rows], y[rows]

    def to(self, device: torch.device) -> Task:
        """The same with its data on a device."""
        moved = copy.copy(self)
        moved.train = _moved(self.train, device)
        moved.gate = [_moved(batch, device) for batch in self.gate]
        moved.audit = [_moved(batch, device) for batch in self.audit]
        return moved


def _moved(rows: Rows, device: torch.device) -> Rows:
    return rows[0].to(device), rows[1].to(device)


def task_name(number: int) -> str:
    """The kind of task of trial ``number``: they take turns."""
    return list(TASKS)[number % len(TASKS)]


def make_task(name: str, choose: torch.Generator, gate_rows: int | None = None) -> Task:
    """A task of a kind; everything else about it is drawn, ``gate_rows`` unless it is given."""
    drawn = (4, 8, 16)[pick(choose, 3)]
    return TASKS[name](choose, gate_rows or drawn)


def pick(choose: torch.Generator, num: int) -> int:
    """A draw from ``range(num)``."""
    return int(torch.randint(num, (), generator=choose))


def num_rows(gate_rows: int) -> int:
    """Rows of all three parts together."""
    return TRAIN_ROWS + GATE_BATCHES * gate_rows + AUDIT_ROWS


def squared(model: nn.Module, batch: Rows) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(model(batch[0]), batch[1])


def entropy(model: nn.Module, batch: Rows) -> Tensor:
    """Cross entropy over the last axis of the logits, all positions alike."""
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def split(rows: Rows, gate_rows: int) -> tuple[Rows, list[Rows], list[Rows]]:
    """``(train, gate, audit)``, disjoint."""
    first, second = TRAIN_ROWS, TRAIN_ROWS + GATE_BATCHES * gate_rows
    x, y = rows
    return (
        (x[:first], y[:first]),
        list(zip(x[first:second].split(gate_rows), y[first:second].split(gate_rows), strict=True)),
        list(zip(x[second:].split(AUDIT_BATCH), y[second:].split(AUDIT_BATCH), strict=True)),
    )


def flipped(labels: Tensor, classes: int, share: float, choose: torch.Generator) -> Tensor:
    """Labels of which ``share`` are drawn anew."""
    wrong = torch.rand(labels.shape, generator=choose) < share
    return torch.where(wrong, torch.randint(classes, labels.shape, generator=choose), labels)


def _mlp(inputs: int, outputs: int, width: int, depth: int) -> Callable[[int], nn.Module]:
    return lambda scale: MLP(inputs, [scale * width] * depth, outputs)


# ----------------------------------------------------------------------------------------------------------------------
# MLPs


def teacher_student(choose: torch.Generator, gate_rows: int) -> Task:
    """Outputs of a wider tanh network, with noise."""
    x = torch.randn(num_rows(gate_rows), 8, generator=choose)
    inner = torch.randn(8, 16, generator=choose) / 8**0.5 * 1.5
    noise = (0.1, 0.3, 0.6)[pick(choose, 3)]
    y = torch.tanh(x @ inner) @ torch.randn(16, 3, generator=choose) / 4
    y = y + noise * torch.randn(y.shape, generator=choose)
    width, depth = 2 + pick(choose, 4), 1 + pick(choose, 2)
    return Task(
        "teacher-student", "mlp", _mlp(8, 3, width, depth), squared, width, noise, *split((x, y), gate_rows)
    )  # fmt: skip


def spirals(choose: torch.Generator, gate_rows: int) -> Task:
    """Two spiral arms to be told apart."""
    label = torch.randint(2, (num_rows(gate_rows),), generator=choose)
    radius = torch.rand(len(label), generator=choose).sqrt()
    angle = 7.0 * radius + math.pi * label
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], 1) * 2
    x = x + 0.1 * torch.randn(x.shape, generator=choose)
    noise = (0.0, 0.1, 0.2)[pick(choose, 3)]
    width = 3 + pick(choose, 4)
    rows = x, flipped(label, 2, noise, choose)
    return Task("spirals", "mlp", _mlp(2, 2, width, 2), entropy, width, noise, *split(rows, gate_rows))


def mixture(choose: torch.Generator, gate_rows: int) -> Task:
    """Five classes of three Gaussian clumps each, in eight dimensions, with wrong labels."""
    centres = 1.5 * torch.randn(15, 8, generator=choose)
    clump = torch.randint(15, (num_rows(gate_rows),), generator=choose)
    x = centres[clump] + torch.randn(len(clump), 8, generator=choose)
    noise = (0.05, 0.15, 0.3)[pick(choose, 3)]
    width, depth = 3 + pick(choose, 4), 1 + pick(choose, 2)
    rows = x, flipped(clump % 5, 5, noise, choose)
    return Task("mixture", "mlp", _mlp(8, 5, width, depth), entropy, width, noise, *split(rows, gate_rows))


def friedman(choose: torch.Generator, gate_rows: int) -> Task:
    """Friedman's first regression problem (Annals of Statistics 19, 1991), standardised: 5 inputs of 10 matter."""
    x = torch.rand(num_rows(gate_rows), 10, generator=choose)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    noise = (0.1, 0.3, 0.6)[pick(choose, 3)]
    y = (y - 14.4) / 4.9 + noise * torch.randn(len(y), generator=choose)
    width, depth = 2 + pick(choose, 4), 1 + pick(choose, 2)
    rows = 2 * x - 1, y[:, None]
    return Task("friedman", "mlp", _mlp(10, 1, width, depth), squared, width, noise, *split(rows, gate_rows))


# ----------------------------------------------------------------------------------------------------------------------
# Images


def _glyphs(choose: torch.Generator, gate_rows: int, noise: float) -> Rows:
    """Ten made-up signs, three strokes on 8 x 8 pixels each, shifted by up to a pixel, with grey noise."""
    signs = torch.zeros(10, 8, 8)
    for sign in signs:
        for _ in range(3):
            row, column = 1 + pick(choose, 6), 1 + pick(choose, 6)
            if pick(choose, 2):
                sign[row, max(0, column - 3) : column + 2] = 1.0
            else:
                sign[max(0, row - 3) : row + 2, column] = 1.0
    label = torch.randint(10, (num_rows(gate_rows),), generator=choose)
    x = signs[label]
    for shift, axis in ((-1, 1), (1, 1), (-1, 2), (1, 2)):
        moved = torch.rand(len(x), generator=choose) < 0.2
        x = torch.where(moved[:, None, None], x.roll(shift, axis), x)
    x = 2 * x - 1 + 0.7 * torch.randn(x.shape, generator=choose)
    return x, flipped(label, 10, noise, choose)


def glyphs(choose: torch.Generator, gate_rows: int) -> Task:
    """Signs for an MLP."""
    noise = (0.05, 0.15)[pick(choose, 2)]
    x, y = _glyphs(choose, gate_rows, noise)
    width, depth = 3 + pick(choose, 4), 1 + pick(choose, 2)
    rows = x.flatten(1), y
    return Task("glyphs", "mlp", _mlp(64, 10, width, depth), entropy, width, noise, *split(rows, gate_rows))


def glyph_images(choose: torch.Generator, gate_rows: int) -> Task:
    """Signs for a small conv net, with and without batch norm."""
    noise = (0.05, 0.15)[pick(choose, 2)]
    x, y = _glyphs(choose, gate_rows, noise)
    width, normed = 1 + pick(choose, 2), bool(pick(choose, 2))

    def build(scale: int) -> nn.Module:
        inner = scale * width
        norm: list[nn.Module] = [nn.BatchNorm2d(inner)] if normed else []
        return nn.Sequential(
            nn.Conv2d(1, inner, 3, padding=1, stride=2), *norm, nn.ReLU(), nn.Conv2d(inner, 6, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 10),
        )  # fmt: skip

    return Task("glyph images", "conv", build, entropy, width, noise, *split((x[:, None], y), gate_rows))


# ----------------------------------------------------------------------------------------------------------------------
# Sequences

_SYMBOLS, _LENGTH, _DIM = 12, 8, 12


class SequenceHost(nn.Module):
    """One transformer block over symbols: ``(B, T)`` int64 in, ``(B, T, classes)`` logits out."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(_SYMBOLS, _DIM)
        self.positions = nn.Embedding(_LENGTH, _DIM)
        self.block = Block(_DIM, 2, width)
        self.norm = nn.LayerNorm(_DIM)
        self.head = nn.Linear(_DIM, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block(self.symbols(x) + self.positions.weight)))


def sequences(choose: torch.Generator, gate_rows: int) -> Task:
    """A random table tells each position's class from its symbol and the one before: attention, then a lookup."""
    classes = 4
    table = torch.randint(classes, (_SYMBOLS, _SYMBOLS), generator=choose)
    x = torch.randint(_SYMBOLS, (num_rows(gate_rows), _LENGTH), generator=choose)
    before = torch.cat([x[:, :1], x[:, :-1]], 1)
    noise = (0.0, 0.1)[pick(choose, 2)]
    width = 1 + pick(choose, 3)
    rows = x, flipped(table[x, before], classes, noise, choose)
    return Task(
        "sequences", "transformer", lambda scale: SequenceHost(scale * width, classes), entropy, width, noise,
        *split(rows, gate_rows),
    )  # fmt: skip


TASKS: dict[str, Make] = {
    "teacher-student": teacher_student,
    "spirals": spirals,
    "mixture": mixture,
    "glyph images": glyph_images,
    "friedman": friedman,
    "glyphs": glyphs,
    "sequences": sequences,
}
MLP_TASKS = ("teacher-student", "spirals", "mixture", "friedman", "glyphs")
"""Those whose host is an MLP of equal inner widths."""
