"""Reports and designs, in a file or on a server, that several processes may read and write at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from esper.errors import ConfigError, StateError
from esper.karn.design import DESIGN_VERSION, Design, on_grid
from esper.karn.location import is_url, shown
from esper.karn.report import REPORT_VERSION, FieldReport, Placement
from esper.karn.sqlite_store import SqliteStore
from esper.karn.store import Store

BUSY_S = 30.0
"""How long a process waits for another one's write."""

_REPORTS = msgspec.json.Decoder(FieldReport)
_DESIGNS = msgspec.json.Decoder(Design)


class Database:
    """Reports and designs of one place.

    Parameters
    ----------
    place:
        A file (made where there is none; its folder too), or ``postgresql://...`` as ``esper.karn.location`` describes
        it (its tables are made where there are none).
    must_exist:
        Refuse to make one.

    Attributes
    ----------
    name:
        The place, for people: without user and password.

    Raises
    ------
    StateError
        It cannot be opened, is damaged, belongs to another program, or a newer Esper has written it.
    ConfigError
        The URL is not understood, or the package for it is not installed.
    """

    def __init__(self, place: str | Path, *, must_exist: bool = False, busy_s: float = BUSY_S) -> None:
        self._store = _store(place, must_exist=must_exist, busy_s=busy_s)
        self.name = self._store.name

    # ---------------------------------------------------------------------------------------------- write

    def file(self, reports: Iterable[FieldReport]) -> int:
        """Keep reports, and designs for what grew in them; returns how many were new. All of them or none.

        A report that is there already stays as it is.
        """
        now, new = time.time(), 0
        with self._store.writing():
            for report in reports:
                row = (report.id, report.run, report.job, int(report.kept), now, msgspec.json.encode(report))
                if not self._store.change("INSERT INTO reports VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", *row):
                    continue
                new += 1
                for part in report.placements:
                    self._note_use(report.id, part, now)
        return new

    def _note_use(self, report: str, part: Placement, now: float) -> None:
        """Tie a report to the design that it tells of; what has no design yet becomes one: it has grown."""
        name = part.design
        if not self._store.fetch("SELECT 1 FROM designs WHERE name = ?", name):
            seen = Design(kind=part.place.kind, choice=on_grid(part.choice), created=now, status="passed")
            self._insert(seen)
            name = seen.name
        self._store.change("INSERT INTO uses VALUES (?, ?) ON CONFLICT DO NOTHING", report, name)

    def add(self, designs: Iterable[Design]) -> int:
        """Keep designs; those whose name is known stay as they are. Returns how many were new."""
        with self._store.writing():
            return sum(self._insert(design) for design in designs)

    def _insert(self, design: Design) -> bool:
        row = (
            design.name, design.kind, design.status, design.generation, design.created, msgspec.json.encode(design),
        )  # fmt: skip
        made = self._store.change("INSERT INTO designs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", *row)
        for parent in design.parents if made else ():
            self._store.change("INSERT INTO parents VALUES (?, ?) ON CONFLICT DO NOTHING", design.name, parent)
        return bool(made)

    # ---------------------------------------------------------------------------------------------- read

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits that stand for this database, wherever it is moved; a copy has them too."""
        with self._store.reading():
            return str(self._store.fetch("SELECT name FROM identity")[0][0])

    def reports(self) -> list[FieldReport]:
        """All reports, in the order of their ids."""
        with self._store.reading():
            rows = self._store.fetch("SELECT id, body FROM reports ORDER BY id")
        return [self._decoded(_REPORTS, name, body, REPORT_VERSION) for name, body in rows]

    def designs(self) -> list[Design]:
        """All designs, in the order of their names."""
        with self._store.reading():
            rows = self._store.fetch("SELECT name, body FROM designs ORDER BY name")
        return [self._decoded(_DESIGNS, name, body, DESIGN_VERSION) for name, body in rows]

    def children(self, name: str) -> list[str]:
        """Names of the designs that were made from this one."""
        with self._store.reading():
            rows = self._store.fetch("SELECT child FROM parents WHERE parent = ? ORDER BY child", name)
        return [row[0] for row in rows]

    def _decoded(self, decoder: msgspec.json.Decoder[Any], name: str, body: bytes, newest: int) -> Any:
        try:
            value = decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._store.damaged(f"entry {name!r}: {error}") from error
        if value.v > newest:
            raise StateError(
                f"this Esper reads entries up to version {newest}, got {value.v} ({name!r} in {self.name!r}); "
                "update esper-morph"
            )
        return value

    # ---------------------------------------------------------------------------------------------- the connection

    def check(self) -> None:
        """Read everything.

        Raises
        ------
        StateError
            Something is damaged.
        """
        self._store.check()
        self.reports()
        self.designs()

    def close(self) -> None:
        """Let go of it."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _store(place: str | Path, *, must_exist: bool, busy_s: float) -> Store:
    if not is_url(place):
        return SqliteStore(Path(place), must_exist=must_exist, busy_s=busy_s)
    try:
        from esper.karn.postgres_store import PostgresStore
    except ImportError as error:
        # Without a name: psycopg is there, but nothing that it could speak to a server with.
        if (error.name or "psycopg").partition(".")[0] != "psycopg":
            raise
        raise ConfigError(
            f"{shown(place)!r} needs psycopg, which is not installed; pip install 'esper-morph[postgres]'"
        ) from error
    return PostgresStore(str(place), must_exist=must_exist, busy_s=busy_s)
