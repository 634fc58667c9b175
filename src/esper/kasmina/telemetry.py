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
        self._reports = torch.zeros((), dtype=torch.int64, device=device)
        self._uncounted = 0
        self.rows = rows
        self.latest: npt.NDArray[np.float32] | None = None
        """``(3, C)`` as :class:`Readout` has read it last, on the host; nothing writes into it afterwards."""

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
        if torch.compiler.is_compiling():
            self._reports.add_(1)
        else:
            self._uncounted += 1
        record_statistics(self.statistics, y, feature_axis, self.rows, self.chunk_of, self.chunk_sizes)

    @property
    def reports(self) -> Tensor:
        """How often it was recorded, ``()`` int64 on the device: a compiled graph counts there, Python on the host."""
        if self._uncounted:
            self._reports.add_(self._uncounted)
            self._uncounted = 0
        return self._reports

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
        return Readout([self]).read()[0][1][0]


class Readout:
    """The buffers of a run, read together: one copy and one wait a device, however many there are."""

    def __init__(self, buffers: Sequence[TelemetryBuffer]) -> None:
        self._buffers = tuple(buffers)
        devices: dict[torch.device, dict[int, list[int]]] = {}
        for number, buffer in enumerate(buffers):
            sizes = devices.setdefault(buffer.statistics.device, {})
            sizes.setdefault(buffer.gradient_energy.numel(), []).append(number)
        self._devices = [(_Parts(device, self._tensors(sizes)), sizes) for device, sizes in devices.items()]
        self._rows = {id(rows): np.array(rows) for _, sizes in self._devices for rows in sizes.values()}

    def _tensors(self, sizes: dict[int, list[int]]) -> list[Tensor]:
        """They are written in place for as long as they live."""
        chosen = [self._buffers[number] for rows in sizes.values() for number in rows]
        return [part for buffer in chosen for part in (buffer.statistics.view(-1), buffer.gradient_energy)]

    def read(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Buffers of one size together: their numbers ``(N,)``, and ``(N, 3, C)`` mean, variance, gradient energy."""
        blocks: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
        for parts, sizes in self._devices:
            flat, start = parts.on_host(), 0
            for size, numbers in sizes.items():
                end = start + 3 * size * len(numbers)
                block = flat[start:end].reshape(-1, 3, size)
                for number, snapshot in zip(numbers, block, strict=True):
                    self._buffers[number].latest = snapshot
                blocks.append((self._rows[id(numbers)], block))
                start = end
        return blocks


class _Parts:
    """Tensors of one device, side by side on the host."""

    def __init__(self, device: torch.device, tensors: list[Tensor]) -> None:
        self._device, self._tensors = device, tensors
        self._arrays = [tensor.numpy() for tensor in tensors] if device.type == "cpu" else []

    def on_host(self) -> npt.NDArray[np.float32]:
        """A copy of them all. Waits for the device."""
        if self._arrays:
            return np.concatenate(self._arrays)
        flat = torch.cat(self._tensors)
        if self._device.type != "cuda":
            return flat.cpu().numpy()
        pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        pinned.copy_(flat, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return pinned.numpy()
