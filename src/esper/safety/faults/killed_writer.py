"""A process that is killed while it writes a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from esper.safety.disk import Handle, LocalDisk
from esper.safety.faults.disks import folder_of, under_writers
from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.simulation.faults import FaultyDisk, ProcessDeath

T = TypeVar("T")
OPERATIONS = 9
"""Changes that a save makes to the disk, the fewest: two files written, synced and renamed, and the folder synced."""
_CHANGES = ("create", "write", "sync", "rename", "sync_folder")


@FAULTS.register("killed_writer")
class KilledWriter(Fault):
    """What was acknowledged is there for the next process, and training goes on from it.

    Death is a ``ProcessDeath`` in the place of a file operation (which one follows from the folder's name): no handler
    of the code under test goes on. The harness lets go of the dead process's lock, as the system does.
    """

    does = "the process dies before one of the file operations of a save"
    moment, expects = Moment.SAVING, Expectation.SURVIVES
    leaves_no_trace = True

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()
        last = zlib.crc32(folder_of(subject).name.encode()) % OPERATIONS
        with under_writers(lambda: LocalDisk() if strikes.num else _Dying(strikes, last)):  # the next process lives
            yield strikes


class _Dying(FaultyDisk):
    """Dies before the change number ``last`` since the first new file."""

    def __init__(self, strikes: Strikes, last: int) -> None:
        super().__init__(LocalDisk())
        self._strikes, self._left, self._begun = strikes, last, False

    def operate(self, kind: str, path: Path, action: Callable[[], T], handle: Handle | None = None) -> T:
        self._begun = self._begun or kind == "create"
        if self._strikes.num:
            raise ProcessDeath
        if self._begun and kind in _CHANGES:
            if self._left == 0:
                self._strikes.num += 1
                raise ProcessDeath
            self._left -= 1
        return super().operate(kind, path, action, handle)
