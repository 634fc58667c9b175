"""Per-chunk activation statistics of a site, on the device until a decision asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.kasmina.ops.telemetry import record_statistics


class TelemetryBuffer:
    """``(2, C)`` fp32 on the device: mean and variance a chunk, NaN until the site has reported."""

    def __init__(self, bounds: npt.NDArray[np.int64], rows: int, device: torch.device) -> None:
        sizes = np.diff(bounds)
        self.chunk_of = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)
        self.chunk_sizes = torch.from_numpy(sizes.astype(np.float32)).to(device)
        self.statistics = torch.full((2, len(sizes)), float("nan"), device=device)
        self.gradient_energy = torch.full((len(sizes),), float("nan"), device=device)
        self.reports = torch.zeros((), dtype=torch.int64, device=device)
        self.rows = rows

    def record(self, y: Tensor, feature_axis: int) -> None:
        """Read up to ``rows`` rows of ``y``, strided over the whole batch; ``y`` is not changed or kept."""
        self.reports.add_(1)
        record_statistics(self.statistics, y, feature_axis, self.rows, self.chunk_of, self.chunk_sizes)

    @property
    def reported(self) -> bool:
        """Whether the hook has ever run with telemetry on (also inside a compiled graph). Synchronises."""
        return int(self.reports) > 0

    def record_gradient(self, g: Tensor, feature_axis: int) -> None:
        """Mean squared gradient a chunk, from captured rows (scaled to unit mean square over the site)."""
        rows = g.movedim(feature_axis, -1).reshape(-1, g.shape[feature_axis])
        zeros = torch.zeros_like(self.chunk_sizes)
        total = zeros.index_add(0, self.chunk_of, rows.float().square().mean(0))
        self.gradient_energy.copy_(total / self.chunk_sizes)

    def snapshot(self) -> npt.NDArray[np.float32]:
        """``(3, C)``: mean, variance, gradient energy. Synchronises with the device."""
        return snapshots([self])[0]


def snapshots(buffers: Sequence[TelemetryBuffer]) -> list[npt.NDArray[np.float32]]:
    """``(3, C)`` of each buffer: mean, variance, gradient energy; one copy and one wait a device for all of them."""
    groups: dict[torch.device, list[int]] = {}
    for number, buffer in enumerate(buffers):
        groups.setdefault(buffer.statistics.device, []).append(number)
    found: dict[int, npt.NDArray[np.float32]] = {}
    for device, members in groups.items():
        parts = [part for n in members for part in (buffers[n].statistics.view(-1), buffers[n].gradient_energy)]
        flat = _on_host(torch.cat(parts), device)
        start = 0
        for number in members:
            size = 3 * buffers[number].gradient_energy.numel()
            found[number] = flat[start : start + size].reshape(3, -1)
            start += size
    return [found[number] for number in range(len(buffers))]


def _on_host(flat: Tensor, device: torch.device) -> npt.NDArray[np.float32]:
    if device.type != "cuda":
        return flat.cpu().numpy()
    pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    pinned.copy_(flat, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return pinned.numpy()
