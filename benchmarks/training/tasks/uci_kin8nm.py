"""``uci_kin8nm``: forward kinematics of a robot arm, 8,192 rows of 8 inputs; a seed is one of the 20 standard splits.

The data folder holds ``uci_kin8nm.npz`` with ``x (8192, 8)``, ``y (8192,)`` and ``train_mask (20, 1024)``: bits, one a
row and split, that say which rows are for training.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.training.protocol import Source, Task, register_task
from benchmarks.training.rows import Rows, parts

from esper.errors import ConfigError

HELD, NUM_SPLITS = 1200, 20


class Kin8nm(Rows):
    name = "uci_kin8nm"
    lrs = (3e-3, 1e-2, 3e-2)
    judge = 12


def make(source: Source) -> Kin8nm:
    if source.seed >= NUM_SPLITS:
        raise ConfigError(f"uci_kin8nm has {NUM_SPLITS} splits, got seed {source.seed}; use seeds below {NUM_SPLITS}")
    with np.load(source.file("uci_kin8nm.npz"), allow_pickle=False) as archive:
        x, y = torch.tensor(archive["x"]).float(), torch.tensor(archive["y"]).float()
        mask = torch.tensor(np.unpackbits(archive["train_mask"], axis=1, count=len(y))[source.seed]).bool()
    train, held = parts(x[mask], y[mask], HELD, seed=source.seed)
    return Kin8nm(torch.device(source.device), train=train, held=held, test=(x[~mask], y[~mask]))


register_task(Task(name="uci_kin8nm", title="UCI kin8nm, two-layer MLP, standard splits", make=make, per_seed=True))
