"""Files that a reader never sees half of, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_LOCK_OFFSET = 1 << 62  # Windows locks are mandatory: lock a byte no reader ever touches.


def replace_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name in its own folder, force it to the disk and rename it into place.

    Whatever goes wrong, an older file of that name stays as it was and nothing is left beside it.

    Parameters
    ----------
    write:
        Writes the content to the path it is given.

    Raises
    ------
    OSError
        The folder is missing or not writable, or the disk is full.
    """
    target = Path(path)
    fd, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    os.close(fd)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; these files are shared like any other
        sync(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync(target.parent)


def replace_text(path: str | Path, text: str) -> None:
    """:func:`replace_file` with UTF-8 text and newlines as they are."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk (folders: where the system lets them be opened)."""
    if path.is_dir() and os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_exclusively(fd: int) -> None:
    """Lock an open file; the lock belongs to it and ends with the process, however that ends.

    Raises
    ------
    OSError
        Somebody holds it.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(fd, _LOCK_OFFSET, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
