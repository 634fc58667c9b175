"""The events of a run that may have been interrupted: what is in the log already is gone through, not written again.

A resumed run tells its events from the first one on: those of finished trainings from their results, those of the
training in progress from its checkpoint, and what followed by training again. As long as they are those of the log,
the log stays as it is. From the first one that differs (a power cut has taken the log's end, a GPU has rounded
otherwise) the log is cut off and written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from esper.observe.event_log import EventLog, encode_record, read_events
from esper.protocol import SCHEMA_VERSION, AnyEvent, ArmFinished, Overhead, Record, RunFinished, RunStarted


class RunRecord:
    """The one writer of a run's events.

    Parameters
    ----------
    on_event:
        Called with every event that is new.
    on_past:
        Called with every event that an interrupted run has told already.

    Raises
    ------
    EsperError
        Another process writes the log, or a newer Esper has written it.
    """

    def __init__(
        self, path: Path, on_event: Callable[[AnyEvent], None], on_past: Callable[[AnyEvent], None] | None = None
    ) -> None:
        self._log = EventLog(path, repair=True)
        self._on_event, self._on_past = on_event, on_past or _untold
        self._past: Iterator[Record] | None = read_events(path) if self._log.next_seq else None

    def emit(self, event: AnyEvent) -> None:
        """Write an event, or find it where an interrupted run has written it."""
        if self._past is not None:
            earlier = next(self._past, None)
            if earlier is not None and _told(earlier.event) == _told(event):
                self._on_past(earlier.event)
                return
            self._past = None
            if earlier is not None:
                self._log.cut(earlier.seq)
        self._log.append(event)
        self._on_event(event)

    def pass_by(self) -> None:
        """Tell all that is in the log as past."""
        for earlier in self._past or ():
            self._on_past(earlier.event)
        self._past = None

    def close(self) -> None:
        """Force the log to the disk and let go of it."""
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _told(event: AnyEvent) -> bytes:
    """An event without what a clock and a machine say."""
    if isinstance(event, Overhead):
        event = msgspec.structs.replace(event, milliseconds={})
    elif isinstance(event, ArmFinished):
        event = msgspec.structs.replace(event, seconds=0.0)
    elif isinstance(event, RunStarted):
        event = msgspec.structs.replace(event, environment={}, config={})
    elif isinstance(event, RunFinished):
        event = msgspec.structs.replace(event, summary={})
    return encode_record(Record(v=SCHEMA_VERSION, seq=0, time=0.0, event=event))


def _untold(event: AnyEvent) -> None:
    """Nobody asked for what is past."""
