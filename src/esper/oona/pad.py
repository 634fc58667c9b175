"""The command log as a desk writes it: after an error it is read anew, so that it is known what is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from esper.errors import StateError
from esper.safety.command_log import CommandLog, Entry, Position
from esper.safety.disk import Disk

RETRY_S = 1.0
"""Seconds after an error in which the disk is left alone."""


class Pad:
    """The one writer of a log of orders and answers.

    Raises
    ------
    StateError
        Another writer has the log, it is damaged, or it cannot be used.
    """

    def __init__(self, path: Path, clock: Callable[[], float], disk: Disk | None = None) -> None:
        self._path, self._clock, self._disk = path, clock, disk
        self._log = CommandLog(path, disk=disk)
        self._position = self._log.position
        self._refused: tuple[float, str] | None = None
        """When and why the disk did not take something."""
        self.lost: str | None = None
        """Why it is not known any more what is on the disk: nothing is written from then on."""
        self.doubtful: set[str] = set()
        """Entries that may be on the disk or not."""

    @property
    def position(self) -> Position:
        """How far it goes, as far as is known."""
        return self._position

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._log

    def after(self, position: Position) -> list[Entry]:
        """What was written after ``position``.

        Raises
        ------
        StateError
            The log does not go on from there.
        """
        return self._log.after(position)

    def write(self, entries: Sequence[Entry]) -> str | None:
        """Put entries on the disk, in order; else say why. Those that are there all the same can be asked for."""
        if self.lost is not None:
            return self.lost
        if self._refused is not None and abs(self._clock() - self._refused[0]) < RETRY_S:
            return self._refused[1]
        try:
            self._log.extend(entries)
        except StateError as error:
            self._refused = (self._clock(), str(error))
            self._read_anew(entries)
        else:
            self._refused = None
        self._position = self._log.position
        if self.lost is not None or not all(entry.id in self for entry in entries):
            return self.lost or (self._refused or (0.0, ""))[1]
        return None

    def _read_anew(self, entries: Sequence[Entry]) -> None:
        missing = {entry.id for entry in entries} - {entry.id for entry in entries if entry.id in self._log}
        self._log.close()
        try:
            log = CommandLog(self._path, disk=self._disk)
            try:
                log.after(self._position)
            except StateError:
                log.close()
                raise
        except StateError as error:
            self.lost = f"the log of commands cannot be read any more ({error}); start the training again"
            self.doubtful = missing
            return
        self._log = log

    def close(self) -> None:
        """Let the next writer in."""
        self._log.close()
