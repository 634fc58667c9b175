"""``teacher_student`` and ``teacher_student_constant``: regression on what a random network of known size computes.

Each seed has a teacher of its own: 16 inputs, two hidden layers of 32 ReLU units, one output, no noise. The second task
differs in its learning rate, which stays where it is instead of falling to zero.
"""

from __future__ import annotations

import torch
from benchmarks.training.protocol import Source, Task, register_task
from benchmarks.training.rows import Rows, Split
from torch import Tensor, nn

INPUTS, WIDTH = 16, 32
NUM_TRAIN, NUM_HELD, NUM_TEST = 16_384, 2_048, 8_192


class TeacherStudent(Rows):
    name = "teacher_student"
    lrs = (3e-3, 1e-2, 3e-2)
    judge = 16


class TeacherStudentConstant(TeacherStudent):
    name = "teacher_student_constant"

    def schedule(self, progress: float) -> float:
        return 1.0


def teacher_data(seed: int) -> dict[str, Split]:
    """Splits of one teacher; all drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(9_000 + seed)

    def layer(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (2 / columns) ** 0.5

    hidden, middle, out = layer(WIDTH, INPUTS), layer(WIDTH, WIDTH), layer(1, WIDTH)
    shift, second_shift = (torch.randn(WIDTH, generator=generator) * 0.5 for _ in range(2))

    def split(num: int) -> Split:
        x = torch.randn(num, INPUTS, generator=generator)
        inner = nn.functional.relu(x @ hidden.T + shift)
        return x, (nn.functional.relu(inner @ middle.T + second_shift) @ out.T).squeeze(1)

    return {"train": split(NUM_TRAIN), "held": split(NUM_HELD), "test": split(NUM_TEST)}


def make(source: Source) -> TeacherStudent:
    return TeacherStudent(torch.device(source.device), **teacher_data(source.seed))


def make_constant(source: Source) -> TeacherStudentConstant:
    return TeacherStudentConstant(torch.device(source.device), **teacher_data(source.seed))


register_task(Task(name="teacher_student", title="Teacher-student MLP, cosine schedule", make=make, per_seed=True))
register_task(
    Task(
        name="teacher_student_constant",
        title="Teacher-student MLP, constant learning rate",
        make=make_constant,
        per_seed=True,
    )
)
