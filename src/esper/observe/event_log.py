"""The truth of a run: ``events.jsonl``, one :class:`esper.protocol.Record` a line, append-only.

JSON has no NaN and no infinity, and a missing sensor must not come back as zero: non-finite numbers are written as
the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` and read back as numbers. Inside the free-form fields
(``config``, ``summary``) they stay strings.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import msgspec
import numpy as np

from esper.errors import EsperError
from esper.files import lock_exclusively, sync
from esper.protocol import SCHEMA_VERSION, AnyEvent, Record

_ENCODER = msgspec.json.Encoder()
# strict=False is what reads "NaN" back as a float.
_DECODER = msgspec.json.Decoder(Record, strict=False)


class _Head(msgspec.Struct):
    """Only what says whether the rest can be understood."""

    v: int


_HEAD_DECODER = msgspec.json.Decoder(_Head)


class DamagedLogError(EsperError):
    """A line that is no whole event in order, and not the last one."""


class EventLog:
    """Append-only writer of one log; a second writer on the same file is refused.

    Every line is handed to the operating system when :meth:`append` returns, so it survives a killed process;
    :meth:`close` also forces it to the disk. Safe to call from several threads. The lock belongs to the open file and
    ends with the process, so a killed writer never blocks the next one.

    Parameters
    ----------
    path:
        The log. Missing folders are made. An existing log is continued: ``seq`` goes on, and a last line that a
        killed writer left unfinished is cut off.
    clock:
        Wall-clock time in seconds.
    repair:
        Cut a damaged log off before its first damaged line instead of refusing it; for those who can tell the rest
        again.

    Raises
    ------
    EsperError
        Another writer has the log open, the log is damaged, or it was written by a newer Esper.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time, repair: bool = False) -> None:
        self.path = Path(path)
        self._clock, self._repairs = clock, repair
        self._mutex = threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        self._closed = False
        try:
            _lock(self._fd, self.path)
            self._next_seq = self._recover()
            if is_new:
                sync(self.path.parent)
        except BaseException:
            os.close(self._fd)
            self._closed = True
            raise

    @property
    def next_seq(self) -> int:
        """Position the next event gets; also the number of events in the log."""
        return self._next_seq

    def append(self, event: AnyEvent) -> Record:
        """Write one event and return it as recorded.

        Raises
        ------
        EsperError
            The log is closed, the event cannot be written as JSON, or the disk refuses it. The log is unchanged.
        """
        with self._mutex:
            if self._closed:
                raise EsperError(f"an event log takes events while open, got a closed one ({self.path}); reopen it")
            record = Record(v=SCHEMA_VERSION, seq=self._next_seq, time=self._clock(), event=event)
            self._write(encode_record(record))
            self._next_seq += 1
            return record

    def cut(self, count: int) -> None:
        """Keep the first ``count`` events only."""
        with self._mutex:
            ends = [end for record, end, _ in _scan(self.path) if record.seq < count]
            os.ftruncate(self._fd, ends[-1] if ends else 0)
            self._next_seq = len(ends)

    def close(self) -> None:
        """Force everything to the disk and let go of the lock. Closing twice is harmless."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._fd).st_size
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            os.ftruncate(self._fd, size)  # Half a line would make the log unreadable once another line follows.
            raise EsperError(
                f"every event must reach the log, but {self.path} refused it ({error}); free disk space and resume"
            ) from error

    def _recover(self) -> int:
        """Next ``seq`` of an existing log, after cutting off or ending its last line."""
        count, end = 0, 0
        try:
            for record, end_byte, _ in _scan(self.path):
                count, end = record.seq + 1, end_byte
        except DamagedLogError:
            if not self._repairs:
                raise
        if os.fstat(self._fd).st_size > end:
            os.ftruncate(self._fd, end)
        if end and _last_byte(self.path) != b"\n":
            os.write(self._fd, b"\n")
        return count


def read_events(path: str | Path) -> Iterator[Record]:
    """Read a log from its beginning, oldest first, one line at a time.

    A last line without its newline is what a killed (or still writing) writer leaves: it is read if it is whole and
    passed over if not. Fields this version does not know are ignored.

    Raises
    ------
    EsperError
        There is no log, a line was written by a newer schema, cannot be understood, or is out of order.
    """
    for record, _, _ in _scan(Path(path)):
        yield record


def encode_record(record: Record) -> bytes:
    """One line of the log, newline included.

    Raises
    ------
    EsperError
        Something in the event has no JSON form.
    """
    try:
        return _ENCODER.encode(plain(record)) + b"\n"
    except (TypeError, ValueError, OverflowError) as error:  # ValueError: text that is not valid Unicode
        kind = type(record.event).__name__
        raise EsperError(
            f"events hold plain data only, but a {kind} could not be written ({error}); use str, int, float or bool"
        ) from error


def plain(value: Any) -> Any:
    """``value`` as dictionaries, lists, text and numbers, with NaN and infinities as text.

    Raises
    ------
    TypeError, ValueError, OverflowError
        Something in it has no JSON form.
    """
    return _without_non_finite(msgspec.to_builtins(value, str_keys=True, enc_hook=_plain_number))


def decode_record(line: bytes) -> Record:
    """Parse one line.

    Raises
    ------
    msgspec.DecodeError
        The line is not a record.
    EsperError
        It is one of a newer schema.
    """
    version = _HEAD_DECODER.decode(line).v
    if version > SCHEMA_VERSION:
        raise EsperError(f"this Esper reads event schema up to {SCHEMA_VERSION}, got {version}; update esper-morph")
    return _DECODER.decode(line)


def _scan(path: Path) -> Iterator[tuple[Record, int, int]]:
    """Records with the byte at which each line ends and its number, counted from 1."""
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise EsperError(f"a run directory holds events.jsonl, got no file at {path}; check the path") from error
    with stream:
        end, expected = 0, 0
        for number, line in enumerate(stream, start=1):
            is_whole = line.endswith(b"\n")
            try:
                record = decode_record(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if not is_whole:
                    return
                raise DamagedLogError(_damage(path, number, str(error))) from error
            except EsperError as error:
                raise EsperError(f"{path}, line {number}: {error}") from error
            if record.seq != expected:
                raise DamagedLogError(_damage(path, number, f"seq must be {expected}, got {record.seq}"))
            end, expected = end + len(line), expected + 1
            yield record, end, number


def _damage(path: Path, number: int, what: str) -> str:
    return (
        f"{path}, line {number}: every line but an unfinished last one must be a whole event in order, got {what}; "
        f"restore the file, or keep the good part with: head -n {number - 1} {path.name} > repaired.jsonl"
    )


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return cast("np.generic[Any]", value).item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in cast("Sequence[Any]", value)]
    return value


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1)


def _lock(fd: int, path: Path) -> None:
    try:
        lock_exclusively(fd)
    except OSError as error:
        raise EsperError(
            f"an event log has one writer, but another process (or this one) already writes {path}; "
            "wait for that run to end, or choose another run directory"
        ) from error
