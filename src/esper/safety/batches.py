"""Training batches that can be had again: what an exact restore and a resumed run need of their data."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from esper.errors import DataError, StateError
from esper.kasmina.isolation import preserved_rng

Source = Callable[[int], Any] | Sequence[Any] | Iterable[Any]


class Batches:
    """An endless iterator over training batches whose place can be saved and set; name it in ``track=``.

    A batch depends on ``seed`` and its place only: the global random streams are set from them while it is made
    (shuffling, augmentation, a loader's workers), and are afterwards as they were before.

    Parameters
    ----------
    source:
        A function of the step (0, 1, ...); or a sequence of batches, which begins anew after its end; or anything
        that can be iterated anew for each epoch, a ``DataLoader`` for instance (with workers or without). Going back
        in the latter reads its epoch again from the beginning.

    Attributes
    ----------
    position:
        Batches given so far.

    Raises
    ------
    DataError
        The source yields no batch.
    """

    rewinds = True

    def __init__(self, source: Source, *, seed: int = 0) -> None:
        self.source, self.seed = source, seed
        self.position = 0
        self.epoch = 0
        """Times that the source was begun anew (0 for a function)."""
        self._index = 0
        self._live: Iterator[Any] | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        batch = self._next()
        self.position += 1
        self._index += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"seed": self.seed, "position": self.position, "epoch": self.epoch, "index": self._index}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next batch, also of a loop that runs, be the one that followed :meth:`state_dict`.

        Raises
        ------
        StateError
            Keys are missing or unknown, or the seed is another one. Nothing was changed.
        """
        if set(state) != set(self.state_dict()) or state["seed"] != self.seed:
            raise StateError(
                f"batches of seed {self.seed} go on from a state with seed, position, epoch and index, got "
                f"{dict(state)!r}; pass what state_dict() returned to batches of the same seed"
            )
        self.position, self.epoch, self._index = state["position"], state["epoch"], state["index"]
        self._live = None

    # ---------------------------------------------------------------------------------------------- how

    def _next(self) -> Any:
        source: Any = self.source
        if callable(source):
            with _drawn_for(self.seed, 0, self.position):
                return source(self.position)
        if not hasattr(source, "__getitem__"):
            return self._of_epoch()
        if len(source) == 0:
            raise DataError("training batches must not run out, got an empty sequence; pass at least one batch")
        self.epoch, self._index = divmod(self.position, len(source))
        with _drawn_for(self.seed, self.epoch, self._index):
            return source[self._index]

    def _of_epoch(self) -> Any:
        """The next batch of an iterable, opened and skipped through where it is not at hand."""
        for _ in range(2):
            skipped = 0 if self._live is None else self._index
            while skipped <= self._index:
                with _drawn_for(self.seed, self.epoch, skipped):
                    if self._live is None:
                        self._live = self._opened()
                    batch = next(self._live, _END)
                if batch is _END:
                    break
                if skipped == self._index:
                    return batch
                skipped += 1
            self.epoch, self._index, self._live = self.epoch + 1, 0, None
        raise DataError("training batches must not run out, got an epoch without one; check the loader")

    def _opened(self) -> Iterator[Any]:
        source: Any = self.source
        set_epoch = getattr(getattr(source, "sampler", None), "set_epoch", None)
        if callable(set_epoch):  # a distributed sampler shuffles by it
            set_epoch(self.epoch)
        return iter(cast("Iterable[Any]", source))


_END = object()


@contextmanager
def _drawn_for(*place: int) -> Generator[None, None, None]:
    """Global random streams that follow from a place; on exit they are as before."""
    words = [int(word) for word in np.random.SeedSequence(place).generate_state(3)]
    with preserved_rng():
        random.seed(words[0])
        np.random.seed(words[1])
        torch.manual_seed(words[2])
        yield
