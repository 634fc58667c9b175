"""``tinyshakespeare``: a character-level GPT with undersized inner layers.

The data folder holds ``tinyshakespeare.txt`` (ASCII). The last tenth is the test, the twentieth before it is held out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from benchmarks.training.protocol import Source, Task, register_task

from esper.config import CaptureConfig, Config, FitConfig, GraftConfig, TamiyoConfig
from esper.runs.preset import Preset
from esper.runs.presets.code_lm import CodeLM

SIZES: dict[str, dict[str, Any]] = {
    "gpu": {
        "dim": 192, "num_heads": 6, "context": 256, "blocks": 6, "width": 96, "batch": 64, "judge": 8, "steps": 1000,
        "lrs": (1e-3, 2e-3, 4e-3), "num_judge": 96, "num_test": 64,
    },
    "cpu": {
        "dim": 48, "num_heads": 4, "context": 64, "blocks": 2, "width": 16, "batch": 16, "judge": 8, "steps": 600,
        "lrs": (4e-3, 8e-3, 1.6e-2), "num_judge": 48, "num_test": 64,
    },
}  # fmt: skip


class TinyShakespeare(CodeLM):
    name = "tinyshakespeare"
    score_name = "negative loss (nats a character)"

    def __init__(self, source: Source) -> None:
        Preset.__init__(self, torch.device(source.device))  # another text than CodeLM's
        self.size = SIZES[source.size]
        self.steps, self.lrs = self.size["steps"], self.size["lrs"]
        self.small_widths = (self.size["width"],) * self.size["blocks"]
        text = torch.frombuffer(bytearray(source.file("tinyshakespeare.txt").read_bytes()), dtype=torch.uint8)
        held, test = int(0.85 * len(text)), int(0.9 * len(text))
        split = {"train": text[:held], "held_out": text[held:test], "test": text[test:]}
        self.parts = {part: data.to(self.device) for part, data in split.items()}

    def schedule(self, progress: float) -> float:
        return min(1.0, (progress + 1e-3) / 0.06) * (0.5 + 0.5 * math.cos(math.pi * progress))

    def config(self, steps: int) -> Config:
        large = self.size is SIZES["gpu"]
        return Config(
            capture=CaptureConfig(batches=8 if large else 16, rows=131_072 if large else 16_384, max_bytes=2 << 30),
            fit=FitConfig(steps=60, batch_rows=8192 if large else 1024),
            graft=GraftConfig(ramp_steps=30, warmup_steps=30, settle_steps=steps // 8, cull_steps=30),
            tamiyo=TamiyoConfig(
                first=max(10, steps // 50), spacing=steps // 3, growth=3.0, compound=True, last_share=0.6,
                patience=2, min_gain_per_cost=0.002,
            ),
            total_steps=steps,
        )  # fmt: skip


register_task(Task(name="tinyshakespeare", title="tinyshakespeare, character-level GPT", make=TinyShakespeare))
