"""Reports and designs in one SQLite file that several processes may read and write at a time.

Readers never wait for a writer (write-ahead log); writers wait for one another for up to half a minute. The file must
lie on a disk of this machine: a network file system does not keep the promises that the log needs.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from esper.errors import StateError
from esper.karn.design import DESIGN_VERSION, Design, on_grid
from esper.karn.report import REPORT_VERSION, FieldReport, Placement
from esper.karn.schema import APPLICATION_ID, VERSION, migrate

BUSY_S = 30.0
"""How long a process waits for another one's write."""

_REPORTS = msgspec.json.Decoder(FieldReport)
_DESIGNS = msgspec.json.Decoder(Design)


class Database:
    """One file of reports and designs.

    Parameters
    ----------
    path:
        Made where there is none; its folder too.
    must_exist:
        Refuse to make one.

    Raises
    ------
    StateError
        It cannot be opened, is damaged, belongs to another program, or a newer Esper has written it.
    """

    def __init__(self, path: str | Path, *, must_exist: bool = False, busy_s: float = BUSY_S) -> None:
        self.path, self._busy_s = Path(path), busy_s
        if must_exist and not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "no file"
            raise StateError(
                f"a Karn database is a file, got {what} at {str(path)!r}; make one with: esper karn import RUN_DIR"
            )
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=busy_s, isolation_level=None)
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        execute("BEGIN")  # all of one moment: somebody else may be making the file just now
        try:
            is_empty = execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            version, owner = self._number("user_version"), self._number("application_id")
        finally:
            execute("ROLLBACK")
        if owner != APPLICATION_ID and not is_empty:
            raise StateError(
                f"a Karn database is needed, got another program's SQLite file at {str(self.path)!r}; choose another"
            )
        if version > VERSION:
            raise StateError(
                f"this Esper reads Karn databases up to version {VERSION}, got {version} at {str(self.path)!r}; "
                "update esper-morph"
            )
        execute("PRAGMA foreign_keys = ON")
        execute("PRAGMA synchronous = FULL")
        if version < VERSION:
            self._keep_log()
            migrate(self._connection)

    def _keep_log(self) -> None:
        """Switch the write-ahead log on. SQLite itself does not wait for others while it does that."""
        until = time.monotonic() + self._busy_s
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.02)

    def _number(self, pragma: str) -> int:
        return int(self._connection.execute(f"PRAGMA {pragma}").fetchone()[0])

    # ---------------------------------------------------------------------------------------------- write

    def file(self, reports: Iterable[FieldReport]) -> int:
        """Keep reports, and designs for what grew in them; returns how many were new. All of them or none.

        A report that is there already stays as it is.
        """
        now, new = time.time(), 0
        with self._writing():
            for report in reports:
                row = (report.id, report.run, report.job, int(report.kept), now, msgspec.json.encode(report))
                changed = self._connection.execute("INSERT OR IGNORE INTO reports VALUES (?, ?, ?, ?, ?, ?)", row)
                if changed.rowcount == 0:
                    continue
                new += 1
                for part in report.placements:
                    self._note_use(report.id, part, now)
        return new

    def _note_use(self, report: str, part: Placement, now: float) -> None:
        """Tie a report to the design that it tells of; what has no design yet becomes one: it has grown."""
        name = part.design
        if self._connection.execute("SELECT 1 FROM designs WHERE name = ?", (name,)).fetchone() is None:
            seen = Design(kind=part.place.kind, choice=on_grid(part.choice), created=now, status="passed")
            self._insert(seen)
            name = seen.name
        self._connection.execute("INSERT OR IGNORE INTO uses VALUES (?, ?)", (report, name))

    def add(self, designs: Iterable[Design]) -> int:
        """Keep designs; those whose name is known stay as they are. Returns how many were new."""
        with self._writing():
            return sum(self._insert(design) for design in designs)

    def _insert(self, design: Design) -> bool:
        row = (
            design.name, design.kind, design.status, design.generation, design.created, msgspec.json.encode(design),
        )  # fmt: skip
        made = self._connection.execute("INSERT OR IGNORE INTO designs VALUES (?, ?, ?, ?, ?, ?)", row).rowcount == 1
        if made:
            pairs = [(design.name, parent) for parent in design.parents]
            self._connection.executemany("INSERT OR IGNORE INTO parents VALUES (?, ?)", pairs)
        return made

    # ---------------------------------------------------------------------------------------------- read

    @property
    def identity(self) -> str:
        """Sixteen hexadecimal digits that stand for this database, wherever it is moved; a copy has them too."""
        with self._explained():
            return str(self._connection.execute("SELECT name FROM identity").fetchone()[0])

    def reports(self) -> list[FieldReport]:
        """All reports, in the order of their ids."""
        with self._explained():
            rows = self._connection.execute("SELECT id, body FROM reports ORDER BY id").fetchall()
        return [self._decoded(_REPORTS, name, body, REPORT_VERSION) for name, body in rows]

    def designs(self) -> list[Design]:
        """All designs, in the order of their names."""
        with self._explained():
            rows = self._connection.execute("SELECT name, body FROM designs ORDER BY name").fetchall()
        return [self._decoded(_DESIGNS, name, body, DESIGN_VERSION) for name, body in rows]

    def children(self, name: str) -> list[str]:
        """Names of the designs that were made from this one."""
        with self._explained():
            rows = self._connection.execute("SELECT child FROM parents WHERE parent = ? ORDER BY child", (name,))
            return [row[0] for row in rows]

    def _decoded(self, decoder: msgspec.json.Decoder[Any], name: str, body: bytes, newest: int) -> Any:
        try:
            value = decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StateError(f"{_damage(self.path)} (entry {name!r}: {error})") from error
        if value.v > newest:
            raise StateError(
                f"this Esper reads entries up to version {newest}, got {value.v} ({name!r} in {str(self.path)!r}); "
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
        with self._explained():
            found = self._connection.execute("PRAGMA integrity_check").fetchone()[0]
        if found != "ok":
            raise StateError(f"{_damage(self.path)} ({found})")
        self.reports()
        self.designs()

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Generator[None]:
        """One transaction, taken at once, so that it never has to give way to another writer."""
        with self._explained():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Generator[None]:
        """SQLite's errors in words that say what to do."""
        try:
            yield
        except OSError as error:
            raise StateError(f"{str(self.path)!r} cannot be made ({error}); choose another path") from error
        except sqlite3.OperationalError as error:
            locked = "locked" in str(error) or "busy" in str(error)
            remedy = "another process writes it; try again" if locked else "check path, permissions and free space"
            raise StateError(f"the Karn database {str(self.path)!r} cannot be used ({error}); {remedy}") from error
        except sqlite3.DatabaseError as error:
            raise StateError(f"{_damage(self.path)} ({error})") from error


def _damage(path: Path) -> str:
    return (
        f"the Karn database {str(path)!r} is damaged; move it away and read the runs in again (esper karn import "
        "RUN_DIR --db PATH), or import an earlier export"
    )
