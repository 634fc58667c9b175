"""``code-lm``: a byte-level transformer on the source of the Python standard library (on every machine, offline)."""

from __future__ import annotations

import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.config import CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig, TamiyoConfig
from esper.errors import DataError
from esper.runs.preset import Preset, batch_generator

_SIZES: dict[str, dict[str, Any]] = {
    "gpu": {
        "dim": 256, "num_heads": 8, "context": 256, "blocks": 6, "width": 128, "batch": 64, "judge": 16, "steps": 1600,
        "lrs": (2e-3, 3e-3, 4e-3), "num_judge": 96, "num_test": 64,
    },
    "cpu": {
        "dim": 64, "num_heads": 4, "context": 64, "blocks": 2, "width": 32, "batch": 16, "judge": 8, "steps": 600,
        "lrs": (2e-3, 4e-3, 8e-3), "num_judge": 32, "num_test": 32,
    },
}  # fmt: skip
_WINDOW_SEED = 20_240_601


def corpus(root: Path | None = None) -> dict[str, Tensor]:
    """Bytes of every module of the standard library, split by file: 1 in 20 held out, 1 in 20 for the test.

    Raises
    ------
    DataError
        When the standard library's source is not installed.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = sorted(_modules(folder))
    if len(files) < 40:
        raise DataError(
            f"code-lm needs the source of the standard library, got {len(files)} .py files under {folder}; "
            "use a Python installation that ships its source"
        )
    parts: dict[str, list[bytes]] = {"train": [], "held_out": [], "test": []}
    for number, path in enumerate(files):
        part = {0: "held_out", 10: "test"}.get(number % 20, "train")
        parts[part].append(path.read_bytes())
    return {part: torch.frombuffer(bytearray(b"".join(chunks)), dtype=torch.uint8) for part, chunks in parts.items()}


def _modules(folder: Path) -> Iterator[Path]:
    """Every ``.py`` below; installed packages are not even walked through, there may be tens of thousands of them."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        yield from (Path(place, name) for name in names if name.endswith(".py"))


class CodeLM(Preset):
    name = "code-lm"
    score_name = "negative loss (nats a byte)"
    seeds = 3

    def __init__(self, device: torch.device, *, size: str) -> None:
        super().__init__(device)
        self.size = _SIZES[size]
        self.steps, self.lrs = self.size["steps"], self.size["lrs"]
        self.small_widths = (self.size["width"],) * self.size["blocks"]
        self.parts = {part: data.to(device) for part, data in corpus().items()}

    def spec(self, widths: Sequence[int]) -> dict[str, Any]:
        keys = ("dim", "num_heads", "context")
        return {"kind": "byte_transformer", "widths": list(widths), **{key: self.size[key] for key in keys}}

    def _windows(self, part: str, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        data, context = self.parts[part], self.size["context"]
        first = torch.randint(len(data) - context - 1, (num,), generator=generator).to(self.device)
        rows = data[first[:, None] + torch.arange(context + 1, device=self.device)].long()
        return rows[:, :-1], rows[:, 1:]

    def train_batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        return self._windows("train", self.size["batch"], batch_generator(seed, step))

    def held_out(self) -> list[Any]:
        generator = torch.Generator().manual_seed(_WINDOW_SEED)
        return [self._windows("held_out", self.size["judge"], generator) for _ in range(self.size["num_judge"])]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = model(batch[0])
        return F.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())

    def test(self, model: nn.Module) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(_WINDOW_SEED + 1)
        batches = [self._windows("test", self.size["batch"], generator) for _ in range(self.size["num_test"])]
        loss = sum(float(self.loss(model, batch)) for batch in batches) / len(batches)
        return -loss, loss

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)

    def schedule(self, progress: float) -> float:
        warm = 100 / self.size["steps"]
        return min(1.0, (progress + 1e-9) / warm) * (0.5 + 0.5 * math.cos(math.pi * progress))

    def clip(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def config(self, steps: int) -> Config:
        if self.size is _SIZES["cpu"]:
            return Config(
                capture=CaptureConfig(batches=16, rows=16_384, max_bytes=1 << 28),
                fit=FitConfig(steps=100, batch_rows=1024),
                graft=GraftConfig(ramp_steps=30, warmup_steps=30, settle_steps=60),
                tamiyo=TamiyoConfig(
                    first=60, spacing=steps // 3, growth=2.0, compound=True, last_share=0.6, patience=2
                ),
                total_steps=steps,
            )
        return Config(
            capture=CaptureConfig(batches=8, rows=131_072, max_bytes=8 << 30),
            fit=FitConfig(steps=60, batch_rows=8192),
            graft=GraftConfig(ramp_steps=50, warmup_steps=50, settle_steps=250, cull_steps=50, lr_boost=4.0),
            evidence=EvidenceConfig(),
            tamiyo=TamiyoConfig(
                first=30, spacing=680, growth=3.0, compound=True, last_share=0.6, patience=2, min_gain_per_cost=0.002
            ),
            total_steps=steps,
        )
