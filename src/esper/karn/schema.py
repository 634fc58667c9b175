"""What the database looks like, and how older ones become it."""

from __future__ import annotations

from collections.abc import Sequence

from esper.errors import StateError
from esper.karn.store import Store

_FIRST = (
    """
    CREATE TABLE reports (
        id TEXT PRIMARY KEY,
        run TEXT NOT NULL,
        job TEXT NOT NULL,
        kept INTEGER NOT NULL,
        filed REAL NOT NULL,
        body BLOB NOT NULL
    )
    """,
    """
    CREATE TABLE designs (
        name TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        status TEXT NOT NULL,
        generation INTEGER NOT NULL,
        created REAL NOT NULL,
        body BLOB NOT NULL
    )
    """,
    """
    CREATE TABLE parents (
        child TEXT NOT NULL REFERENCES designs (name),
        parent TEXT NOT NULL,
        PRIMARY KEY (child, parent)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE uses (
        report TEXT NOT NULL REFERENCES reports (id),
        design TEXT NOT NULL,
        PRIMARY KEY (report, design)
    ) WITHOUT ROWID
    """,
    "CREATE INDEX uses_by_design ON uses (design)",
)

_SECOND = (
    "CREATE TABLE identity (name TEXT NOT NULL)",
    "INSERT INTO identity VALUES (lower(hex(randomblob(8))))",
)
"""A database has a name of its own, by which those who bring it reports know it again wherever it lies."""

MIGRATIONS: Sequence[Sequence[str]] = (_FIRST, _SECOND)
"""Statements that lead from each version to the next; the first ones from an empty database to version 1. Each step
runs in one transaction with the change of version."""

VERSION = len(MIGRATIONS)

POSTGRES = {
    "lower(hex(randomblob(8)))": "substr(md5(random()::text || clock_timestamp()::text), 1, 16)",
    "TEXT": 'TEXT COLLATE "C"',  # ordered as SQLite orders it: by bytes
    "REAL": "DOUBLE PRECISION",  # its own REAL has four bytes
    "BLOB": "BYTEA",
    "WITHOUT ROWID": "",
}
"""SQLite's words in the statements above, and PostgreSQL's."""


def require_known(version: int, name: str) -> None:
    """Refuse what a newer Esper has made."""
    if version > VERSION:
        raise StateError(
            f"this Esper reads Karn databases up to version {VERSION}, got {version} at {name!r}; update esper-morph"
        )


def migrate(store: Store, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring a database to the newest version, a transaction a step. Whoever comes second finds a step done."""
    for number, statements in enumerate(migrations):
        with store.writing():
            if store.version() == number:
                for statement in statements:
                    store.change(statement)
                store.set_version(number + 1)
