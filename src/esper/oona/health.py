"""Health reports: what the sensors of all chunks say and how all seeds stand, one message for a whole model.

:func:`collect` runs in the training thread and copies what the next step would change; :meth:`Snapshot.pack` makes
bytes of it elsewhere. The sensors' arrays reached the host with the decision's own telemetry: nothing is copied from
the device a second time, and nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from esper.errors import EnvelopeError
from esper.kasmina.execution import Kasmina
from esper.oona import arrays as packed
from esper.oona.claims import CLAIM_BYTES

MAX_CHUNKS = 16 << 20
_SEED_FIELDS: dict[str, type[np.generic]] = {
    "seed_id": np.int64, "site": np.int32, "num_chunks": np.int32, "lifecycle": np.int8, "alpha": np.float32,
    "blueprint": np.int16, "epochs_in_state": np.int16,
}  # fmt: skip
"""Slot arrays of the seed table that are reported, by the names they have there."""


class HealthHead(msgspec.Struct, frozen=True, kw_only=True):
    """What of a report is no array. ``publisher`` holds the sender's counts of what it sent and what it dropped."""

    step: int
    sites: tuple[str, ...]
    publisher: dict[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """A report as its reader has it.

    Attributes
    ----------
    offsets:
        ``(S + 1,)`` int64: site ``s`` has the chunks ``offsets[s]`` to ``offsets[s + 1] - 1``.
    mean, variance:
        ``(C,)`` fp32 activation statistics of all chunks, site after site; NaN where a sensor has not reported.
    seeds:
        One array a field, one entry a seed, in the order of slots: ``seed_id`` int64, ``site`` int32 (row in
        ``head.sites``), ``num_chunks`` int32, ``lifecycle`` int8 (a :class:`~esper.protocol.Lifecycle`), ``alpha``
        fp32, ``blueprint`` int16 (a code of the sender's registry), ``epochs_in_state`` int16.
    """

    head: HealthHead
    offsets: npt.NDArray[np.int64]
    mean: npt.NDArray[np.float32]
    variance: npt.NDArray[np.float32]
    seeds: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a report is made of."""

    step: int
    sites: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    sensed: tuple[npt.NDArray[np.float32] | None, ...]
    """``(3, C)`` a site as its sensors were read last, shared with the sensors; ``None``: never."""
    seeds: Mapping[str, npt.NDArray[Any]]

    @property
    def is_large(self) -> bool:
        """Whether the packed report is one that goes by claim."""
        return 8 * int(self.offsets[-1]) > CLAIM_BYTES

    @property
    def num_bytes(self) -> int:
        """What it keeps in memory until it is packed: 12 a chunk; the packed report is not larger."""
        names = sum(len(name) + 3 for name in self.sites)
        held = sum(array.nbytes for array in (self.offsets, *self.seeds.values())) + names + 1024
        chunks = max(8 * int(self.offsets[-1]), sum(array.nbytes for array in self.sensed if array is not None))
        return held + chunks

    def pack(self, publisher: Mapping[str, int] | None = None) -> bytes:
        """Safetensors bytes; 8 a chunk, 25 a seed and the names of the sites."""
        head = HealthHead(step=self.step, sites=self.sites, publisher=dict(publisher or {}))
        statistics = np.full((2, int(self.offsets[-1])), np.nan, dtype=np.float32)
        for site, sensed in enumerate(self.sensed):
            if sensed is not None:
                statistics[:, self.offsets[site] : self.offsets[site + 1]] = sensed[:2]
        return packed.pack(
            head, {"offsets": self.offsets, "mean": statistics[0], "variance": statistics[1], **self.seeds}
        )


def collect(kasmina: Kasmina, step: int) -> Snapshot:
    """What a report tells, in the training thread: the sensors as they were last read, and the seeds as they are."""
    table = kasmina.table
    held = table.occupied()
    return Snapshot(
        step=step,
        sites=tuple(kasmina.sites),
        offsets=table.offsets,
        sensed=tuple(None if site.telemetry is None else site.telemetry.latest for site in kasmina.sites.values()),
        seeds={name: getattr(table, name)[held] for name in _SEED_FIELDS},
    )


def decode(data: bytes) -> HealthReport:
    """The report that :meth:`Snapshot.pack` has written.

    Raises
    ------
    EnvelopeError
        The data are something else, or what does not go together.
    """
    head, arrays = packed.unpack(data, HealthHead)
    num_sites = len(head.sites)
    offsets = packed.take(arrays, "offsets", np.int64, (num_sites + 1,))
    last = int(offsets[-1])
    if offsets[0] != 0 or not 0 <= last <= MAX_CHUNKS or (offsets[1:] < offsets[:-1]).any():
        raise EnvelopeError(f"offsets must rise from 0 to at most {MAX_CHUNKS}, got {offsets[:3].tolist()}... {last}")
    num_seeds = packed.take(arrays, "seed_id", np.int64, (None,)).size
    seeds = {name: packed.take(arrays, name, kind, (num_seeds,)) for name, kind in _SEED_FIELDS.items()}
    site = seeds["site"]
    if site.size and not 0 <= site.min() <= site.max() < num_sites:
        raise EnvelopeError(f"seeds must sit at one of {num_sites} sites, got {site.min()} to {site.max()}")
    return HealthReport(
        head=head,
        offsets=offsets,
        mean=packed.take(arrays, "mean", np.float32, (last,)),
        variance=packed.take(arrays, "variance", np.float32, (last,)),
        seeds=seeds,
    )
