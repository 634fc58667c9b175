"""The arrays behind :class:`~esper.kasmina.seeds.SeedTable`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError, SiteError, StateError
from esper.kasmina.chunks import chunk_bounds

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

    def state(self) -> dict[str, Any]:
        """All arrays as a state tree; they are its own, not copies."""
        fields = [*self.CHUNK_FIELDS, *self.SLOT_FIELDS]
        return {"next_seed_id": self.next_seed_id, **{name: getattr(self, name) for name in fields}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` has told; it takes over the arrays.

        Raises
        ------
        StateError
            An array is missing, or of another type or length. Nothing was changed.
        """
        num_chunks, capacity = int(self.offsets[-1]), len(state["seed_id"])
        sizes = {**dict.fromkeys(self.CHUNK_FIELDS, num_chunks), **dict.fromkeys(self.SLOT_FIELDS, capacity)}
        for name, (dtype, _) in {**self.CHUNK_FIELDS, **self.SLOT_FIELDS}.items():
            array = state.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != (sizes[name],):
                raise StateError(
                    f"the seed table's {name!r} must hold {sizes[name]} values of {np.dtype(dtype)}, got "
                    f"{getattr(array, 'shape', None)} of {getattr(array, 'dtype', None)}; it is damaged"
                )
        for name in sizes:
            setattr(self, name, state[name])
        self.next_seed_id = state["next_seed_id"]
