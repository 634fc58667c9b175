"""A database on a PostgreSQL server: the same tables in a schema of its own, ``karn``.

Writers take turns by a lock that ends with their transaction, or with their connection when they die; readers wait for
nobody. Every setting is made for one transaction, so that a pooler may stand between.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from esper.errors import ConfigError, StateError
from esper.karn.location import shown
from esper.karn.schema import POSTGRES, VERSION, migrate, require_known

_LOCK = 0x4B41524E
"""Of the writers; in one database only Karn should take this advisory lock (the letters KARN)."""
_CONNECT_S = 10
_WORDS = re.compile("|".join(map(re.escape, POSTGRES)))
_SECRET = ("password", "sslpassword")


class PostgresStore:
    """A :class:`~esper.karn.store.Store` on the server that ``url`` and the environment name."""

    def __init__(self, url: str, *, must_exist: bool, busy_s: float) -> None:
        self.name, self._busy_s = shown(url), busy_s
        try:
            given: dict[str, Any] = dict(conninfo_to_dict(url))
        except psycopg.Error:
            # Without its text and as no cause: it may quote the whole URL.
            raise ConfigError(
                f"a URL has parameters that libpq knows, NAME=VALUE, got others in {self.name!r}; correct it"
            ) from None
        self._secrets = {str(given[key]) for key in _SECRET if given.get(key)} | {os.environ.get("PGPASSWORD", "")}
        defaults = {"fallback_application_name": "esper karn", "client_encoding": "utf8"}
        if "PGCONNECT_TIMEOUT" not in os.environ:
            defaults["connect_timeout"] = str(_CONNECT_S)
        with self._explained():
            # Prepared statements would outlive their transaction.
            self._connection = psycopg.connect(
                make_conninfo("", **defaults | given), autocommit=True, prepare_threshold=None
            )
            self._connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        try:
            self._prepare(must_exist=must_exist)
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self, *, must_exist: bool) -> None:
        with self.reading():
            version = self._version_or_none()
        if version is None and must_exist:
            raise StateError(
                f"a Karn database is needed, got none yet at {self.name!r}; make one with: esper karn import RUN_DIR "
                "--db URL"
            )
        require_known(version or 0, self.name)
        if version is None:
            self._make()
        if (version or 0) < VERSION:
            migrate(self)

    def _version_or_none(self) -> int | None:
        """``None`` where Karn has no tables yet."""
        ((ours, others),) = self.fetch(
            "SELECT to_regclass('karn.esper_karn') IS NOT NULL, "
            "EXISTS (SELECT 1 FROM pg_catalog.pg_class WHERE relnamespace = to_regnamespace('karn'))"
        )
        if others and not ours:
            raise StateError(
                "a Karn database is needed, got another program's tables in the schema 'karn' of "
                f"{self.name!r}; choose another database"
            )
        return self.version() if ours else None

    def _make(self) -> None:
        with self.writing():
            # Asked first: making it, even "if not exists", takes a right that a schema made by others spares us. Of the
            # table itself: to_regnamespace would remember that there was none before another writer's turn.
            if not self.fetch("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = 'karn'"):
                self.change("CREATE SCHEMA karn")
            self.change("CREATE TABLE IF NOT EXISTS karn.esper_karn (version INTEGER NOT NULL)")
            if not self.fetch("SELECT version FROM karn.esper_karn"):
                self.change("INSERT INTO karn.esper_karn VALUES (0)")

    def version(self) -> int:
        """Of the schema."""
        return int(self.fetch("SELECT max(version) FROM esper_karn")[0][0])

    def set_version(self, version: int) -> None:
        """Note it."""
        self.change("UPDATE esper_karn SET version = ?", version)

    def fetch(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        return self._execute(statement, values).fetchall()

    def change(self, statement: str, *values: Any) -> int:
        """How many rows were changed."""
        return self._execute(statement, values).rowcount

    def _execute(self, statement: str, values: tuple[Any, ...]) -> psycopg.Cursor[Any]:
        ours = _WORDS.sub(lambda found: POSTGRES[found[0]], statement).replace("?", "%s")
        return self._connection.execute(ours.encode(), values)

    @contextmanager
    def writing(self) -> Generator[None]:
        """One transaction."""
        with self.reading():
            self.fetch("SELECT pg_advisory_xact_lock(?)", _LOCK)
            yield

    @contextmanager
    def reading(self) -> Generator[None]:
        """A transaction too: its settings end with it."""
        with self._explained(), self._connection.transaction():
            self.fetch(
                "SELECT set_config('search_path', 'karn', true), set_config('lock_timeout', ?, true)",
                str(max(1, round(1000 * self._busy_s))),
            )
            yield

    @contextmanager
    def _explained(self) -> Generator[None]:
        """The server's errors in words that say what to do, without what is secret."""
        try:
            yield
        except psycopg.Error as error:
            if isinstance(error, errors.LockNotAvailable):
                remedy = "another process writes it; try again"
            elif isinstance(error, errors.InsufficientPrivilege):
                remedy = "give the user the right to make a schema, or to use the schema karn and its tables"
            elif isinstance(error, psycopg.OperationalError):
                remedy = "is the server up, and are host, database, user and password the right ones?"
            else:
                remedy = "see the server's log"
            told = " ".join(str(error).split())
            hidden = self._hide(told)
            raise StateError(f"the Karn database {self.name!r} cannot be used ({hidden}); {remedy}") from (
                error if hidden == told else None
            )

    def _hide(self, text: str) -> str:
        for secret in sorted(self._secrets - {""}, key=len, reverse=True):
            for form in (secret, quote(secret, safe=""), repr(secret)[1:-1]):
                text = text.replace(form, "***")
        return text

    def check(self) -> None:
        """The server looks after its own pages."""

    def damaged(self, detail: str) -> StateError:
        """What to do about it."""
        return StateError(
            f"the Karn database {self.name!r} is damaged; delete the entry from the schema karn, or restore the "
            f"server's backup ({detail})"
        )

    def close(self) -> None:
        """Hang up."""
        self._connection.close()
