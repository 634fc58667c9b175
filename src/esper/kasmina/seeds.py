"""The state of all seeds of a model, as a structure of arrays.

Two families of NumPy arrays. *Chunk arrays* hold all sites end to end (:attr:`SeedTable.offsets` says where each site
begins). *Slot arrays* hold one entry a seed; a slot is handed out by :meth:`SeedTable.germinate_many` and given back by
:meth:`SeedTable.release`. ``owner`` maps a chunk to its slot, or -1.

Every method checks the whole request before it changes anything: a refused call leaves no trace. The table has a single
writer (``grower.step``) and takes no locks. No method loops over seeds or chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError, SiteError, TransitionError
from esper.kasmina.lifecycle import check, in_slot, is_terminal
from esper.kasmina.seed_arrays import Ints, SeedArrays
from esper.protocol import Lifecycle

MAX_EPOCHS = 32_767
"""Where ``epochs_in_state`` stops counting (int16)."""


class SeedTable(SeedArrays):
    """All seeds of a model; :class:`SeedArrays` documents the constructor and the arrays.

    Read the arrays freely; change them only through methods, and fetch them anew after a germination, which may
    replace them by longer ones.
    """

    # ---------------------------------------------------------------------------------------------------- look

    def occupied(self) -> Ints:
        """Slots that hold a seed, those at an end but not yet released included."""
        return np.flatnonzero(self.seed_id >= 0)

    def free_chunks(self, site: int, step: int) -> Ints:
        """Indices, within the site, of the chunks that nobody owns and that rest no longer."""
        rows = self._rows_of(site)
        return np.flatnonzero((self.owner[rows] < 0) & (self.embargo_until[rows] <= step))

    def num_free_chunks(self, step: int) -> Ints:
        """Free chunks of every site at once: ``(num_sites,)`` int64."""
        free = (self.owner < 0) & (self.embargo_until <= step)
        return np.add.reduceat(free, self.offsets[:-1], dtype=np.int64)

    def has_seeds(self) -> npt.NDArray[np.bool_]:
        """Which sites hold a seed, those at an end but not yet released included: ``(num_sites,)``."""
        return np.maximum.reduceat(self.owner, self.offsets[:-1]) >= 0

    def state_tensor(self, site: int) -> npt.NDArray[np.int32]:
        """``(C, 4)`` int32, a copy: state, blueprint, epochs in state, strategy of each chunk of a site.

        A dormant chunk's row is ``[0, -1, 0, -1]``: code 0 is a blueprint and a strategy like any other, so -1 says
        that there is none. A chunk shows its seed's end state until the seed is released.
        """
        owner = self.owner[self._rows_of(site)]
        fields = (self.lifecycle, self.blueprint, self.epochs_in_state, self.strategy)
        gathered = np.stack([field[owner] for field in fields], axis=1).astype(np.int32)
        return np.where((owner >= 0)[:, None], gathered, np.array([0, -1, 0, -1], dtype=np.int32))

    # -------------------------------------------------------------------------------------------------- change

    def germinate_many(
        self,
        sites: npt.ArrayLike,
        chunks: npt.ArrayLike,
        counts: npt.ArrayLike,
        *,
        cohort: npt.ArrayLike,
        blueprint: npt.ArrayLike,
        strategy: npt.ArrayLike,
        width: npt.ArrayLike,
        step: int,
    ) -> Ints:
        """Germinate N seeds at once: all or none.

        Parameters
        ----------
        sites:
            ``(N,)`` site of each seed.
        chunks, counts:
            ``(sum(counts),)`` chunk indices within the sites, seed after seed, and ``(N,)`` how many each seed takes.
        cohort, blueprint, strategy, width:
            One value for all, or ``(N,)``; not negative and within the array's type.
        step:
            Real optimizer step.

        Returns
        -------
        ``(N,)`` int64 slots, in state GERMINATED with alpha 0, and with increasing seed ids.

        Raises
        ------
        SiteError
            A site or chunk does not exist, is named twice, has an owner or rests under an embargo.
        ConfigError
            A code does not fit.
        """
        sites, counts = _integers("sites", sites), _integers("counts", counts)
        rows = self._free_rows(sites, _integers("chunks", chunks), counts, _code("step", step, np.int64))
        given = {"cohort": cohort, "blueprint": blueprint, "strategy": strategy, "width": width}
        values = {n: _codes(n, v, self.SLOT_FIELDS[n][0], sites.size) for n, v in given.items()}
        slots = self._free_slots(sites.size)
        for name, value in values.items():
            getattr(self, name)[slots] = value
        self.lifecycle[slots] = Lifecycle.GERMINATED
        self.site[slots], self.num_chunks[slots] = sites, counts
        self.seed_id[slots] = self.next_seed_id + np.arange(sites.size)
        self.born[slots] = self.entered[slots] = step
        self.owner[rows] = np.repeat(slots, counts)
        self.next_seed_id += sites.size
        return slots

    def transition(self, slots: npt.ArrayLike, target: Lifecycle, step: int) -> None:
        """Move seeds to another state: all or none. ``slots``: ``(N,)`` integers.

        A rolled-back seed's alpha becomes 0 at once. An end state lifts a pause, so that a culled branch can fade out.

        Raises
        ------
        TransitionError
            A slot holds no seed, or the table does not lead from its state to ``target``.
        """
        slots, step = self._seeds(slots), _code("step", step, np.int64)
        for source in np.flatnonzero(np.bincount(self.lifecycle[slots], minlength=1)):  # at most eleven
            check(int(source), target)
        self.lifecycle[slots] = target
        self.epochs_in_state[slots] = 0
        self.entered[slots] = step
        if is_terminal(target):
            self.paused[slots] = False
        if target == Lifecycle.ROLLED_BACK:
            self.alpha[slots] = 0

    def release(self, slots: npt.ArrayLike, step: int, embargo: int) -> None:
        """Give back the slots and chunks of seeds that reached an end: all or none.

        A fossilised seed's chunks are dormant again in the next generation, at once; others rest ``embargo`` steps.

        Raises
        ------
        TransitionError
            A seed is still active, or was culled or cancelled and its alpha is not 0 yet.
        """
        slots, step = self._seeds(slots), _code("step", step, np.int64)
        embargo = _code("embargo", embargo, np.int32)
        states = self.lifecycle[slots]
        self._refuse(slots, ~is_terminal(states), "only a seed at an end state can be released", "cull or cancel it")
        fading = in_slot(states) & (self.alpha[slots] != 0)
        self._refuse(slots, fading, "alpha must be 0 before release", "ramp it down first")
        if slots.size == 0:
            return
        first, last = self.offsets[self.site[slots].min()], self.offsets[self.site[slots].max() + 1]
        leaving = np.zeros(self.capacity + 1, dtype=np.bool_)  # the last entry answers for owner -1
        leaving[slots] = True
        rows = first + np.flatnonzero(leaving[self.owner[first:last]])
        fossil = self.lifecycle[self.owner[rows]] == Lifecycle.FOSSILIZED
        self.generation[rows[fossil]] += 1
        self.embargo_until[rows[~fossil]] = step + embargo
        self.owner[rows] = -1
        for name, (_, empty) in self.SLOT_FIELDS.items():
            getattr(self, name)[slots] = empty

    def tick(self, slots: npt.ArrayLike | None = None, n: int = 1) -> None:
        """Count ``n`` more steps in the state, for some seeds or for all; paused ones stand still."""
        if type(n) is not int or not 0 <= n <= MAX_EPOCHS:  # in every step it is 1
            n = min(_code("n", n, np.int64), MAX_EPOCHS)
        running = ~self.paused & (self.seed_id >= 0)
        if slots is not None:
            chosen = np.zeros_like(running)
            chosen[self._seeds(slots)] = True
            running &= chosen
        room = np.int16(MAX_EPOCHS - n)
        np.add(np.minimum(self.epochs_in_state, room), np.int16(n), out=self.epochs_in_state, where=running)

    def set_alpha(self, slots: npt.ArrayLike, alpha: npt.ArrayLike) -> None:
        """Set how much of a branch is blended in: one value or ``(N,)``, finite; all or none.

        Raises
        ------
        ConfigError
            A value is not finite in float32.
        TransitionError
            A seed's branch is not in its slot's forward pass (see the table) and the value is not 0.
        """
        slots = self._seeds(slots)
        with np.errstate(over="ignore"):
            values = np.broadcast_to(np.asarray(alpha, dtype=np.float32), slots.shape)
        if not np.isfinite(values).all():
            raise ConfigError(f"alpha must be finite, got {values[~np.isfinite(values)][0]}; check the strategy")
        outside = ~in_slot(self.lifecycle[slots]) & (values != 0)
        self._refuse(slots, outside, "alpha must be 0 outside the forward pass", "set it from GRAFTING on")
        self.alpha[slots] = values

    def set_paused(self, slots: npt.ArrayLike, paused: bool) -> None:
        """Pause active seeds (``epochs_in_state`` stands still) or let them go on: all or none."""
        slots = self._seeds(slots)
        self._refuse(slots, is_terminal(self.lifecycle[slots]), "only an active seed can be paused", "let it end")
        self.paused[slots] = paused

    # ------------------------------------------------------------------------------------------------- private

    def _rows_of(self, site: int) -> slice:
        if not 0 <= site < self.num_sites:
            raise SiteError(f"a site must be between 0 and {self.num_sites - 1}, got {site}; see the list of sites")
        return slice(int(self.offsets[site]), int(self.offsets[site + 1]))

    def _refuse(self, slots: Ints, bad: npt.NDArray[np.bool_], rule: str, remedy: str) -> None:
        if bad.any():
            slot = int(slots[bad][0])
            state = Lifecycle(self.lifecycle[slot]).name
            raise TransitionError(f"{rule}, got slot {slot} in {state} (alpha {self.alpha[slot]:.6g}); {remedy}")

    def _seeds(self, slots: npt.ArrayLike) -> Ints:
        """Slots as int64, each of them holding a seed."""
        checked = _integers("slots", slots)
        outside = np.zeros(0, dtype=np.int64)
        if checked.size and (checked.min() < 0 or checked.max() >= self.capacity):
            outside = checked[(checked < 0) | (checked >= self.capacity)]
        free = outside if outside.size else checked[self.seed_id[checked] < 0]
        if free.size:
            raise TransitionError(f"a slot must hold a seed, got {free[0]}; see occupied()")
        return checked

    def _free_slots(self, count: int) -> Ints:
        """The lowest free slots; capacity doubles until they suffice."""
        capacity = self.capacity
        needed = capacity - int(np.count_nonzero(self.seed_id < 0)) + count
        while capacity < needed:
            capacity *= 2
        for name, (dtype, empty) in self.SLOT_FIELDS.items() if capacity > self.capacity else ():
            old: npt.NDArray[Any] = getattr(self, name)
            setattr(self, name, np.concatenate((old, np.full(capacity - len(old), empty, dtype=dtype))))
        return np.flatnonzero(self.seed_id < 0)[:count]

    def _free_rows(self, sites: Ints, chunks: Ints, counts: Ints, step: int) -> Ints:
        """Rows of the chunk arrays that a germination takes, checked."""
        if counts.size != sites.size or (counts < 1).any() or int(counts.sum()) != chunks.size:
            raise SiteError(
                f"each seed takes at least one chunk, got {sites.size} sites, {counts.size} counts with sum "
                f"{counts.sum()} and {chunks.size} chunks; pass one count a site and as many chunks as their sum"
            )
        absent = (sites < 0) | (sites >= self.num_sites)
        if absent.any():
            raise SiteError(f"a site must be between 0 and {self.num_sites - 1}, got {sites[absent][0]}")
        at = np.repeat(sites, counts)
        size = np.diff(self.offsets)[at]
        rows = self.offsets[at] + np.clip(chunks, 0, size - 1)
        named_twice = np.ones(rows.size, dtype=np.bool_)
        named_twice[np.unique(rows, return_index=True)[1]] = False
        for bad, rule in (
            ((chunks < 0) | (chunks >= size), "a chunk must exist at its site"),
            (named_twice, "a chunk can be named once"),
            (self.owner[rows] >= 0, "a chunk must have no live seed"),
            (self.embargo_until[rows] > step, "a chunk must not rest under an embargo"),
        ):
            if bad.any():
                raise SiteError(
                    f"{rule}, got chunk {chunks[bad][0]} of site {at[bad][0]} ({size[bad][0]} chunks) at step {step}; "
                    f"see free_chunks({at[bad][0]}, {step})"
                )
        return rows


def _integers(name: str, values: npt.ArrayLike) -> Ints:
    array = np.asarray(values).reshape(-1)
    if array.size and array.dtype.kind not in "iu":  # a mask of bool would silently read as slots 0 and 1
        raise ConfigError(f"{name} must be integers, got {array.dtype}; use np.flatnonzero on a mask")
    return array.astype(np.int64)


def _codes(name: str, values: npt.ArrayLike, dtype: type[np.generic], size: int) -> Ints:
    """Integers that are not negative and fit an array's type: one for all, or one each."""
    array = _integers(name, values)
    if array.size not in (1, size):
        raise ConfigError(f"{name} must be one value or {size}, got {array.size}; pass one a seed")
    limit = (1 << (8 * np.dtype(dtype).itemsize - 1)) - 1  # all of them are signed
    outside = (array < 0) | (array > limit)
    if outside.any():
        raise ConfigError(f"{name} must be between 0 and {limit}, got {array[outside][0]}; the array cannot hold it")
    return np.broadcast_to(array, (size,))


def _code(name: str, value: int, dtype: type[np.generic]) -> int:
    return int(_codes(name, value, dtype, 1)[0])
