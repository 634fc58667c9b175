"""What a database of Karn asks of the engine under it.

Statements are written in what SQLite and PostgreSQL share, with ``?`` for values; ``schema.py`` says what its types are
called elsewhere.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from esper.errors import StateError


class Store(Protocol):
    """One open database, of one thread.

    Everything raises ``StateError``, with what to do, where the engine refuses or has gone.
    """

    @property
    def name(self) -> str:
        """Where it is, for people: nothing secret in it."""
        ...

    def writing(self) -> AbstractContextManager[None]:
        """One transaction, taken at once, so that it never has to give way to another writer; all of it or nothing."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """Around what only reads; it waits for no writer."""
        ...

    def fetch(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        ...

    def change(self, statement: str, *values: Any) -> int:
        """How many rows were changed."""
        ...

    def version(self) -> int:
        """The schema's, 0 in an empty database."""
        ...

    def set_version(self, version: int) -> None:
        """Note it."""
        ...

    def check(self) -> None:
        """Let the engine look for damage, where it can."""
        ...

    def damaged(self, detail: str) -> StateError:
        """The error for an entry that cannot be read."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...
