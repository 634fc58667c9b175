"""What is kept of one training while it goes on, and its result: a folder of checkpoints below the run directory."""

from __future__ import annotations

import dataclasses
import hashlib
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from esper.errors import StateError
from esper.protocol import AnyEvent, Germinated
from esper.safety.checkpoint import Checkpoints
from esper.safety.tree import Tree

if TYPE_CHECKING:
    from esper.runs.arms import Cell, Trained

KIND = "training of a run"
SAVING_SHARE = 0.02
"""Largest share of a training's time that goes into checkpoints which are not due yet: cheap ones are written more
often than asked for, so that less is lost."""
SOONEST_S = 1.0
"""Seconds between two checkpoints, however cheap they are, unless more were asked for."""
_ENCODED = ("widths", "kept", "events")
"""Fields of a result that are no state trees; all others are kept as they are, whatever they come to be."""
_OWN = ("cell", "done")


class CellStore:
    """Checkpoints of one training; the newest is its result once it is finished.

    Parameters
    ----------
    every_s:
        Most seconds of training that an interruption may cost; 0 saves after every step.
    """

    def __init__(self, folder: Path, cell: Cell, every_s: float) -> None:
        self._cell, self._every_s = cell, every_s
        self.commands_path = folder / "commands.jsonl"
        """Where the log of this training's commands belongs: it lives as long as the checkpoints that go with it."""
        self._checkpoints = Checkpoints(folder, kind=KIND)
        loaded = self._checkpoints.load()
        self._kept: Tree = None if loaded is None else loaded.tree
        if self._kept is not None and self._kept["cell"] != fingerprint(cell):
            self.close()
            raise StateError(
                f"a training is resumed with the settings it was saved with, got others in {folder}; use --fresh"
            )
        self._saved_at = time.monotonic()
        self._cost_s = 0.0
        """What the last checkpoint took."""
        self._is_warned = False

    @property
    def progress(self) -> Tree | None:
        """What :meth:`save` has kept of a training that is not finished."""
        return None if self._kept is None or self._kept["done"] else self._kept

    @property
    def finished(self) -> dict[str, Any] | None:
        """The fields of a finished training."""
        if self._kept is None or not self._kept["done"]:
            return None
        kept = msgspec.msgpack.decode(bytes(self._kept["kept"]), type=tuple[Germinated, ...])
        plain = {name: value for name, value in self._kept.items() if name not in (*_OWN, *_ENCODED)}
        return {**plain, "widths": tuple(self._kept["widths"]), "kept": kept, "events": decode_events(self._kept)}

    def is_due(self) -> bool:
        """Whether the next checkpoint should be written."""
        soonest = min(self._every_s, max(SOONEST_S, self._cost_s / SAVING_SHARE))
        return time.monotonic() - self._saved_at >= soonest

    def save(self, training: Tree, *, step: int, seconds: float, events: list[AnyEvent]) -> str | None:
        """Keep how far the training is. A disk that refuses costs the checkpoint, not the training; returns why."""
        refusal: str | None = None
        began = time.monotonic()
        fields = {"step": step, "seconds": seconds, "events": _bytes(events), "training": training}
        try:
            self._checkpoints.save({"cell": fingerprint(self._cell), "done": False, **fields}, step=step)
        except StateError as error:
            refusal = str(error)
            self._warn(error)
        self._saved_at = time.monotonic()
        self._cost_s = self._saved_at - began
        return refusal

    def finish(self, trained: Trained) -> None:
        """Keep the result in the place of what led to it."""
        names = [field.name for field in dataclasses.fields(trained) if field.name not in (*_OWN, *_ENCODED)]
        fields: dict[str, Any] = {name: getattr(trained, name) for name in names}
        fields |= {"widths": list(trained.widths), "kept": _bytes(trained.kept), "events": _bytes(trained.events)}
        self._checkpoints.keep = 1
        try:
            done = {"cell": fingerprint(self._cell), "done": True, **fields}
            self._checkpoints.save(done, step=self._cell.steps)
        except StateError as error:
            self._warn(error)

    def close(self) -> None:
        """Let another process have the folder."""
        self._checkpoints.close()

    def _warn(self, error: StateError) -> None:
        if not self._is_warned:
            self._is_warned = True
            warnings.warn(f"the run goes on without a new checkpoint: {error}", RuntimeWarning, stacklevel=3)


def decode_events(kept: Tree) -> list[AnyEvent]:
    """The events of a training, oldest first."""
    return msgspec.msgpack.decode(bytes(kept["events"]), type=list[AnyEvent])


def folder_name(cell: Cell) -> str:
    return f"{cell.arm}-seed{cell.seed}-lr{cell.lr:g}"


def fingerprint(cell: Cell) -> str:
    """What a training is made of beside the run's configuration, which is compared by itself."""
    parts = (cell.arm, cell.seed, cell.lr, cell.steps, list(cell.widths), cell.device, cell.size)
    return hashlib.sha256(repr(parts).encode() + msgspec.msgpack.encode(cell.schedule)).hexdigest()


def _bytes(value: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(msgspec.msgpack.encode(value), dtype=np.uint8)
