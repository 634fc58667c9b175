"""Per-chunk activation statistics of a site, on the device until a decision asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        """``(3, C)`` as a :class:`Panel` has read it last, on the host; nothing writes into it afterwards."""

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
        """``(3, C)``: mean, variance, gradient energy, at once. Synchronises with the device."""
        return np.concatenate([self.statistics.cpu().numpy(), self.gradient_energy.cpu().numpy()[None]])


def words_of(tensor: Tensor) -> Tensor:
    """The bits of a tensor as flat int32, in the same memory."""
    return tensor.reshape(-1).view(torch.int32)


@dataclass(frozen=True)
class _Block:
    """Buffers of one size on one device: on their way to the host they lie side by side from word ``first`` on."""

    device: torch.device
    first: int
    chunks: int
    rows: npt.NDArray[np.int64]


class Panel:
    """The buffers of many sites, read together.

    Buffers of one size are neighbours on the host, so that many are reduced at once.

    Attributes
    ----------
    words, sizes:
        By device, what has to be copied for all of them (:func:`words_of` each), and how many words that is.
    """

    def __init__(self, buffers: Sequence[TelemetryBuffer]) -> None:
        self._buffers = tuple(buffers)
        groups: dict[tuple[torch.device, int], list[int]] = {}
        for row, buffer in enumerate(buffers):
            groups.setdefault((buffer.statistics.device, buffer.gradient_energy.numel()), []).append(row)
        self.words: dict[torch.device, list[Tensor]] = {}
        self.sizes: dict[torch.device, int] = {}
        self._blocks: list[_Block] = []
        for (device, chunks), rows in groups.items():
            first = self.sizes.get(device, 0)
            self._blocks.append(_Block(device, first, chunks, np.array(rows, dtype=np.int64)))
            self.sizes[device] = first + 3 * chunks * len(rows)
            for row in rows:
                parts = (buffers[row].statistics, buffers[row].gradient_energy)
                self.words.setdefault(device, []).extend(map(words_of, parts))

    def sensed(self, host: Mapping[torch.device, npt.NDArray[np.int32]]) -> Sensed:
        """What arrives, or has arrived, at the beginning of ``host``, in the order of :attr:`words`."""
        arrays: list[npt.NDArray[np.float32]] = []
        for block in self._blocks:
            size = 3 * block.chunks * len(block.rows)
            flat = host[block.device][block.first : block.first + size].view(np.float32)
            arrays.append(flat.reshape(-1, 3, block.chunks))
        return Sensed(self._buffers, [block.rows for block in self._blocks], arrays)


class Sensed:
    """What all buffers of a panel held, on the host. Made before it has arrived, looked at afterwards."""

    def __init__(
        self,
        buffers: Sequence[TelemetryBuffer],
        rows: Sequence[npt.NDArray[np.int64]],
        arrays: Sequence[npt.NDArray[np.float32]],
    ) -> None:
        self._buffers, self._rows, self._arrays = buffers, rows, arrays
        by_row: dict[int, npt.NDArray[np.float32]] = {}
        for some, array in zip(rows, arrays, strict=True):
            by_row.update(zip(some.tolist(), array, strict=True))
        self._latest = [by_row[row] for row in range(len(buffers))]
        self._energies = [one[2] for one in self._latest]

    def publish(self) -> None:
        """Let every buffer have what was read as its latest."""
        for buffer, latest in zip(self._buffers, self._latest, strict=True):
            buffer.latest = latest

    def means(self) -> npt.NDArray[np.float32]:
        """``(S, 3)``: mean, variance and gradient energy, averaged over the chunks of each buffer."""
        found = np.empty((len(self._latest), 3), dtype=np.float32)
        for rows, array in zip(self._rows, self._arrays, strict=True):
            found[rows] = np.add.reduce(array, axis=2) / array.shape[2]
        return found

    def energies(self) -> npt.NDArray[np.float32]:
        """Gradient energies of all chunks, buffer after buffer."""
        return np.concatenate(self._energies)
