"""``mnist1d``: 40-point signals of ten shapes (Greydanus and Kobak, 2020), an undersized MLP.

The data folder holds ``mnist1d.npz`` with ``x_train (4000, 40)``, ``y_train``, ``x_test (1000, 40)``, ``y_test``.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.training.protocol import Source, Task, register_task
from benchmarks.training.rows import Rows, parts

HELD = 1000


class Mnist1D(Rows):
    name = "mnist1d"
    lrs = (1e-3, 2e-3, 4e-3)


def make(source: Source) -> Mnist1D:
    with np.load(source.file("mnist1d.npz"), allow_pickle=False) as archive:
        x, y, test_x, test_y = (torch.tensor(archive[key]) for key in ("x_train", "y_train", "x_test", "y_test"))
    train, held = parts(x.float(), y.long(), HELD, seed=0)
    return Mnist1D(torch.device(source.device), train=train, held=held, test=(test_x.float(), test_y.long()))


register_task(Task(name="mnist1d", title="MNIST-1D, two-layer MLP", make=make))
