"""The log of applied commands: append-only, on the disk before anything is acknowledged, replayed after a checkpoint.

One line of JSON for each command, or for several that came together. Every line carries a seal over itself and the line
before, so a line that was changed, left out or moved is found. A crash can only leave the last line unfinished; that
one was never acknowledged and is cut off. Anything else that does not fit is damage and is refused, not repaired in
silence.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from esper.errors import StateError
from esper.safety import bounded_json
from esper.safety.disk import Disk, Handle, LocalDisk, make_folders, write_whole

MAX_LINE_BYTES = 1 << 20
MAX_LOG_BYTES = 256 << 20
MAX_DEPTH = 32
MAX_VALUES = 50_000
_SEAL_CHARS = 32
_MOST_TOGETHER = 256
_START = "0" * _SEAL_CHARS


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a log goes: ``count`` commands, the last of them with ``seal``. Part of a checkpoint."""

    count: int = 0
    seal: str = _START

    def tree(self) -> dict[str, Any]:
        """Plain values for a state tree."""
        return {"count": self.count, "seal": self.seal}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An applied command: ``payload`` is plain JSON, ``step`` the step at which it was applied."""

    id: str
    step: int
    payload: Any


class CommandLog:
    """The one writer of a log; not for several threads.

    Parameters
    ----------
    path:
        Made if it is missing. An existing log is read and checked; ``num_bytes_cut`` tells how much of an unfinished
        last line was cut off.

    Raises
    ------
    StateError
        Another writer has the log, it is damaged, or it cannot be used.
    """

    def __init__(self, path: str | Path, *, disk: Disk | None = None) -> None:
        self.path = Path(path)
        self._disk = disk or LocalDisk()
        self._broken: str | None = None
        self._entries: dict[str, Entry] = {}
        self._seals: list[str] = [_START]
        self._size = 0
        self.num_bytes_cut = 0
        try:
            make_folders(self._disk, self.path.parent)
            self._lock = self._disk.lock(self.path.with_name(f".{self.path.name}.lock"))
        except BlockingIOError as error:
            raise StateError(
                f"a command log has one writer, but another process (or this one) already writes {self.path}; "
                "wait for that run to end"
            ) from error
        except OSError as error:
            raise StateError(f"a command log needs a folder it can write, got {self.path} ({error})") from error
        self._handle: Handle | None = None
        try:
            self._open()
        except OSError as error:
            self.close()
            raise StateError(f"{self.path} must be usable as a command log ({error}); check the disk") from error
        except BaseException:
            self.close()
            raise

    @property
    def position(self) -> Position:
        return Position(count=len(self._entries), seal=self._seals[-1])

    @property
    def num_bytes(self) -> int:
        """How much of the file is on the disk for certain: what may be told of. Safe from any thread."""
        return self._size

    def __contains__(self, command_id: str) -> bool:
        return command_id in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, command_id: str, *, step: int, payload: Any) -> bool:
        """Write a command; when this returns it survives a power cut and may be acknowledged.

        Returns whether it is new: an id that is in the log already is a repetition, and nothing is written.

        Raises
        ------
        StateError
            The command cannot be stored, the id stands for another payload, or the disk refused it: it must not be
            acknowledged then.
        """
        return self.extend([Entry(id=command_id, step=step, payload=payload)]) == 1

    def extend(self, entries: Sequence[Entry]) -> int:
        """:meth:`append` for several at the price of one; returns how many are new.

        Raises
        ------
        StateError
            As for one. Where the disk refused, some of the first may be on it all the same: open the log anew to know.
        """
        if self._handle is None:
            raise StateError(f"a command log takes commands while open, got a closed one ({self.path}); open it anew")
        if self._broken is not None:
            raise StateError(f"a command log takes nothing after an error, got one ({self._broken}); open it anew")
        new = self._new(entries)
        for together in _lines_of(new):
            line, seal = _line(together, self._seals[-1])
            if len(line) > MAX_LINE_BYTES:
                raise StateError(f"a command may have {MAX_LINE_BYTES} bytes, got {len(line)}; send less")
            bounded_json.check(line, max_bytes=MAX_LINE_BYTES, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
            self._write(line)
            for entry, inner in _sealed(together, seal):
                self._take(entry, inner)
        return len(new)

    def _new(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those that are not in the log yet, each once."""
        new: dict[str, Entry] = {}
        for entry in entries:
            known = self._entries.get(entry.id) or new.get(entry.id)
            if known is None:
                new[entry.id] = entry
            elif known.payload != entry.payload:
                raise StateError(f"an id stands for one command, got {entry.id!r} for two; give each its own")
        return list(new.values())

    def _write(self, data: bytes) -> None:
        """A whole line, on the disk when this returns: a power cut can only hurt what is not synced, the last line."""
        assert self._handle is not None
        if self._size + len(data) > MAX_LOG_BYTES:
            raise StateError(
                f"a command log may have {MAX_LOG_BYTES} bytes, got {self._size + len(data)} in {self.path}; "
                "begin the run anew"
            )
        try:
            self._handle.write(data)
            self._handle.sync()
        except OSError as error:
            # After a failed sync nobody knows what is on the disk; only reading the log anew tells.
            self._broken = str(error)
            with contextlib.suppress(OSError):
                self._handle.truncate(self._size)
            raise StateError(
                f"a command must be on the disk before it is acknowledged, but {self.path} did not take it ({error}); "
                "free disk space and open the log anew"
            ) from error
        self._size += len(data)

    def after(self, position: Position) -> list[Entry]:
        """Commands applied after ``position``, in order: what a checkpoint that holds it has not seen.

        Raises
        ------
        StateError
            The log does not go on from there: it is shorter, or of another run.
        """
        if (
            not 0 <= position.count < len(self._seals)
            or not position.seal
            or self._seals[position.count] != position.seal
        ):
            raise StateError(
                f"the command log must go on from the checkpoint's position {position.count}, got {len(self)} commands "
                f"in {self.path} that do not; it is another run's, or part of it is lost"
            )
        return list(self._entries.values())[position.count :]

    def close(self) -> None:
        """Let the next writer in. Closing twice is harmless."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        is_there = self._disk.exists(self.path)
        data = self._disk.read(self.path, MAX_LOG_BYTES) if is_there else b""
        for entry, seal, end in _entries(data, self.path):
            self._take(entry, seal)
            self._size = end
        self.num_bytes_cut = len(data) - self._size
        if is_there:
            # A line that can be read may not be on the disk: its writer was killed before the sync, or the sync has
            # failed (its pages then count as clean, and another sync would do nothing). Written anew, all of it is.
            # And one that was cut off may be: the first line of all, in a log that looks empty now.
            temporary = self.path.with_name(f".{self.path.name}.part")
            if self._disk.exists(temporary):
                self._disk.unlink(temporary)
            write_whole(self._disk, temporary, self.path, [data[: self._size]])
        self._handle = self._disk.open_log(self.path)
        self._disk.sync_folder(self.path.parent)

    def _take(self, entry: Entry, seal: str) -> None:
        self._entries[entry.id] = entry
        self._seals.append(seal)


def read_log(path: str | Path, *, disk: Disk | None = None) -> tuple[list[Entry], int]:
    """Entries of a log that somebody else may be writing, and how many bytes of an unfinished line follow.

    Raises
    ------
    StateError, OSError
        It is damaged or cannot be read.
    """
    data = (disk or LocalDisk()).read(Path(path), MAX_LOG_BYTES)
    found = _entries(data, Path(path))
    return [entry for entry, _, _ in found], len(data) - (found[-1][2] if found else 0)


def _entries(data: bytes, path: Path) -> list[tuple[Entry, str, int]]:
    """Entries, their seals and the byte at which each ends, without what a crash has left of the last line."""
    *lines, rest = data.split(b"\n")
    found: list[tuple[Entry, str, int]] = []
    seal, ids, end = _START, set[str](), 0
    for number, line in enumerate(lines, start=1):
        try:
            entries, seal = _parsed(line, seal)
            for entry in entries:
                if entry.id in ids:
                    raise StateError(f"an id comes once, got {entry.id!r} again")
                ids.add(entry.id)
        except StateError as error:
            if number == len(lines) and not rest and b"\0" in line:  # sectors that never reached the disk
                return found
            raise StateError(_damage(path, number, error)) from error
        end += len(line) + 1
        found += [(entry, inner, end) for entry, inner in _sealed(entries, seal)]
    if rest and not rest.endswith(b"\0") and _is_entry(rest[:-1], seal):
        raise StateError(_damage(path, len(lines) + 1, StateError("the line ends in another character")))
    return found


def _damage(path: Path, number: int, error: StateError) -> str:
    return (
        f"{path}, line {number}: every line but an unfinished last one must be a whole command in order, got an error "
        f"({error}); restore the file, or keep the good part with: head -n {number - 1} {path.name} > repaired.jsonl"
    )


def _lines_of(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries that go into one line each time: as many as it can hold."""
    together: list[Entry] = []
    size = 0
    for entry in entries:
        num_bytes = len(bounded_json.encode([entry.id, entry.payload]))
        if together and (size + num_bytes > MAX_LINE_BYTES // 2 or len(together) >= _MOST_TOGETHER):
            yield together
            together, size = [], 0
        together.append(entry)
        size += num_bytes
    if together:
        yield together


def _sealed(entries: Sequence[Entry], seal: str) -> list[tuple[Entry, str]]:
    """The entries of a line with their seals: the line's seal comes after its last one."""
    return [(entry, seal if number == len(entries) else "") for number, entry in enumerate(entries, start=1)]


def _line(entries: Sequence[Entry], previous: str) -> tuple[bytes, str]:
    plain = [{"id": entry.id, "step": entry.step, "payload": entry.payload} for entry in entries]
    body = bounded_json.encode(plain if len(plain) > 1 else plain[0])
    seal = _seal(body, previous)
    return b'{"seal":"' + seal.encode() + b'","command":' + body + b"}\n", seal


def _parsed(line: bytes, previous: str) -> tuple[list[Entry], str]:
    """Entries and their seal from a line without its end."""
    start = len(b'{"seal":"') + _SEAL_CHARS + len(b'","command":')
    body = line[start:-1]
    seal = _seal(body, previous)
    if line != b'{"seal":"' + seal.encode() + b'","command":' + body + b"}":
        raise StateError("a line's seal must fit its content and the line before, got another")
    fields = bounded_json.decode(body, max_bytes=MAX_LINE_BYTES, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
    several = cast("list[Any]", fields) if isinstance(fields, list) else [fields]
    if not several:
        raise StateError("a line has a command, got none")
    return [_entry(one) for one in several], seal


def _entry(fields: Any) -> Entry:
    named = cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}
    command_id, step = named.get("id"), named.get("step")
    if not isinstance(command_id, str) or type(step) is not int or "payload" not in named:
        raise StateError("a command has an id, a step and a payload, got something else")
    return Entry(id=command_id, step=step, payload=named["payload"])


def _is_entry(line: bytes, previous: str) -> bool:
    try:
        _parsed(line, previous)
    except StateError:
        return False
    return True


def _seal(body: bytes, previous: str) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()[:_SEAL_CHARS]
