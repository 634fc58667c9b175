"""A disk without room for another checkpoint."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from esper.safety.disk import Handle, LocalDisk
from esper.safety.faults.disks import under_writers
from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject


@FAULTS.register("full_disk")
class FullDisk(Fault):
    """The save is refused and says why; what is on the disk is as it was, and training goes on."""

    does = "every write of a checkpoint stops in its middle with ENOSPC"
    moment, expects = Moment.SAVING, Expectation.REFUSED
    leaves_no_trace = True

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()
        with under_writers(lambda: _Full(strikes)):
            yield strikes


class _Full(LocalDisk):
    def __init__(self, strikes: Strikes) -> None:
        self._strikes = strikes

    def create(self, path: Path) -> Handle:
        return _FullHandle(super().create(path), self._strikes)


class _FullHandle:
    """A file that takes the first half of what is written."""

    def __init__(self, handle: Handle, strikes: Strikes) -> None:
        self._handle, self._strikes = handle, strikes
        self.sync, self.truncate, self.close = handle.sync, handle.truncate, handle.close

    def write(self, data: bytes) -> None:
        self._handle.write(data[: len(data) // 2])
        self._strikes.num += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
