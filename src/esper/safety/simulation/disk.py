"""A disk with a page cache, in memory: what was not synced may be lost, torn or reordered when the power goes.

Stricter than most file systems on purpose. Every write since the last sync of its file survives, is lost or is torn at
a sector, each on its own; every change of a folder's list of names since the folder's last sync survives or is lost,
each on its own (a rename is one change). A killed process loses nothing, as on a real machine.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 64
"""Smaller than a real sector (512 bytes), so that small files tear too."""


@dataclass
class _File:
    """Content as processes see it, as the disk has it, and the writes in between as ``(offset, data)``."""

    seen: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list[tuple[int, "bytes | None"]])
    """``None`` cuts the file off at the offset."""


_Change = tuple[str, str, "_File | None"]
"""``(name that goes, name that comes, its file)``; an empty name is none."""


@dataclass
class _Folder:
    seen: dict[str, _File] = field(default_factory=dict[str, _File])
    durable: dict[str, _File] = field(default_factory=dict[str, _File])
    pending: list[_Change] = field(default_factory=list[_Change])

    def change(self, change: _Change) -> None:
        _apply(self.seen, change)
        self.pending.append(change)


class SimulatedDisk:
    """Implements :class:`esper.safety.disk.Disk`. ``root`` exists; folders are made below it."""

    def __init__(self, root: Path = Path("/simulated")) -> None:
        self.root = root
        self._folders: dict[Path, _Folder] = {root: _Folder()}
        self._durable_folders: set[Path] = {root}
        self._locks: dict[Path, SimulatedLock] = {}

    # ---------------------------------------------------------------------------------------------- what ends a process

    def kill(self) -> None:
        """The process ends: its locks are free; what it has written stays."""
        self._locks.clear()

    def cut_power(self, rng: random.Random) -> None:
        """Everything ends; of what was not synced, ``rng`` chooses what is left."""
        self.kill()
        for path in [path for path in self._folders if path not in self._durable_folders and rng.random() < 0.5]:
            for lost in [other for other in self._folders if other == path or path in other.parents]:
                del self._folders[lost]
        for folder in self._folders.values():
            for change in folder.pending:
                if rng.random() < 0.5:
                    _apply(folder.durable, change)
            folder.pending.clear()
            folder.seen = dict(folder.durable)
            for file in folder.seen.values():
                _settle(file, rng)
                file.seen = bytearray(file.durable)
        self._durable_folders &= set(self._folders)

    # ---------------------------------------------------------------------------------------------- file operations

    def exists(self, path: Path) -> bool:
        return path in self._folders or path.name in self._list(path.parent, missing_ok=True)

    def make_folder(self, path: Path) -> None:
        if path in self._folders:
            raise FileExistsError(errno.EEXIST, "it exists", str(path))
        self._list(path.parent)
        self._folders[path] = _Folder()

    def create(self, path: Path) -> SimulatedHandle:
        if path.name in self._list(path.parent):
            raise FileExistsError(errno.EEXIST, "it exists", str(path))
        return SimulatedHandle(self._new(path))

    def open_log(self, path: Path) -> SimulatedHandle:
        names = self._list(path.parent)
        return SimulatedHandle(names[path.name] if path.name in names else self._new(path))

    def read(self, path: Path, limit: int) -> bytes:
        data = bytes(self._file(path).seen)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
        return data

    def names(self, folder: Path) -> list[str]:
        return sorted(self._list(folder))

    def rename(self, old: Path, new: Path) -> None:
        self._folders[old.parent].change((old.name, new.name, self._file(old)))

    def unlink(self, path: Path) -> None:
        self._file(path)
        self._folders[path.parent].change((path.name, "", None))

    def sync_folder(self, folder: Path) -> None:
        self._list(folder)
        entries = self._folders[folder]
        entries.durable = dict(entries.seen)
        entries.pending.clear()
        self._durable_folders |= {path for path in self._folders if path.parent == folder}

    def lock(self, path: Path) -> SimulatedLock:
        self._list(path.parent)
        if path in self._locks:
            raise BlockingIOError(errno.EWOULDBLOCK, "held by another writer", str(path))
        self._locks[path] = SimulatedLock(self._locks, path)
        return self._locks[path]

    # ---------------------------------------------------------------------------------------------- for tests

    def overwrite(self, path: Path, data: bytes) -> None:
        """Put something else on the disk in the place of a file's content, as rot or an attacker does."""
        file = self._file(path)
        file.seen, file.durable = bytearray(data), bytearray(data)
        file.pending.clear()

    def content(self) -> dict[str, bytes]:
        """Every file as processes see it, by path."""
        return {
            str(place / name): bytes(file.seen)
            for place, folder in self._folders.items()
            for name, file in folder.seen.items()
        }

    def _list(self, folder: Path, *, missing_ok: bool = False) -> dict[str, _File]:
        if folder not in self._folders:
            if missing_ok:
                return {}
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
        return self._folders[folder].seen

    def _file(self, path: Path) -> _File:
        names = self._list(path.parent)
        if path.name not in names:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        return names[path.name]

    def _new(self, path: Path) -> _File:
        file = _File()
        self._folders[path.parent].change(("", path.name, file))
        return file


class SimulatedHandle:
    """An open file."""

    def __init__(self, file: _File) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        self._file.pending.append((len(self._file.seen), bytes(data)))
        self._file.seen += data

    def sync(self) -> None:
        for offset, data in self._file.pending:
            _write(self._file.durable, offset, data)
        self._file.pending.clear()

    def fail_to_sync(self) -> None:
        """What Linux does when a sync fails: the pages count as clean, and no later sync writes them.

        Processes go on seeing what they wrote until the power is cut.
        """
        _settle(self._file, random.Random(len(self._file.seen)))

    def truncate(self, size: int) -> None:
        self._file.pending.append((size, None))
        _write(self._file.seen, size, None)

    def close(self) -> None:
        """Nothing is synced by closing."""


class SimulatedLock:
    """A lock that ends with its process."""

    def __init__(self, locks: dict[Path, SimulatedLock], path: Path) -> None:
        self._locks, self._path = locks, path

    def close(self) -> None:
        if self._locks.get(self._path) is self:
            del self._locks[self._path]


def _apply(names: dict[str, _File], change: _Change) -> None:
    old, new, file = change
    names.pop(old, None)
    if file is not None:
        names[new] = file


def _write(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        return
    content.extend(bytes(max(0, offset + len(data) - len(content))))  # a hole reads as zeros
    content[offset : offset + len(data)] = data


def _settle(file: _File, rng: random.Random) -> None:
    """Choose which of the unsynced writes have reached the disk, and in what state."""
    waiting = list(file.pending)
    rng.shuffle(waiting)
    for offset, data in waiting:
        fate = rng.choice(("whole", "front", "sectors", "lost"))
        if fate == "whole" or (data is None and fate == "front"):
            _write(file.durable, offset, data)
        elif data is not None and fate == "front":
            _write(file.durable, offset, data[: rng.randrange(len(data) + 1)])
        elif data is not None and fate == "sectors":  # the length, and some sectors in any order
            _write(file.durable, offset, bytes(len(data)))
            for start in range(0, len(data), SECTOR):
                if rng.random() < 0.5:
                    _write(file.durable, offset + start, data[start : start + SECTOR])
    file.pending.clear()
