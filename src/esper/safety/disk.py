"""The few file operations that checkpoints and the command log are made of, so that a test can stand in for the disk.

Nothing here follows a symbolic link in the last part of a path, and new files are private (0600) and must be new: what
somebody else has put in the way is an error, never written through.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from esper.files import lock_exclusively, sync

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)
"""A named pipe in the place of a file must not make its reader wait for ever."""


class Handle(Protocol):
    """An open file that is written at its end."""

    def write(self, data: bytes) -> None:
        """Append all of ``data``; after an error any part of it may be there."""
        ...

    def sync(self) -> None:
        """Force the content to the disk. After an error nothing is known of what was not on it before."""
        ...

    def truncate(self, size: int) -> None: ...

    def close(self) -> None: ...


class Lock(Protocol):
    """Held until closed, or until the process ends in whatever way."""

    def close(self) -> None: ...


class Disk(Protocol):
    """File operations. Each may raise ``OSError``; each is one point at which the process can die."""

    def exists(self, path: Path) -> bool: ...

    def make_folder(self, path: Path) -> None:
        """Make one folder (0700); its parent must exist."""
        ...

    def create(self, path: Path) -> Handle:
        """Open a file that must not exist yet."""
        ...

    def open_log(self, path: Path) -> Handle:
        """Open a file for appending, new or old."""
        ...

    def read(self, path: Path, limit: int) -> bytes:
        """The whole of a regular file; ``OSError`` (EFBIG) if it has more than ``limit`` bytes."""
        ...

    def names(self, folder: Path) -> list[str]:
        """Names in a folder, sorted."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name in one step; what had that name is gone."""
        ...

    def unlink(self, path: Path) -> None: ...

    def sync_folder(self, folder: Path) -> None:
        """Force a folder's list of names to the disk."""
        ...

    def lock(self, path: Path) -> Lock:
        """Become the only holder; ``BlockingIOError`` if there is one."""
        ...


class LocalDisk:
    """The real thing."""

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=0o700)

    def create(self, path: Path) -> Handle:
        return _Descriptor(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _BINARY, 0o600))

    def open_log(self, path: Path) -> Handle:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW | _NO_WAITING | _BINARY
        return _Descriptor(_regular(os.open(path, flags, 0o600), path))

    def read(self, path: Path, limit: int) -> bytes:
        fd = _regular(os.open(path, os.O_RDONLY | _NO_FOLLOW | _NO_WAITING | _BINARY), path)
        with os.fdopen(fd, "rb") as stream:
            size = os.fstat(fd).st_size
            data = stream.read(min(size, limit) + 1)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"more than {limit} bytes", str(path))
        return data

    def names(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder))

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def sync_folder(self, folder: Path) -> None:
        if os.access(folder, os.R_OK):  # one that may not be read (somebody's above ours) is none that we have made
            sync(folder)

    def lock(self, path: Path) -> Lock:
        fd = _regular(os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW | _NO_WAITING | _BINARY, 0o600), path)
        try:
            lock_exclusively(fd)
        except OSError as error:
            os.close(fd)
            raise BlockingIOError(errno.EWOULDBLOCK, "held by another writer", str(path)) from error
        return _Descriptor(fd)


class _Descriptor:
    """A file descriptor that is closed once."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    @property
    def fd(self) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, "the file is closed")
        return self._fd

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self.fd, rest) :]

    def sync(self) -> None:
        os.fsync(self.fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)


def write_whole(disk: Disk, temporary: Path, path: Path, parts: Iterable[bytes]) -> None:
    """Write a file under a temporary name, force its content to the disk and rename it.

    The new name is safe only once the folder is synced too; the caller does that, once for several files.

    Raises
    ------
    OSError
        Nothing has the new name then, and the temporary file is gone if it could be removed.
    """
    handle = disk.create(temporary)  # if it is there already it is not ours to remove
    try:
        try:
            for part in parts:
                handle.write(part)
            handle.sync()
        finally:
            handle.close()
        disk.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        raise


def make_folders(disk: Disk, folder: Path) -> None:
    """Make a folder and those above it, so that they are there after a power cut too.

    A folder that is there already may have been made by a process that was killed before it synced the one above:
    three levels, as many as a run makes, are synced in any case.
    """
    missing: list[Path] = []
    place = folder
    while not disk.exists(place):
        missing.append(place)
        place = place.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process makes it too
            disk.make_folder(path)
    for path in list(folder.absolute().parents)[: max(3, len(missing))]:
        if disk.exists(path):
            disk.sync_folder(path)


def _regular(fd: int, path: Path) -> int:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd
