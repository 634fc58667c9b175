"""``digits_arms``: the preset of ``esper run digits``, with every arm of the protocol."""

from __future__ import annotations

import torch
from benchmarks.training.protocol import Source, Task, register_task

from esper.runs.presets.digits import Digits


def make(source: Source) -> Digits:
    return Digits(torch.device(source.device))


register_task(Task(name="digits_arms", title="Handwritten digits, every arm", make=make))
