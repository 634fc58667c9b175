"""Faults at chosen file operations, over any disk: the real one too."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeVar

from esper.safety.disk import Disk, Handle, Lock
from esper.safety.simulation.disk import SimulatedHandle

T = TypeVar("T")
Fault = str
"""``death`` ends the process before the operation, ``half`` in the middle of a write; ``short`` writes a part and fails
with ENOSPC; any other is the name of an errno: ENOSPC, EIO, EACCES."""


class ProcessDeath(BaseException):
    """The simulated process is gone. Not an ``Exception``: no handler of the code under test may go on."""


class FaultyDisk:
    """Counts file operations and lets some of them fail.

    Parameters
    ----------
    faults:
        By number of the operation, counted from 0.
    skipped_syncs:
        Syncs, counted from 0, that do nothing: a planted bug.
    die:
        What death is; by default :class:`ProcessDeath` is raised.
    """

    def __init__(
        self,
        disk: Disk,
        faults: Mapping[int, Fault] | None = None,
        *,
        skipped_syncs: frozenset[int] = frozenset(),
        die: Callable[[], NoReturn] | None = None,
    ) -> None:
        self._disk, self.faults, self._skipped = disk, dict(faults or {}), skipped_syncs
        self._die = die or _raise_death
        self.num_operations = 0
        self.num_syncs = 0
        self.log: list[str] = []
        self._is_dead = False

    def exists(self, path: Path) -> bool:
        return self._disk.exists(path)

    def make_folder(self, path: Path) -> None:
        self.operate("make_folder", path, lambda: self._disk.make_folder(path))

    def create(self, path: Path) -> Handle:
        return self.operate("create", path, lambda: FaultyHandle(self, self._disk.create(path), path))

    def open_log(self, path: Path) -> Handle:
        return self.operate("open_log", path, lambda: FaultyHandle(self, self._disk.open_log(path), path))

    def read(self, path: Path, limit: int) -> bytes:
        return self.operate("read", path, lambda: self._disk.read(path, limit))

    def names(self, folder: Path) -> list[str]:
        return self.operate("names", folder, lambda: self._disk.names(folder))

    def rename(self, old: Path, new: Path) -> None:
        self.operate("rename", new, lambda: self._disk.rename(old, new))

    def unlink(self, path: Path) -> None:
        self.operate("unlink", path, lambda: self._disk.unlink(path))

    def sync_folder(self, folder: Path) -> None:
        self.sync("sync_folder", folder, lambda: self._disk.sync_folder(folder))

    def lock(self, path: Path) -> Lock:
        return self.operate("lock", path, lambda: self._disk.lock(path))

    def operate(self, kind: str, path: Path, action: Callable[[], T], handle: Handle | None = None) -> T:
        """Do ``action``, or what the plan has in its place."""
        if self._is_dead:
            self._die()
        number, self.num_operations = self.num_operations, self.num_operations + 1
        fault = self.faults.get(number)
        self.log.append(f"{number} {kind} {path.name}{f' {fault}' if fault else ''}")
        if fault is None:
            return action()
        if fault in ("death", "half"):
            self._is_dead = True
            self._die()
        if kind == "sync" and isinstance(handle, SimulatedHandle):
            handle.fail_to_sync()
        code = errno.ENOSPC if fault == "short" else getattr(errno, fault)
        raise OSError(code, os.strerror(code), str(path))

    def sync(self, kind: str, path: Path, action: Callable[[], None], handle: Handle | None = None) -> None:
        number, self.num_syncs = self.num_syncs, self.num_syncs + 1
        self.operate(kind, path, _nothing if number in self._skipped else action, handle)

    def next_fault(self) -> Fault | None:
        return self.faults.get(self.num_operations)


class FaultyHandle:
    """A file whose every operation counts."""

    def __init__(self, disk: FaultyDisk, handle: Handle, path: Path) -> None:
        self._disk, self._handle, self._path = disk, handle, path

    def write(self, data: bytes) -> None:
        if self._disk.next_fault() in ("half", "short"):
            self._handle.write(data[: len(data) // 2])
        self._disk.operate("write", self._path, lambda: self._handle.write(data))

    def sync(self) -> None:
        self._disk.sync("sync", self._path, self._handle.sync, self._handle)

    def truncate(self, size: int) -> None:
        self._disk.operate("truncate", self._path, lambda: self._handle.truncate(size))

    def close(self) -> None:
        self._handle.close()


def _raise_death() -> NoReturn:
    raise ProcessDeath


def _nothing() -> None:
    """A sync that was forgotten."""
