"""``StateManager``: one site's :class:`~esper.kasmina.seeds.SeedTable`, a seed a chunk, seen as tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.errors import ConfigError, TransitionError
from esper.kasmina.chunks import is_whole
from esper.kasmina.lifecycle import check, is_active
from esper.kasmina.seeds import SeedTable
from esper.protocol import Lifecycle

Ints = npt.NDArray[np.int64]
_FIELDS = ("lifecycle", "blueprint", "strategy")


class StateManager:
    """States of ``num_seeds`` seeds as a structure of arrays; all dormant at first.

    Reads return copies on the CPU. Writes go through :class:`~esper.kasmina.seeds.SeedTable`, so that the lifecycle's
    table holds: what it does not allow is refused as a whole and changes nothing. Updates are atomic: a lock lets one
    thread in at a time.

    Raises
    ------
    ConfigError
        ``num_seeds`` is not a whole number of at least 1.
    """

    def __init__(self, num_seeds: int) -> None:
        if not is_whole(num_seeds) or num_seeds < 1:
            raise ConfigError(f"num_seeds must be a whole number of at least 1, got {num_seeds!r}; pass an int")
        self.num_seeds = int(num_seeds)
        self._table = SeedTable([num_seeds], [num_seeds])
        self._lock = threading.Lock()

    @property
    def state_tensor(self) -> Tensor:
        """``(num_seeds, 4)`` int32: state, blueprint, epochs in state, strategy; dormant seeds ``[0, -1, 0, -1]``."""
        with self._lock:
            return torch.from_numpy(self._table.state_tensor(0))

    @property
    def lifecycle_states(self) -> Tensor:
        """``(num_seeds,)`` int8 codes of :class:`~esper.compat.ExtendedLifecycle`."""
        return self.state_tensor[:, 0].to(torch.int8)

    @property
    def blueprint_ids(self) -> Tensor:
        """``(num_seeds,)`` int32; -1 for dormant seeds."""
        return self.state_tensor[:, 1].contiguous()

    @property
    def epochs_in_state(self) -> Tensor:
        """``(num_seeds,)`` int16; stops at 32,767."""
        return self.state_tensor[:, 2].to(torch.int16)

    @property
    def grafting_strategies(self) -> Tensor:
        """``(num_seeds,)`` int8; -1 for dormant seeds."""
        return self.state_tensor[:, 3].to(torch.int8)

    def batch_update(
        self, seed_indices: Tensor | npt.ArrayLike, updates: Mapping[str, Tensor | npt.ArrayLike], *, step: int = 0
    ) -> None:
        """Update N seeds at once, all or none; the same as updating them one by one in this order.

        Parameters
        ----------
        seed_indices:
            ``(N,)`` integers, each named once.
        updates:
            One value or ``(N,)`` integers by name. ``lifecycle``: the next state. ``blueprint``: for seeds that
            germinate (0 when left out); a live seed keeps its own. ``strategy``: for seeds that germinate (0 when left
            out) or are active.
        step:
            Real optimizer step at which this happens.

        Raises
        ------
        TransitionError
            The table does not lead from a seed's state to the wanted one, or an update is of no use in its state.
        SiteError
            A seed that is to germinate rests under an embargo.
        ConfigError
            An index, a code or a name is out of range.
        """
        if not isinstance(updates, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # untyped callers
            raise ConfigError(
                f"updates must be a mapping by name, got {type(updates).__name__}; pass {{'lifecycle': ...}}"
            )
        with self._lock:
            seeds = self.indices(seed_indices)
            given = {name: _values(name, value, seeds.size) for name, value in updates.items()}
            owner = self._table.owner[seeds].astype(np.int64)
            now = np.where(owner >= 0, self._table.lifecycle[owner], Lifecycle.DORMANT)
            targets = given.get("lifecycle", now)
            if "lifecycle" in given:
                for source, target in np.unique(np.stack([now, targets], axis=1), axis=0):  # at most 121
                    check(int(source), int(target))
            sprouts = (now == Lifecycle.DORMANT) & (targets == Lifecycle.GERMINATED)
            self._check_codes(given, owner, sprouts, targets)
            self._write(given, seeds, owner, sprouts, targets, step)

    def tick(self, seed_indices: Tensor | npt.ArrayLike | None = None, n: int = 1) -> None:
        """Count ``n`` more epochs in the state of some live seeds, or of all of them."""
        with self._lock:
            self._table.tick(None if seed_indices is None else self._owners(seed_indices), n)

    def release(self, seed_indices: Tensor | npt.ArrayLike, *, step: int = 0, embargo: int = 0) -> None:
        """Make seeds at an end dormant again; those not fossilised rest ``embargo`` steps before they may germinate.

        Raises
        ------
        TransitionError
            A seed is not at an end, or its alpha is not 0.
        """
        with self._lock:
            self._table.release(self._owners(seed_indices), step, embargo)

    def indices(self, seed_indices: Tensor | npt.ArrayLike) -> Ints:
        """``(N,)`` int64 of existing seeds, each named once. Raises ``ConfigError`` for any other."""
        seeds = _integers("seed_indices", seed_indices, "use torch.nonzero on a mask")
        outside = (seeds < 0) | (seeds >= self.num_seeds)
        if outside.any():
            raise ConfigError(
                f"seed_indices must be between 0 and {self.num_seeds - 1}, got {seeds[outside][0]}; see num_seeds"
            )
        if np.unique(seeds).size < seeds.size:
            raise ConfigError("a seed can be named once in an update, got one twice; make two updates")
        return seeds

    # ------------------------------------------------------------------------------------------------- private

    def _owners(self, indices: Tensor | npt.ArrayLike) -> Ints:
        seeds = self.indices(indices)
        owner = self._table.owner[seeds].astype(np.int64)
        if (owner < 0).any():
            raise TransitionError(f"a seed must have germinated, got {seeds[owner < 0][0]}, which is dormant")
        return owner

    def _check_codes(
        self, given: Mapping[str, Ints], owner: Ints, sprouts: npt.NDArray[np.bool_], targets: Ints
    ) -> None:
        """Everything that could fail after the first array was written."""
        for name, dtype in (("blueprint", np.int16), ("strategy", np.int8)):
            codes = given.get(name, np.zeros(0, dtype=np.int64))
            outside = (codes < 0) | (codes > np.iinfo(dtype).max)
            if outside.any():
                raise ConfigError(f"{name} must be between 0 and {np.iinfo(dtype).max}, got {codes[outside][0]}")
        if "blueprint" in given:
            other = (owner < 0) | (self._table.blueprint[owner] != given["blueprint"])
            _refuse(~sprouts & other, targets, "a seed's blueprint is chosen when it germinates")
        if "strategy" in given:
            _refuse(~sprouts & ~is_active(targets), targets, "a seed has a strategy from germination to its end")

    def _write(
        self,
        given: Mapping[str, Ints],
        seeds: Ints,
        owner: Ints,
        sprouts: npt.NDArray[np.bool_],
        targets: Ints,
        step: int,
    ) -> None:
        table, zeros = self._table, np.zeros(seeds.size, dtype=np.int64)
        if sprouts.any():  # first: an embargo is refused here, before anything is written
            table.germinate_many(
                np.zeros(int(sprouts.sum()), dtype=np.int64), seeds[sprouts], np.ones(int(sprouts.sum()), np.int64),
                cohort=0, blueprint=given.get("blueprint", zeros)[sprouts],
                strategy=given.get("strategy", zeros)[sprouts], width=1, step=step,
            )  # fmt: skip
        if "lifecycle" in given:
            for target in np.unique(targets[~sprouts]):
                table.transition(owner[~sprouts & (targets == target)], Lifecycle(int(target)), step)
        if "strategy" in given:
            table.strategy[owner[~sprouts]] = given["strategy"][~sprouts]


def _refuse(bad: npt.NDArray[np.bool_], targets: Ints, rule: str) -> None:
    if bad.any():
        raise TransitionError(f"{rule}, got one for a seed in {Lifecycle(int(targets[bad][0])).name}; leave it out")


def _integers(name: str, values: Tensor | npt.ArrayLike, remedy: str) -> Ints:
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except ValueError as error:
        raise ConfigError(f"{name} must be integers, got lists of several lengths; {remedy}") from error
    if array.size and array.dtype.kind not in "iu":  # a mask of bool would silently read as seeds 0 and 1
        raise ConfigError(f"{name} must be integers, got {array.dtype}; {remedy}")
    return array.reshape(-1).astype(np.int64)


def _values(name: str, values: Tensor | npt.ArrayLike, size: int) -> Ints:
    if name not in _FIELDS:
        raise ConfigError(f"an update must be one of {', '.join(_FIELDS)}, got {name!r}; epochs are counted by tick()")
    array = _integers(name, values, "pass codes")
    if array.size not in (1, size):
        raise ConfigError(f"{name} must be one value or {size}, got {array.size}; pass one a seed")
    return np.broadcast_to(array, (size,))
