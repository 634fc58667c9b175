"""Finished trials on disk: one line each, appended as they come, so that the same command goes on where it stopped.

Every line is written whole or not at all (one write to a file opened for appending). Trials are deterministic, so two
writers on one folder only do the same work twice.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import msgspec
import torch

from esper.errors import ConfigError, DataError
from esper.files import replace_text
from esper.runs.trials.records import FORMAT, AnyRecord, FaultRecord, Header, TrialRecord

_DECODER = msgspec.json.Decoder(Header | TrialRecord | FaultRecord)


class Archive:
    """The trials of one kind in a folder.

    Parameters
    ----------
    fresh:
        Forget what is there.

    Raises
    ------
    ConfigError
        What is there was written by another version, or the folder cannot be made.
    DataError
        A line in the middle cannot be read.
    """

    def __init__(self, folder: Path, kind: str, *, fresh: bool = False) -> None:
        self.path = folder / f"{kind}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {str(folder)!r} cannot be made ({error}); use another --run-dir") from error
        if fresh or not self.path.exists() or not self.path.stat().st_size:
            replace_text(self.path, _line(header()).decode())
        self._records = self._read()

    @property
    def records(self) -> list[AnyRecord]:
        """All finished trials by number."""
        return [self._records[number] for number in sorted(self._records)]

    def __contains__(self, number: int) -> bool:
        return number in self._records

    def append(self, record: AnyRecord) -> None:
        """Keep a finished trial."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))
        try:
            os.write(fd, _line(record))
        finally:
            os.close(fd)
        self._records[record.number] = record

    def _read(self) -> dict[int, AnyRecord]:
        found: dict[int, AnyRecord] = {}
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = _DECODER.decode(line)
            except msgspec.DecodeError as error:
                raise DataError(f"{self.path}, line {number} is not a trial ({error}); use --fresh") from error
            if isinstance(record, Header):
                self._check(record)
            else:
                found[record.number] = record
        if len(whole) < len(text):  # a killed writer's last line
            os.truncate(self.path, len(whole))
        return found

    def _check(self, written: Header) -> None:
        now = header()
        if written != now:
            raise ConfigError(
                f"trials are compared only with trials of the same versions, {self.path} was written by "
                f"{_named(written)}, this is {_named(now)}; use --fresh or another --run-dir"
            )


def header() -> Header:
    """What writes now. Rounding differs from one PyTorch to another, and trials with it."""
    from esper import __version__

    device = platform.processor() or platform.machine()
    return Header(format=FORMAT, esper=__version__, torch=str(torch.__version__), device=device)


def _named(written: Header) -> str:
    return f"Esper {written.esper}, PyTorch {written.torch}, {written.device}, format {written.format}"


def _line(record: AnyRecord | Header) -> bytes:
    return msgspec.json.encode(record) + b"\n"
