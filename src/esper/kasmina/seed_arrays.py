"""The arrays behind :class:`~esper.kasmina.seeds.SeedTable`: layout, checkpoint form and consistency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError, DataError, SiteError
from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.lifecycle import in_forward, is_terminal
from esper.protocol import Lifecycle

Ints = npt.NDArray[np.int64]


class SeedArrays:
    """Structure of arrays for all seeds of a model.

    Parameters
    ----------
    site_out_features, site_num_chunks:
        Output features and chunks of each site, in one order.
    capacity:
        Seed slots to begin with; it doubles when they run out.

    Attributes
    ----------
    owner, embargo_until, generation:
        Chunk arrays ``(num_chunks,)``, int32, int64, int32: the slot that owns the chunk (-1: none), the first step at
        which it may germinate again, and how many seeds have become permanent there.
    lifecycle, site, cohort, seed_id, blueprint, strategy, width, num_chunks:
        Slot arrays ``(capacity,)``: int8, int32, int32, int64, int16, int8, int32, int32. Ids increase and are never
        used twice. A free slot holds ``DORMANT`` and -1 (``width`` and ``num_chunks`` 0).
    epochs_in_state, born, entered:
        int16 steps in the state (stops at 32,767), int64 steps at germination and at entry into the state.
    alpha, paused:
        float32 and bool.
    """

    lifecycle: npt.NDArray[np.int8]
    site: npt.NDArray[np.int32]
    cohort: npt.NDArray[np.int32]
    seed_id: npt.NDArray[np.int64]
    blueprint: npt.NDArray[np.int16]
    epochs_in_state: npt.NDArray[np.int16]
    strategy: npt.NDArray[np.int8]
    alpha: npt.NDArray[np.float32]
    born: npt.NDArray[np.int64]
    entered: npt.NDArray[np.int64]
    paused: npt.NDArray[np.bool_]
    width: npt.NDArray[np.int32]
    num_chunks: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int32]
    embargo_until: npt.NDArray[np.int64]
    generation: npt.NDArray[np.int32]

    SLOT_FIELDS: ClassVar[dict[str, tuple[type[np.generic], int]]] = {
        "lifecycle": (np.int8, 0),
        "site": (np.int32, -1),
        "cohort": (np.int32, -1),
        "seed_id": (np.int64, -1),
        "blueprint": (np.int16, -1),
        "epochs_in_state": (np.int16, 0),
        "strategy": (np.int8, -1),
        "alpha": (np.float32, 0),
        "born": (np.int64, -1),
        "entered": (np.int64, -1),
        "paused": (np.bool_, 0),
        "width": (np.int32, 0),
        "num_chunks": (np.int32, 0),
    }
    """Type and free value of each slot array."""
    CHUNK_FIELDS: ClassVar[dict[str, tuple[type[np.generic], int]]] = {
        "owner": (np.int32, -1),
        "embargo_until": (np.int64, 0),
        "generation": (np.int32, 0),
    }

    def __init__(self, site_out_features: Sequence[int], site_num_chunks: Sequence[int], capacity: int = 64) -> None:
        if len(site_out_features) != len(site_num_chunks) or len(site_out_features) == 0:
            raise SiteError(
                f"a seed table needs one chunk count a site and at least one site, got {len(site_num_chunks)} counts "
                f"for {len(site_out_features)} sites; pass two sequences of one length"
            )
        if capacity < 1:
            raise ConfigError(f"capacity must be at least 1, got {capacity}; use 64")
        self.bounds: tuple[Ints, ...] = tuple(
            chunk_bounds(int(f), int(c)) for f, c in zip(site_out_features, site_num_chunks, strict=True)
        )
        """Per site ``(C + 1,)`` int64: the feature slices of its chunks."""
        self.offsets: Ints = np.concatenate(([0], np.cumsum([len(b) - 1 for b in self.bounds]))).astype(np.int64)
        """``(num_sites + 1,)`` int64: site ``s`` has the rows ``offsets[s]`` to ``offsets[s + 1] - 1``."""
        self.next_seed_id = 0
        for name, (dtype, empty) in self.CHUNK_FIELDS.items():
            setattr(self, name, np.full(int(self.offsets[-1]), empty, dtype=dtype))
        for name, (dtype, empty) in self.SLOT_FIELDS.items():
            setattr(self, name, np.full(capacity, empty, dtype=dtype))

    @property
    def num_sites(self) -> int:
        return len(self.bounds)

    @property
    def capacity(self) -> int:
        """Slots there are now, free ones included."""
        return len(self.seed_id)

    def to_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Everything, as copied arrays for a checkpoint; :meth:`from_dict` makes an equal table of it."""
        names = (*self.CHUNK_FIELDS, *self.SLOT_FIELDS)
        return {
            "site_out_features": np.array([b[-1] for b in self.bounds], dtype=np.int64),
            "site_num_chunks": np.diff(self.offsets),
            "next_seed_id": np.array([self.next_seed_id], dtype=np.int64),
            **{name: getattr(self, name).copy() for name in names},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, npt.NDArray[Any]]) -> Self:
        """A table equal to the one that :meth:`to_dict` saw. Raises :class:`DataError` on anything that is not one."""
        fields = {**cls.CHUNK_FIELDS, **cls.SLOT_FIELDS}
        wanted = {"site_out_features", "site_num_chunks", "next_seed_id", *fields}
        if wanted != set(state):
            raise DataError(f"a seed table has the arrays {sorted(wanted)}, got {sorted(state)}; use to_dict's result")
        if state["next_seed_id"].size != 1 or state["seed_id"].ndim != 1:
            raise DataError("a seed table has one next_seed_id and flat slot arrays; the checkpoint is damaged")
        table = cls(state["site_out_features"].tolist(), state["site_num_chunks"].tolist(), len(state["seed_id"]))
        for name in fields:
            old, new = getattr(table, name), state[name]
            if new.dtype != old.dtype or new.shape != old.shape:
                raise DataError(
                    f"{name} must be {old.dtype} {old.shape}, got {new.dtype} {new.shape}; the checkpoint is damaged"
                )
            setattr(table, name, new.copy())
        table.next_seed_id = int(state["next_seed_id"].item())
        problems = table.problems()
        if problems:
            raise DataError(f"a seed table must be consistent, got: {'; '.join(problems)}; the checkpoint is damaged")
        return table

    def check_invariants(self) -> None:
        """Raise :class:`AssertionError` if the arrays contradict each other: a bug in Esper."""
        problems = self.problems()
        if problems:
            raise AssertionError("; ".join(problems))

    def problems(self) -> list[str]:
        """What is inconsistent; empty for every table that only this class has written."""
        if self.owner.size and not -1 <= self.owner.min() <= self.owner.max() < self.capacity:
            return ["a chunk's owner is not a slot"]
        if not ((self.lifecycle >= 0) & (self.lifecycle < len(Lifecycle))).all():
            return ["a slot's state is not a code of the table"]
        held = self.seed_id >= 0
        if not ((self.site[held] >= 0) & (self.site[held] < self.num_sites)).all():
            return ["a seed sits at no site"]
        rows = np.flatnonzero(self.owner >= 0)
        owner = self.owner[rows]
        sites = np.searchsorted(self.offsets, rows, side="right") - 1
        ids = self.seed_id[held]
        clean = [(getattr(self, n)[~held] == empty).all() for n, (_, empty) in self.SLOT_FIELDS.items()]
        silent = ~in_forward(self.lifecycle)
        checks = {
            "a chunk belongs to a free slot": held[owner].all(),
            "a chunk belongs to a seed of another site": (self.site[owner] == sites).all(),
            "a seed's chunks are not as many as it took": np.array_equal(
                np.bincount(owner, minlength=self.capacity), self.num_chunks
            ),
            "a seed has no chunk": (self.num_chunks[held] > 0).all(),
            "a seed is dormant": (self.lifecycle[held] != Lifecycle.DORMANT).all(),
            "a free slot is not clean": all(clean),
            "seed ids are not unique and below next_seed_id": len(np.unique(ids)) == len(ids)
            and (ids < self.next_seed_id).all(),
            "alpha is not finite": np.isfinite(self.alpha).all(),
            "alpha is not 0 outside the forward pass": (self.alpha[silent] == 0).all(),
            "a seed at an end is paused": not (self.paused & is_terminal(self.lifecycle)).any(),
            "a counter of steps or generations is negative": (self.epochs_in_state >= 0).all()
            and (self.generation >= 0).all(),
            "a seed entered its state before it was born": (self.entered >= self.born).all(),
        }
        return [problem for problem, holds in checks.items() if not holds]
