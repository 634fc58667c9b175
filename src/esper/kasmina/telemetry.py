"""Per-chunk activation statistics of a site, on the device until a decision asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        reports = torch.tensor(self.reports)  # as it was when a graph counted on the device: checkpoints' hashes hold
        return {"statistics": self.statistics, "gradient_energy": self.gradient_energy, "reports": reports}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told, in the same memory."""
        self.statistics.copy_(state["statistics"])
        self.gradient_energy.copy_(state["gradient_energy"])
        self.reports, self.fresh = int(state["reports"]), None

    def snapshot(self) -> npt.NDArray[np.float32]:
        """``(3, C)``: mean, variance, gradient energy, at once. Synchronises with the device."""
        return np.concatenate([self.statistics.cpu().numpy(), self.gradient_energy.cpu().numpy()[None]])


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


Blocks = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]
"""Buffers of one size together: their numbers ``(N,)``, and ``(N, 3, C)`` mean, variance, gradient energy."""


def words_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as flat int32, in the same memory."""
    return tensor.reshape(-1).view(torch.int32)


class Readout:
    """The buffers of a run, to be read together; those of one size are neighbours on the host.

    Attributes
    ----------
    words, sizes:
        By device, what has to be copied for all of them (they are written in place for as long as they live), and how
        many words that is.
    """

    def __init__(self, buffers: Sequence[TelemetryBuffer]) -> None:
        self._buffers = tuple(buffers)
        self._groups: dict[tuple[torch.device, int], list[int]] = {}
        for number, buffer in enumerate(buffers):
            place = buffer.statistics.device, buffer.gradient_energy.numel()
            self._groups.setdefault(place, []).append(number)
        self._numbers = [np.array(numbers, dtype=np.int64) for numbers in self._groups.values()]
        self.words: dict[torch.device, list[Tensor]] = {}
        for (device, _), numbers in self._groups.items():
            for buffer in [buffers[number] for number in numbers]:
                parts = words_of(buffer.statistics), words_of(buffer.gradient_energy)
                self.words.setdefault(device, []).extend(parts)
        self.sizes = {device: sum(part.numel() for part in parts) for device, parts in self.words.items()}

    def blocks(self, host: Mapping[torch.device, npt.NDArray[np.int32]]) -> Blocks:
        """Views of what arrives at the beginning of ``host``, in the order of :attr:`words`."""
        found: Blocks = []
        start = dict.fromkeys(self.words, 0)
        for ((device, size), numbers), rows in zip(self._groups.items(), self._numbers, strict=True):
            first, start[device] = start[device], start[device] + 3 * size * len(numbers)
            found.append((rows, host[device][first : start[device]].view(np.float32).reshape(-1, 3, size)))
        return found

    def publish(self, blocks: Blocks) -> None:
        """What has arrived is the latest of every buffer."""
        for numbers, (_, block) in zip(self._groups.values(), blocks, strict=True):
            for number, snapshot in zip(numbers, block, strict=True):
                self._buffers[number].latest = snapshot
