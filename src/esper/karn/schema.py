"""What the database looks like, and how older ones become it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

APPLICATION_ID = 0x4B41524E
"""Tells a database of ours from any other SQLite file (the letters KARN)."""

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
"""Statements that lead from each version to the next; the first ones from an empty file to version 1. Each step runs in
one transaction with the change of version."""

VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, migrations: Sequence[Sequence[str]] = MIGRATIONS) -> None:
    """Bring a database to the newest version, a transaction a step. Whoever comes second finds a step done."""
    for number, statements in enumerate(migrations):
        connection.execute("BEGIN IMMEDIATE")
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] == number:
                for statement in statements:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {number + 1}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
