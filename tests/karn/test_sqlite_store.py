"""What can be wrong with a file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.karn.made import report

from esper.errors import StateError
from esper.karn import Database
from esper.karn.sqlite_store import APPLICATION_ID

pytestmark = pytest.mark.component


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "karn.db"


def other_program(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()


def torn(path: Path) -> None:
    with Database(path) as database:
        database.file([report(number) for number in range(200)])
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * 20_000 + data[24_096:])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no database": (lambda path: path.write_text("a text " * 1000), "is damaged; move it away and read the runs in"),
    "torn": (torn, "is damaged; move it away"),
    "other program": (other_program, "another program's SQLite file"),
    "folder": (lambda path: path.mkdir(), "cannot be used"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_files_are_told_with_what_to_do(name: str, path: Path) -> None:
    make, told = WRONG[name]
    path.parent.mkdir()
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StateError, match=told), Database(path) as database:
        database.check()
    assert not path.is_file() or path.read_bytes()[:4096] == before[:4096], "nothing of it was touched"


def test_reading_makes_no_file(path: Path) -> None:
    with pytest.raises(StateError, match=r"got no file .*esper karn import"):
        Database(path, must_exist=True)
    assert not path.exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"cannot be made .*choose another path"):
        Database(tmp_path / "file" / "karn.db")


def test_a_file_of_ours_says_so(path: Path) -> None:
    Database(path).close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
