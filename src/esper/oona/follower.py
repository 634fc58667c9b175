"""Reads a log that somebody else appends to, from where it has got to, through crashes of both.

The place is kept in a small file beside the log, with the hash of the last line before it and of some earlier lines. A
log that was cut off and written anew (as a resumed run does) no longer has that line: reading then goes on behind the
last line that is still there, so what was written anew is read, and some of what was not is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from esper.errors import StateError
from esper.safety import bounded_json
from esper.safety.disk import Disk, LocalDisk, make_folders, write_whole

MOST_MARKS = 48
_MOST_CURSOR_BYTES = 64 << 10
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Line:
    """A whole line, without its end; ``start`` and ``end`` are bytes in the log, the line's end counted."""

    start: int
    end: int
    data: bytes


class _Mark(msgspec.Struct, frozen=True, array_like=True):
    """A line that was read: where it begins and ends, and its hash."""

    start: int
    end: int
    seal: str


class _Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """As it is stored. ``rewrites`` is how often the log was written anew."""

    marks: list[_Mark]
    rewrites: int = 0
    check: str = ""


class Follower:
    """A reader of one log. For one thread; one process for each cursor.

    Parameters
    ----------
    path:
        The log; it need not be there yet.
    cursor:
        The file that keeps the place. One that cannot be read counts as none: all is read again.
    end:
        How much of the log may be read; ``None``: what is there. A log whose writer syncs must be read no further than
        it has synced.

    Raises
    ------
    StateError
        The cursor's folder cannot be used.
    """

    def __init__(
        self, path: Path, cursor: Path, *, end: Callable[[], int] | None = None, disk: Disk | None = None
    ) -> None:
        self.path, self._cursor, self._end, self._disk = path, cursor, end, disk or LocalDisk()
        self.rewrites = 0
        """How often the log was found written anew."""
        self._marks: list[_Mark] = []
        self._offset = self._found_bytes = 0
        """Where the last mark ends, and how large the log was when last seen: numbers that any thread may read."""
        self._level: tuple[int, int, int] | None = None
        """Size, time and number of the file when there was nothing more to read in it."""
        self._saved: tuple[list[_Mark], int] = ([], 0)
        try:
            make_folders(self._disk, cursor.parent)
            if self._disk.exists(cursor):
                self._load(self._disk.read(cursor, _MOST_CURSOR_BYTES))
        except OSError as error:
            raise StateError(f"a log's reader needs a place for {cursor.name}, got an error ({error})") from error

    @property
    def offset(self) -> int:
        """Bytes of the log that are done. Safe from any thread."""
        return self._offset

    @property
    def num_bytes_left(self) -> int:
        """Bytes of the log that are not done, as far as the disk tells. Safe from any thread."""
        return max(0, self._size() - self.offset)

    def read(self, most: int, most_bytes: int) -> list[Line]:
        """The next whole lines, at least one if there is one. They are done with :meth:`advance`.

        Raises
        ------
        OSError
            The log is there and cannot be read.
        """
        size, state = self._size(), self._state()
        if size == self.offset and (size == 0 or state == self._level):
            return []
        with contextlib.ExitStack() as stack:
            try:
                stream = stack.enter_context(self.path.open("rb"))
            except FileNotFoundError:
                return []
            self._find_place(stream)
            start, limit = self.offset, max(most_bytes, 1)
            if size <= start:
                self._level = state
                return []
            stream.seek(start)
            data = stream.read(min(limit, size - start))
            # A single line may be longer than all lines should be together.
            while b"\n" not in data and start + len(data) < size:
                more = stream.read(min(_READ_BYTES, size - start - len(data)))
                if not more:
                    break
                data += more
        *whole, _ = data.split(b"\n")
        found: list[Line] = []
        for line in whole[:most]:
            found.append(Line(start, start + len(line) + 1, line))
            start = found[-1].end
        return found

    def advance(self, line: Line) -> None:
        """Everything up to the end of ``line`` is done."""
        self._marks.append(_Mark(line.start, line.end, _seal(line.data)))
        if len(self._marks) > MOST_MARKS:
            self._marks = _thinned(self._marks)
        self._offset = line.end

    def save(self) -> None:
        """Keep the place; after a power cut it is this one or an earlier one.

        Raises
        ------
        OSError
            The disk refused; an earlier place is kept.
        """
        if self._saved == (self._marks, self.rewrites):
            return
        bare = _Cursor(marks=self._marks, rewrites=self.rewrites)
        data = msgspec.json.encode(msgspec.structs.replace(bare, check=_check(bare)))
        temporary = self._cursor.with_name(f".{self._cursor.name}.{secrets.token_hex(4)}.part")
        write_whole(self._disk, temporary, self._cursor, [data])  # if the new name is lost, the old place is there
        self._saved = (list(self._marks), self.rewrites)

    def _size(self) -> int:
        """Never an error: who asks may be the training, and who reads the log meets the disk itself."""
        try:
            self._found_bytes = os.stat(self.path).st_size
        except FileNotFoundError:
            self._found_bytes = 0
        except OSError:
            pass  # as it was when last seen
        size = self._found_bytes
        return size if self._end is None else min(size, self._end())

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino

    def _find_place(self, stream: BinaryIO) -> None:
        """Go back to the last line that is still as it was read."""
        kept = len(self._marks)
        while kept and not _is_there(stream, self._marks[kept - 1]):
            kept -= 1
        if kept < len(self._marks):
            del self._marks[kept:]
            self._offset = self._marks[-1].end if self._marks else 0
            self.rewrites += 1

    def _load(self, data: bytes) -> None:
        with contextlib.suppress(StateError, msgspec.MsgspecError, UnicodeDecodeError):
            bounded_json.check(data, max_bytes=_MOST_CURSOR_BYTES, max_depth=4, max_values=8 * MOST_MARKS)
            cursor = msgspec.json.decode(data, type=_Cursor)
            if cursor.check == _check(msgspec.structs.replace(cursor, check="")):
                self._marks, self.rewrites = cursor.marks, cursor.rewrites
                self._offset = self._marks[-1].end if self._marks else 0
                self._saved = (list(self._marks), self.rewrites)


def _seal(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:32]


def _check(cursor: _Cursor) -> str:
    return hashlib.sha256(msgspec.json.encode(cursor)).hexdigest()[:32]


def _is_there(stream: BinaryIO, mark: _Mark) -> bool:
    """Whether the log has this very line at its place."""
    digest, left = hashlib.sha256(), mark.end - 1 - mark.start
    stream.seek(mark.start)
    while left > 0:
        data = stream.read(min(_READ_BYTES, left))
        if not data:
            return False
        digest.update(data)
        left -= len(data)
    return digest.hexdigest()[:32] == mark.seal and stream.read(1) == b"\n"


def _thinned(marks: list[_Mark]) -> list[_Mark]:
    """The newest mark, and the oldest one at each order of magnitude of bytes behind it: the first mark stays."""
    newest = marks[-1].end
    oldest: dict[int, _Mark] = {}
    for mark in marks:
        oldest.setdefault((newest - mark.end).bit_length(), mark)
    return sorted(oldest.values(), key=lambda mark: mark.end)
