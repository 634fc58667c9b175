"""A database in one SQLite file that several processes may read and write at a time.

Readers never wait for a writer (write-ahead log); writers wait for one another for up to half a minute. The file must
lie on a disk of this machine: a network file system does not keep the promises that the log needs.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esper.errors import StateError
from esper.karn.schema import VERSION, migrate, require_known

APPLICATION_ID = 0x4B41524E
"""Tells a database of ours from any other SQLite file (the letters KARN)."""


class SqliteStore:
    """A :class:`~esper.karn.store.Store` in the file ``path``, which is made where there is none, and its folder."""

    def __init__(self, path: Path, *, must_exist: bool, busy_s: float) -> None:
        self.name, self._busy_s = str(path), busy_s
        if must_exist and not path.is_file():
            what = "a folder" if path.is_dir() else "no file"
            raise StateError(
                f"a Karn database is a file, got {what} at {self.name!r}; make one with: esper karn import RUN_DIR"
            )
        with self.reading():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=busy_s, isolation_level=None)
        try:
            with self.reading():
                self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        execute("BEGIN")  # all of one moment: somebody else may be making the file just now
        try:
            is_empty = execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            version, owner = self.version(), self._number("application_id")
        finally:
            execute("ROLLBACK")
        if owner != APPLICATION_ID and not is_empty:
            raise StateError(
                f"a Karn database is needed, got another program's SQLite file at {self.name!r}; choose another"
            )
        require_known(version, self.name)
        execute("PRAGMA foreign_keys = ON")
        execute("PRAGMA synchronous = FULL")
        if version < VERSION:
            self._keep_log()
            migrate(self)

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

    def version(self) -> int:
        """Of the schema."""
        return self._number("user_version")

    def set_version(self, version: int) -> None:
        """Note it, and that the file is ours."""
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {version}")

    def fetch(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        return self._connection.execute(statement, values).fetchall()

    def change(self, statement: str, *values: Any) -> int:
        """How many rows were changed."""
        return self._connection.execute(statement, values).rowcount

    @contextmanager
    def writing(self) -> Generator[None]:
        """One transaction."""
        with self.reading():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def reading(self) -> Generator[None]:
        """SQLite's errors in words that say what to do."""
        try:
            yield
        except OSError as error:
            raise StateError(f"{self.name!r} cannot be made ({error}); choose another path") from error
        except sqlite3.OperationalError as error:
            locked = "locked" in str(error) or "busy" in str(error)
            remedy = "another process writes it; try again" if locked else "check path, permissions and free space"
            raise StateError(f"the Karn database {self.name!r} cannot be used ({error}); {remedy}") from error
        except sqlite3.DatabaseError as error:
            raise self.damaged(str(error)) from error

    def check(self) -> None:
        """Every page of the file."""
        with self.reading():
            found = self._connection.execute("PRAGMA integrity_check").fetchone()[0]
        if found != "ok":
            raise self.damaged(found)

    def damaged(self, detail: str) -> StateError:
        """What to do about it."""
        return StateError(
            f"the Karn database {self.name!r} is damaged; move it away and read the runs in again (esper karn import "
            f"RUN_DIR --db PATH), or import an earlier export ({detail})"
        )

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()
