"""Reading a seed table in tests: what it holds, seen seed by seed, and whether its arrays agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esper.kasmina.chunks import columns_of
from esper.kasmina.lifecycle import in_forward, is_active, is_terminal
from esper.kasmina.seed_arrays import Ints
from esper.kasmina.seeds import SeedTable
from esper.protocol import Lifecycle


def contents(table: SeedTable) -> dict[str, tuple[str, bytes]]:
    """Every array, type and bytes, and the next id: equal for equal tables only."""
    arrays = {name: getattr(table, name) for name in (*table.CHUNK_FIELDS, *table.SLOT_FIELDS)}
    return {name: (str(a.dtype), a.tobytes()) for name, a in arrays.items()} | {"next": (str(table.next_seed_id), b"")}


def germinate(
    table: SeedTable, site: int, chunks: npt.ArrayLike, *, cohort: Any, blueprint: int, strategy: int, width: int,
    step: int,
) -> int:  # fmt: skip
    """One seed; returns its slot."""
    chunks = np.asarray(chunks).reshape(-1)
    (slot,) = table.germinate_many(
        [site], chunks, [chunks.size], cohort=cohort, blueprint=blueprint, strategy=strategy, width=width, step=step
    )
    return int(slot)


def alive(table: SeedTable) -> Ints:
    """Slots whose seed is active (GERMINATED to FINE_TUNING)."""
    return np.flatnonzero(is_active(table.lifecycle))


def slots_of(table: SeedTable, cohort: int) -> Ints:
    return np.flatnonzero((table.seed_id >= 0) & (table.cohort == cohort))


def chunks_of(table: SeedTable, slot: int) -> Ints:
    """Indices, within its site, of the chunks that a seed owns."""
    site = int(table.site[slot])
    return np.flatnonzero(table.owner[table.offsets[site] : table.offsets[site + 1]] == slot)


def columns(table: SeedTable, slot: int) -> Ints:
    return columns_of(table.bounds[int(table.site[slot])], chunks_of(table, slot))


def states(table: SeedTable, site: int) -> npt.NDArray[np.int64]:
    """``(C, 4)``: state, blueprint, epochs in state, strategy of each chunk; ``[0, -1, 0, -1]`` without a seed."""
    owner = table.owner[table.offsets[site] : table.offsets[site + 1]]
    fields = (table.lifecycle, table.blueprint, table.epochs_in_state, table.strategy)
    gathered = np.stack([field[owner].astype(np.int64) for field in fields], axis=1)
    return np.where((owner >= 0)[:, None], gathered, np.array([0, -1, 0, -1]))


def problems(table: SeedTable) -> list[str]:
    """What is inconsistent; empty for every table that only its own methods have written."""
    if table.owner.size and not -1 <= table.owner.min() <= table.owner.max() < table.capacity:
        return ["a chunk's owner is not a slot"]
    if not ((table.lifecycle >= 0) & (table.lifecycle < len(Lifecycle))).all():
        return ["a slot's state is not a code of the table"]
    held = table.seed_id >= 0
    if not ((table.site[held] >= 0) & (table.site[held] < table.num_sites)).all():
        return ["a seed sits at no site"]
    rows = np.flatnonzero(table.owner >= 0)
    owner = table.owner[rows]
    sites = np.searchsorted(table.offsets, rows, side="right") - 1
    ids = table.seed_id[held]
    clean = [(getattr(table, n)[~held] == empty).all() for n, (_, empty) in table.SLOT_FIELDS.items()]
    silent = ~in_forward(table.lifecycle)
    checks = {
        "a chunk belongs to a free slot": held[owner].all(),
        "a chunk belongs to a seed of another site": (table.site[owner] == sites).all(),
        "a seed's chunks are not as many as it took": np.array_equal(
            np.bincount(owner, minlength=table.capacity), table.num_chunks
        ),
        "a seed has no chunk": (table.num_chunks[held] > 0).all(),
        "a seed is dormant": (table.lifecycle[held] != Lifecycle.DORMANT).all(),
        "a free slot is not clean": all(clean),
        "seed ids are not unique and below next_seed_id": len(np.unique(ids)) == len(ids)
        and (ids < table.next_seed_id).all(),
        "alpha is not finite": np.isfinite(table.alpha).all(),
        "alpha is not 0 outside the forward pass": (table.alpha[silent] == 0).all(),
        "a seed at an end is paused": not (table.paused & is_terminal(table.lifecycle)).any(),
        "a counter of steps or generations is negative": (table.epochs_in_state >= 0).all()
        and (table.generation >= 0).all(),
        "a seed entered its state before it was born": (table.entered >= table.born).all(),
    }
    return [problem for problem, holds in checks.items() if not holds]
