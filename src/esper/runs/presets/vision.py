"""``vision``: a small residual net on images in an .npz file (CIFAR layout)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.config import Config, EvidenceConfig, GraftConfig, TamiyoConfig
from esper.errors import DataError
from esper.runs.preset import Preset, batch_generator

_SIZES: dict[str, dict[str, Any]] = {
    "gpu": {"trunk": (64, 128, 256), "batch": 512, "judge": 32, "steps": 900, "lrs": (0.2, 0.4, 0.8)},
    "cpu": {"trunk": (8, 16, 32), "batch": 32, "judge": 16, "steps": 300, "lrs": (0.05, 0.1, 0.2)},
}
_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_images(path: Path | None) -> dict[str, np.ndarray]:
    """Read and check an .npz: uint8 images ``(N, H, W, C)`` or ``(N, H, W)``, integer labels ``(N,)``.

    Raises
    ------
    DataError
        The path, the keys or the shapes are not as expected.
    """
    rule = "vision needs --data FILE.npz with x_train, y_train, x_test, y_test"
    if path is None:
        raise DataError(f"{rule}, got no path; pass one, for example a CIFAR-10 export")
    if not path.is_file():
        raise DataError(f"{rule}, got {str(path)!r}, which is not a file; check the path")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in _KEYS if key not in archive]
            arrays = {key: archive[key] for key in _KEYS} if not missing else {}
    except (ValueError, OSError) as error:
        raise DataError(f"{rule}, got {str(path)!r}, which cannot be read ({error}); write it with np.savez") from error
    if missing:
        raise DataError(f"{rule}, {str(path)!r} lacks {', '.join(missing)}; save all four arrays")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim not in (3, 4) or y.ndim != 1 or len(x) != len(y) or x.dtype != np.uint8:
            raise DataError(
                f"x_{part} must be uint8 (N, H, W, C) or (N, H, W) with one label each in y_{part} (N,), got "
                f"{x.dtype} {x.shape} and {y.dtype} {y.shape}; convert the arrays"
            )
    return arrays


class Vision(Preset):
    """A tenth of the training images (at most 5,000) is held out for judging; the test images are scored once."""

    name = "vision"
    score_name = "accuracy"
    seeds = 3

    def __init__(self, device: torch.device, *, size: str, data: Path | None) -> None:
        super().__init__(device)
        arrays = load_images(data)
        self.size = _SIZES[size]
        self.steps, self.lrs = self.size["steps"], self.size["lrs"]
        trunk = self.size["trunk"]
        self.small_widths = tuple(max(1, channels // 4) for channels in trunk for _ in range(2))
        x, y = self._images(arrays["x_train"]), torch.tensor(arrays["y_train"].astype(np.int64), device=device)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(device)
        x, y = x[order], y[order]
        held = min(5000, len(x) // 10)
        if held < 8 * 4:
            raise DataError(f"vision needs at least 320 training images, got {len(x)}; use a larger data set")
        part = x[held:]  # what is judged or scored on has no say in how it is normalised
        mean, std = part.mean((0, 2, 3), keepdim=True), part.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        x = (x - mean) / std
        self.held_x, self.held_y, self.x, self.y = x[:held], y[:held], x[held:], y[held:]
        self.padded = F.pad(self.x, (4, 4, 4, 4), mode="reflect")
        self.test_x = (self._images(arrays["x_test"]) - mean) / std
        self.test_y = torch.tensor(arrays["y_test"].astype(np.int64), device=device)
        self.num_classes = int(max(y.max(), self.test_y.max())) + 1

    def _images(self, array: np.ndarray) -> Tensor:
        images = torch.tensor(array, device=self.device).float() / 255
        return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()

    def spec(self, widths: Sequence[int]) -> dict[str, Any]:
        return {
            "kind": "resnet", "widths": list(widths), "trunk": list(self.size["trunk"]),
            "in_channels": int(self.x.shape[1]), "num_classes": self.num_classes,
        }  # fmt: skip

    def train_batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        generator = batch_generator(seed, step)
        index = torch.randint(len(self.x), (self.size["batch"],), generator=generator)
        down, right = torch.randint(9, (2,), generator=generator).tolist()
        flipped = (torch.rand(len(index), generator=generator) < 0.5).to(self.device)
        height, width = self.x.shape[2:]
        index = index.to(self.device)
        x = self.padded[index, :, down : down + height, right : right + width]
        return torch.where(flipped[:, None, None, None], x.flip(3), x), self.y[index]

    def held_out(self) -> list[Any]:
        size = min(self.size["judge"], len(self.held_x) // 16)  # many small batches: an e-process bets on each
        return list(zip(self.held_x.split(size), self.held_y.split(size), strict=True))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    def test(self, model: nn.Module) -> tuple[float, float]:
        parts = zip(self.test_x.split(500), self.test_y.split(500), strict=True)
        right, loss = 0, 0.0
        for x, y in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = model(x).float()
            right += int((logits.argmax(1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
        return right / len(self.test_y), loss / len(self.test_y)

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def schedule(self, progress: float) -> float:
        return min(1.0, (progress + 1e-3) / 0.1) * (1 - max(0.0, (progress - 0.1) / 0.9))

    def config(self, steps: int) -> Config:
        return Config(
            graft=GraftConfig(ramp_steps=20, warmup_steps=20, settle_steps=steps // 12, stabilize_steps=10),
            evidence=EvidenceConfig(),
            tamiyo=TamiyoConfig(
                first=max(10, steps // 16), growth=1.0, last_share=0.4, patience=2, min_gain_per_cost=0.01
            ),
            total_steps=steps,
        )
