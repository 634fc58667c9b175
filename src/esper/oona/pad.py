"""The command log as a desk writes it: after an error it is read anew, so that it is known what is on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from esper.errors import StateError
from esper.oona.answers import is_order
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
        self._is_open = True
        self.lost: str | None = None
        """Why nothing is written any more by this process."""
        self.doubtful: set[str] = set()
        """Entries that may be on the disk or not; only reading the log tells."""

    @property
    def position(self) -> Position:
        """How far it goes, as far as is known."""
        return self._position

    @property
    def num_bytes(self) -> int:
        """How much of the log is on the disk for certain."""
        return self._log.num_bytes

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

    @property
    def is_ready(self) -> bool:
        """Whether a write would be tried at all."""
        return self.lost is None and not self._is_resting()

    def settle(self) -> bool:
        """Whether it is known now what is on the disk; tries to find out."""
        return self.lost is None and (self._is_open or (not self._is_resting() and self._read_anew()))

    def write(self, entries: Sequence[Entry]) -> str | None:
        """Put entries on the disk, in order; else say why. Those that are there all the same can be asked for."""
        if self.lost is not None or (not self._is_open and not self.settle()):
            return self.lost or self._reason
        if self._is_resting():
            return self._reason
        try:
            self._log.extend(entries)
        except StateError as error:
            self._refused = (self._clock(), str(error))
            missing = {entry.id for entry in entries} - {entry.id for entry in entries if entry.id in self}
            if not self._read_anew():
                self.doubtful = missing
        else:
            self._refused = None
        if self._is_open:
            self._position = self._log.position
        return None if all(entry.id in self for entry in entries) else self.lost or self._reason

    @property
    def _reason(self) -> str:
        return "" if self._refused is None else self._refused[1]

    def _is_resting(self) -> bool:
        return self._refused is not None and abs(self._clock() - self._refused[0]) < RETRY_S

    def _read_anew(self) -> bool:
        """Find out what is on the disk, and make it certain."""
        self._log.close()
        self._is_open = False
        try:
            log = CommandLog(self._path, disk=self._disk)
            try:
                log.after(self._position)
            except StateError:
                log.close()
                raise
        except StateError as error:
            self._refused = (self._clock(), str(error))
            return False
        self._log, self._is_open = log, True
        if any(entry_id in log and is_order(entry_id) for entry_id in self.doubtful):
            # It belongs to a step that has passed without it: only a training that begins again gets there.
            self.lost = "an order is in the log that was not applied in its step; start the training again"
            return False
        self.doubtful = set()
        self._position = log.position
        return True

    def close(self) -> None:
        """Let the next writer in: from now on nothing is written, and the log is not opened again."""
        self.lost = self.lost or "the log of commands is closed; start the training again"
        self._log.close()
