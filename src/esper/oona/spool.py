"""Telemetry that waits on the disk while the bus is away: a row of segment files, oldest first.

::

    00000000000000000007.spool
        length u32 | crc32 u32 | expires f64 | topic | key | envelope        one record after the other

Only telemetry comes here, so nothing is forced to the disk, and a disk that refuses costs records, not the run. What
is lost is counted: records where they can be, bytes where nobody knows how many records they were.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from esper.errors import ConfigError, StateError
from esper.safety.disk import Disk, Handle, LocalDisk, make_folders

MAX_BYTES = 256 << 20
SEGMENT_BYTES = 4 << 20
MAX_RECORD_BYTES = 80 << 20
_HEAD = struct.Struct("<IIdHH")
"""Length of what follows the checksum, checksum, time of expiry (0: none), lengths of topic and key."""
_CHECKED = struct.Struct("<II")
_NAME = re.compile(r"(\d{20})\.spool")


@dataclass(frozen=True)
class Spooled:
    """A message that waits: its topic's name, its key, the unix time after which nobody wants it (0: never), and the
    encoded envelope without signature or claim."""

    topic: str
    key: str
    expires: float
    value: bytes


@dataclass
class _Segment:
    number: int
    num_bytes: int = 0
    num_records: int = 0
    """That have not been taken away yet."""
    read_to: int = 0
    """Where the first of them begins."""


@dataclass
class Losses:
    """Records that the spool has lost since the last look, by reason, and bytes of unknown records."""

    records: Counter[str] = field(default_factory=Counter[str])
    damaged_bytes: int = 0


class Spool:
    """A queue on the disk. For one thread at a time, and one process.

    Parameters
    ----------
    folder:
        Its own; made if missing. What an earlier process has left there is delivered first.
    max_bytes:
        Of all segments together; beyond it the oldest segment goes.

    Raises
    ------
    StateError
        Another process has the spool, or the folder cannot be used.
    ConfigError
        A size is out of range.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = MAX_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        disk: Disk | None = None,
    ) -> None:
        if not 0 < 2 * segment_bytes <= max_bytes:
            raise ConfigError(f"a spool needs room for two segments, got {max_bytes} bytes for 2 x {segment_bytes}")
        self._folder, self._disk = folder, disk or LocalDisk()
        self._max_bytes, self._segment_bytes = max_bytes, segment_bytes
        self._segments: deque[_Segment] = deque()
        self._handle: Handle | None = None
        self._next = 0
        self._ahead: deque[tuple[Spooled, int]] = deque()
        """Read from the first segment and not taken away, each with the place where it ends."""
        self._losses = Losses()
        try:
            make_folders(self._disk, folder)
            self._lock = self._disk.lock(folder / ".lock")
        except BlockingIOError as error:
            raise StateError(f"a spool has one process, but another one uses {folder}; wait for it to end") from error
        except OSError as error:
            raise StateError(f"a spool needs a folder it can write, got {folder} ({error})") from error
        try:
            self._recover()
        except OSError as error:
            self.close()
            raise StateError(f"a spool must be readable, got an error in {folder} ({error})") from error

    @property
    def num_records(self) -> int:
        """Records that wait."""
        return sum(segment.num_records for segment in self._segments)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(segment.num_bytes for segment in self._segments)

    def take_losses(self) -> Losses:
        """What was lost since the last call."""
        losses, self._losses = self._losses, Losses()
        return losses

    def append(self, record: Spooled) -> bool:
        """Keep a record, at the price of the oldest ones where there is no room; whether it was kept."""
        data = _encoded(record)
        if len(data) > min(self._max_bytes - self._segment_bytes, MAX_RECORD_BYTES):
            self._losses.records["spool_record_too_large"] += 1
            return False
        while self._segments and self.num_bytes + len(data) > self._max_bytes:
            self._drop_first("spool_full")
        try:
            segment = self._open_for(len(data))
        except OSError:
            self._losses.records["disk"] += 1
            return False
        assert self._handle is not None
        try:
            self._handle.write(data)
        except OSError:
            self._losses.records["disk"] += 1
            try:
                self._handle.truncate(segment.num_bytes)
            except OSError:
                self._end_segment()  # part of a record may be at its end: nothing may follow it there
            return False
        segment.num_bytes += len(data)
        segment.num_records += 1
        return True

    def peek(self, most: int, most_bytes: int) -> list[Spooled]:
        """The oldest records, at least one if there is one; they stay until :meth:`done`."""
        while not self._ahead and self._segments:
            self._read_first()
            if not self._ahead:
                self._remove_first()
        found: list[Spooled] = []
        for record, _ in self._ahead:
            if len(found) == most or (found and most_bytes < len(record.value)):
                break
            found.append(record)
            most_bytes -= len(record.value)
        return found

    def done(self, count: int) -> None:
        """The oldest ``count`` records, all of them peeked at, need not be kept."""
        for _ in range(count):
            _, end = self._ahead.popleft()
            self._segments[0].read_to = end
            self._segments[0].num_records -= 1
        if count and not self._ahead and self._segments[0].read_to >= self._segments[0].num_bytes:
            self._remove_first()

    def close(self) -> None:
        """Let go of the folder; what waits stays. Of the first segment, what is done may come again. Twice is fine."""
        self._end_segment()
        self._lock.close()

    # ------------------------------------------------------------------------------------------------------ segments

    def _path(self, segment: _Segment) -> Path:
        return self._folder / f"{segment.number:020}.spool"

    def _open_for(self, size: int) -> _Segment:
        """The segment that takes ``size`` more bytes: the last one, or a new one."""
        if self._handle is not None and self._segments and self._segments[-1].num_bytes + size <= self._segment_bytes:
            return self._segments[-1]
        self._end_segment()
        segment = _Segment(self._next)
        self._next += 1  # also where it cannot be made: a name is never used twice
        self._handle = self._disk.create(self._path(segment))
        self._segments.append(segment)
        return segment

    def _end_segment(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(OSError):
                self._handle.close()
            self._handle = None

    def _drop_first(self, reason: str) -> None:
        self._losses.records[reason] += self._segments[0].num_records
        self._segments[0].num_records = 0
        self._remove_first()

    def _remove_first(self) -> None:
        """The first segment is done with."""
        if len(self._segments) == 1:
            self._end_segment()
        segment = self._segments.popleft()
        self._ahead.clear()
        with contextlib.suppress(OSError):  # if it stays it is delivered once more, after a restart
            self._disk.unlink(self._path(segment))

    def _read_first(self) -> None:
        """Read what the first segment still holds; what cannot be read is lost."""
        segment = self._segments[0]
        try:
            data = self._disk.read(self._path(segment), self._max_bytes)
        except OSError:
            self._losses.records["spool_unreadable"] += segment.num_records
            segment.num_records = 0
            segment.read_to = segment.num_bytes
            return
        records, end = _decoded(data[: segment.num_bytes], segment.read_to)
        self._ahead.extend(records)
        missing = segment.num_records - len(records)
        if missing:  # everything behind damage is lost: nobody knows where the next record begins
            self._losses.records["spool_damaged"] += missing
            self._losses.damaged_bytes += segment.num_bytes - end
            segment.num_records = len(records)
            segment.read_to = segment.num_bytes if not records else segment.read_to
            self._end_segment() if len(self._segments) == 1 else None
            segment.num_bytes = end if records else segment.num_bytes

    def _recover(self) -> None:
        for name in self._disk.names(self._folder):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            segment = _Segment(int(match[1]))
            self._next = segment.number + 1
            data = self._disk.read(self._folder / name, self._max_bytes)
            records, end = _decoded(data, 0)
            self._losses.damaged_bytes += len(data) - end
            segment.num_bytes, segment.num_records = end, len(records)
            self._segments.append(segment)
            if not records:
                self._segments.pop()
                self._disk.unlink(self._folder / name)
        while self.num_bytes > self._max_bytes:
            self._drop_first("spool_full")


def _encoded(record: Spooled) -> bytes:
    topic, key = record.topic.encode(), record.key.encode("utf-8", "surrogatepass")
    body = b"".join((struct.pack("<dHH", record.expires, len(topic), len(key)), topic, key, record.value))
    return b"".join((_CHECKED.pack(len(body), zlib.crc32(body)), body))


def _decoded(data: bytes, start: int) -> tuple[list[tuple[Spooled, int]], int]:
    """Whole records from ``start`` on, each with the place where it ends, and where the last of them ends."""
    found: list[tuple[Spooled, int]] = []
    view = memoryview(data)
    while len(data) - start >= _HEAD.size:
        size, checksum, expires, num_topic, num_key = _HEAD.unpack_from(data, start)
        body = start + _CHECKED.size
        first = start + _HEAD.size
        end = body + size
        if end > len(data) or first + num_topic + num_key > end or zlib.crc32(view[body:end]) != checksum:
            break
        topic = bytes(view[first : first + num_topic]).decode("utf-8", "replace")
        key = bytes(view[first + num_topic : first + num_topic + num_key]).decode("utf-8", "surrogatepass")
        found.append((Spooled(topic, key, expires, bytes(view[first + num_topic + num_key : end])), end))
        start = end
    return found, start
