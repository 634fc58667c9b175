"""Per-chunk activation statistics of a site, on the device until a decision asks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.errors import SiteError
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
        self.latest: npt.NDArray[np.float32] | None = None
        """``(3, C)`` as :func:`snapshots` has read it last, on the host; nothing writes into it afterwards."""

    def record(self, y: Tensor, feature_axis: int) -> None:
        """Read up to ``rows`` rows of ``y``, strided over the whole batch; ``y`` is not changed or kept.

        Raises
        ------
        SiteError
            ``y`` is on another device than the site was found on.
        """
        if y.device != self.statistics.device:
            raise SiteError(
                f"the model must stay on its device, it was on {self.statistics.device} when the Grower was made and "
                f"is on {y.device} now; move it first (model.to(device)), then make the optimizer and the Grower"
            )
        self.reports.add_(1)
        record_statistics(self.statistics, y, feature_axis, self.rows, self.chunk_of, self.chunk_sizes)

    @property
    def reported(self) -> bool:
        """Whether the hook has ever run with telemetry on (also inside a compiled graph). Synchronises."""
        return int(self.reports) > 0

    def is_damaged(self) -> Tensor:
        """On the device: has the site reported, and were its last activations not finite?"""
        return (self.reports > 0) & ~torch.isfinite(self.statistics.sum())

    def record_gradient(self, g: Tensor, feature_axis: int) -> None:
        """Mean squared gradient a chunk, from captured rows (scaled to unit mean square over the site)."""
        rows = g.movedim(feature_axis, -1).reshape(-1, g.shape[feature_axis])
        zeros = torch.zeros_like(self.chunk_sizes)
        total = zeros.index_add(0, self.chunk_of, rows.float().square().mean(0))
        self.gradient_energy.copy_(total / self.chunk_sizes)

    def state(self) -> dict[str, Tensor]:
        """What was read so far, as a state tree; the tensors are its own, not copies."""
        return {"statistics": self.statistics, "gradient_energy": self.gradient_energy, "reports": self.reports}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state` has told, in the same memory."""
        self.statistics.copy_(state["statistics"])
        self.gradient_energy.copy_(state["gradient_energy"])
        self.reports.copy_(state["reports"])

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
            buffers[number].latest = found[number] = flat[start : start + size].reshape(3, -1)
            start += size
    return [found[number] for number in range(len(buffers))]


def _on_host(flat: Tensor, device: torch.device) -> npt.NDArray[np.float32]:
    if device.type != "cuda":
        return flat.cpu().numpy()
    pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    pinned.copy_(flat, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return pinned.numpy()
