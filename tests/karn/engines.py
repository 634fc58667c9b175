"""The two engines under a Karn database, reached from outside of Esper."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from tests.servers import PostgresServer

from esper.karn.postgres_store import PostgresStore
from esper.karn.sqlite_store import SqliteStore
from esper.karn.store import Store


class Engine(Protocol):
    place: str
    """Where an empty database of this test may be made."""

    def change(self, statement: str, *values: Any) -> None:
        """Change it from outside; values stand as ``?``."""

    def ask(self, statement: str) -> list[tuple[Any, ...]]: ...

    @contextmanager
    def busy(self) -> Generator[None]:
        """Another writer that does not end."""

    def make_newer(self, version: int) -> None: ...

    def make_foreign(self) -> None:
        """Let it be another program's."""

    def store(self) -> Store: ...


class SqliteEngine:
    def __init__(self, path: Path) -> None:
        self.place = str(path)

    def change(self, statement: str, *values: Any) -> None:
        with sqlite3.connect(self.place) as connection:
            connection.execute(statement, values)
        connection.close()

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.place)
        rows = connection.execute(statement).fetchall()
        connection.close()
        return rows

    @contextmanager
    def busy(self) -> Generator[None]:
        other = sqlite3.connect(self.place, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")
        other.close()

    def make_newer(self, version: int) -> None:
        self.change(f"PRAGMA user_version = {version}")

    def make_foreign(self) -> None:
        Path(self.place).parent.mkdir()
        self.change("CREATE TABLE songs (name TEXT)")

    def store(self) -> Store:
        return SqliteStore(Path(self.place), must_exist=False, busy_s=5.0)


class PostgresEngine:
    def __init__(self, server: PostgresServer) -> None:
        self.server, self.place = server, server.new_database()

    def change(self, statement: str, *values: Any) -> None:
        import psycopg

        with psycopg.connect(self.place, options="-c search_path=karn") as connection:
            connection.execute(statement.replace("?", "%s").encode(), values)

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(self.place, options="-c search_path=karn") as connection:
            return connection.execute(statement.encode()).fetchall()

    @contextmanager
    def busy(self) -> Generator[None]:
        other = self.store()
        with other.writing():
            yield
        other.close()

    def make_newer(self, version: int) -> None:
        self.change(f"UPDATE esper_karn SET version = {version}")

    def make_foreign(self) -> None:
        self.change("CREATE SCHEMA karn")
        self.change("CREATE TABLE songs (name TEXT)")

    def store(self) -> Store:
        return PostgresStore(self.place, must_exist=False, busy_s=5.0)


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """Each of them in turn."""
    if request.param == "sqlite":
        return SqliteEngine(tmp_path / "below" / "karn.db")
    return PostgresEngine(request.getfixturevalue("postgres_server"))
