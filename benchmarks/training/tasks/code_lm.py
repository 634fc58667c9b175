"""``code_lm``: the preset of ``esper run code-lm``."""

from __future__ import annotations

import torch
from benchmarks.training.protocol import Source, Task, register_task

from esper.runs.presets.code_lm import CodeLM


def make(source: Source) -> CodeLM:
    return CodeLM(torch.device(source.device), size=source.size)


register_task(Task(name="code_lm", title="Byte-level transformer on the Python standard library's source", make=make))
