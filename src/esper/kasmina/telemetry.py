"""Per-chunk activation statistics of a site, on the device until a decision asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.errors import SiteError
from esper.kasmina.ops.telemetry import record_statistics, traced_statistics


class TelemetryBuffer:
    """``(2, C)`` fp32 on the device: mean and variance a chunk, NaN until the site has reported."""

    def __init__(self, bounds: npt.NDArray[np.int64], rows: int, device: torch.device) -> None:
        sizes = np.diff(bounds)
        self.chunk_of = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)
        self.chunk_sizes = torch.from_numpy(sizes.astype(np.float32)).to(device)
        self.statistics = torch.full((2, len(sizes)), float("nan"), device=device)
        self.gradient_energy = torch.full((len(sizes),), float("nan"), device=device)
        self.reports = 0
        """How often the site has reported; a compiled graph's reports count once a step."""
        self.fresh: Tensor | None = None
        """What a compiled graph has left, until :func:`settle`."""
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
            self.fresh = traced_statistics(y, feature_axis, self.rows, self.chunk_of, self.chunk_sizes)
            return
        self.reports += 1
        record_statistics(self.statistics, y, feature_axis, self.rows, self.chunk_of, self.chunk_sizes)

    @property
    def reported(self) -> bool:
        """Whether the hook has ever run with telemetry on (also inside a compiled graph)."""
        return self.reports > 0

    def is_damaged(self) -> Tensor:
        """On the device: has the site reported, and were its last activations not finite?"""
        bad = ~torch.isfinite(self.statistics.sum())
        return bad if self.reports else torch.zeros_like(bad)

    def record_gradient(self, g: Tensor, feature_axis: int) -> None:
        """Mean squared gradient a chunk, from captured rows (scaled to unit mean square over the site)."""
        rows = g.movedim(feature_axis, -1).reshape(-1, g.shape[feature_axis])
        zeros = torch.zeros_like(self.chunk_sizes)
        total = zeros.index_add(0, self.chunk_of, rows.float().square().mean(0))
        self.gradient_energy.copy_(total / self.chunk_sizes)

    def state(self) -> dict[str, Any]:
        """What was read so far, as a state tree; the tensors are its own, not copies."""
        return {"statistics": self.statistics, "gradient_energy": self.gradient_energy, "reports": self.reports}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told, in the same memory."""
        self.statistics.copy_(state["statistics"])
        self.gradient_energy.copy_(state["gradient_energy"])
        self.reports, self.fresh = int(state["reports"]), None  # once it was a tensor

    def snapshot(self) -> npt.NDArray[np.float32]:
        """``(3, C)``: mean, variance, gradient energy. Synchronises with the device."""
        return Readout([self]).read()[0][1][0]


def settle(buffers: Iterable[TelemetryBuffer]) -> None:
    """Take over what compiled graphs have left, all buffers of a device at once; the graphs' memory is free again."""
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for buffer in buffers:
        if buffer.fresh is not None:
            places, values = groups.setdefault(buffer.statistics.device, ([], []))
            places.append(buffer.statistics)
            values.append(buffer.fresh)
            buffer.reports += 1
            buffer.fresh = None
    for places, values in groups.values():
        torch._foreach_copy_(places, values)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  one launch


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
