"""Trees to store, and saving them under trouble."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.safety.checkpoint import Checkpoints, manifest_numbers_or_none
from esper.safety.disk import Disk

FOLDER = Path("/simulated/run/checkpoints")


def tree_of(number: int, size: int = 40) -> dict[str, Any]:
    """A small state that differs from that of any other number: tied, strided, empty and scalar tensors in it."""
    weight = torch.arange(float(size)).reshape(-1, 4) + number
    return {
        "step": number,
        "host": {"weight": weight, "tied": weight, "turned": weight.T, "row": weight[1], "empty": torch.empty(0, 3)},
        "scalar": torch.tensor(float(number), dtype=torch.bfloat16),
        "half": weight.half(),
        "flags": weight > 5,
        "count": torch.tensor(number),
        "random": {"state": (1, (2**127 + number, 3), None), "keys": np.arange(5, dtype="u4")},
        1: [float("nan"), b"\x00\xff", True],
    }


def save_some(disk: Disk, count: int, acknowledged: list[int], *, folder: Path = FOLDER, keep: int = 2) -> None:
    """Open the folder and save ``count`` checkpoints in several parts; numbers of those that returned are noted.

    So is the newest that is there on opening: a run goes on from it, so from here on it must stay.
    """
    with Checkpoints(folder, kind="test", keep=keep, disk=disk, part_bytes=400) as checkpoints:
        acknowledged += manifest_numbers_or_none(disk, folder)[:1]
        for _ in range(count):
            number = checkpoints.next_number
            checkpoints.save(tree_of(number), step=number)
            acknowledged.append(number)
