"""One file, several writers, every kind of wrong file, and versions that come and go."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.karn.made import design, report

from esper.errors import StateError
from esper.karn import Database, Snapshot, read_snapshot
from esper.karn.schema import APPLICATION_ID, MIGRATIONS, VERSION, migrate

pytestmark = pytest.mark.component


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "karn.db"


def test_reports_come_back_as_they_were_and_only_once(path: Path) -> None:
    reports = [report(number, gain=None if number % 2 else 0.1) for number in range(3)]
    with Database(path) as database:
        assert database.file(reports) == 3
        assert database.file([msgspec.structs.replace(reports[0], reason="told otherwise"), report(3)]) == 1
        assert database.reports() == [*reports, report(3)]
    with Database(path, must_exist=True) as again:
        assert again.reports() == [*reports, report(3)]
        again.check()


def test_what_has_grown_becomes_a_design(path: Path) -> None:
    with Database(path) as database:
        database.file([report(0), report(1), report(2, start="tiny", design="no such design")])
        assert {(d.choice.start, d.operator, d.status) for d in database.designs()} == {
            ("random_zero", "observed", "passed"), ("tiny", "observed", "passed"),
        }  # fmt: skip


def test_designs_know_their_parents_and_children(path: Path) -> None:
    parent, child = design(), design("copy", parents=(design().name,), generation=1)
    with Database(path) as database:
        assert database.add([parent, child, parent]) == 2
        assert database.add([msgspec.structs.replace(child, reason="other")]) == 0
        assert database.children(parent.name) == [child.name] and database.children(child.name) == []
        assert sorted(database.designs(), key=lambda d: d.name) == sorted([parent, child], key=lambda d: d.name)


def test_all_reports_of_a_filing_or_none(path: Path) -> None:
    with Database(path) as database:
        with pytest.raises(AttributeError):
            database.file([report(0), None])  # type: ignore[list-item]
        assert database.reports() == []
        assert database.file([report(0)]) == 1, "the transaction was given up"


def test_many_writers_lose_nothing(path: Path) -> None:
    """Each opens the file anew, the first ones at the same moment."""
    barrier, errors = threading.Barrier(6), list[BaseException]()

    def write(writer: int) -> None:
        try:
            barrier.wait()
            for number in range(8):
                with Database(path) as database:
                    database.file([report(number, run=f"run {writer}"), report(number, run="shared")])
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with Database(path) as database:
        assert len(database.reports()) == 7 * 8


def test_a_killed_writer_leaves_a_whole_file(path: Path) -> None:
    with Database(path) as database:
        database.file([report(0)])
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE');"
        "c.execute(\"INSERT INTO reports VALUES ('x', 'x', 'x', 1, 0, '{}')\"); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60).returncode != 0
    with Database(path) as database:
        assert database.reports() == [report(0)] and database.file([report(1)]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Wrong files


def other_program(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE songs (name TEXT)")
    connection.close()


def newer(path: Path) -> None:
    Database(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()


def entry(body: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Database(path).close()
        with sqlite3.connect(path) as connection:
            connection.execute("INSERT INTO reports VALUES ('a', 'a', 'a', 1, 0, ?)", (body,))
        connection.close()

    return write


def torn(path: Path) -> None:
    with Database(path) as database:
        database.file([report(number) for number in range(200)])
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * 20_000 + data[24_096:])


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no database": (lambda path: path.write_text("a text " * 1000), "is damaged; move it away and read the runs in"),
    "torn": (torn, "is damaged; move it away"),
    "other program": (other_program, "another program's SQLite file"),
    "newer": (newer, f"up to version {VERSION}, got {VERSION + 1} .*update esper-morph"),
    "newer entry": (
        entry(msgspec.json.encode(msgspec.structs.replace(report(), v=99))), "entries up to version 1, got 99",
    ),
    "damaged entry": (entry(b"{"), "is damaged; .*entry 'a'"),
    "folder": (lambda path: path.mkdir(), "cannot be used"),
}  # fmt: skip


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


def test_a_writer_that_never_ends(path: Path) -> None:
    with Database(path, busy_s=0.05) as database:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateError, match=r"locked.*another process writes it; try again"):
            database.file([report()])
        assert database.reports() == [], "readers do not wait"
        other.execute("ROLLBACK")
        other.close()
        assert database.file([report()]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Versions


def test_migrations_run_once_each_and_keep_what_is_there(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    first = (("CREATE TABLE a (x)", "INSERT INTO a VALUES (1)"),)
    migrate(connection, first)
    migrate(connection, (*first, ("ALTER TABLE a ADD COLUMN y DEFAULT 7",)))
    migrate(connection, (*first, ("ALTER TABLE a ADD COLUMN y DEFAULT 7",)))
    assert connection.execute("SELECT x, y FROM a").fetchall() == [(1, 7)]
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, (*first, ("SELECT 1",), ("CREATE TABLE b (x)", "nonsense")))
    assert connection.execute("PRAGMA user_version").fetchone() == (2,), "a step that fails leaves nothing behind"
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'b'").fetchone() == (0,)
    connection.close()


def test_a_database_keeps_its_name_wherever_it_lies(path: Path, tmp_path: Path) -> None:
    with Database(path) as one, Database(tmp_path / "other.db") as other:
        name = one.identity
        assert len(name) == 16 and name != other.identity
    path.rename(tmp_path / "moved.db")
    with Database(tmp_path / "moved.db") as moved:
        assert moved.identity == name


def test_an_older_database_gets_a_name_and_keeps_its_reports(path: Path) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, MIGRATIONS[:1])
    body = msgspec.json.encode(report(0))
    connection.execute("INSERT INTO reports VALUES (?, 'run', 'digits', 1, 0, ?)", (report(0).id, body))
    connection.close()
    with Database(path) as database:
        assert database.reports() == [report(0)] and len(database.identity) == 16


# ----------------------------------------------------------------------------------------------------------------------
# Snapshots


def test_a_snapshot_is_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    one = Snapshot(reports=(report(0), report(1)), designs=(design(), design("copy")))
    two = Snapshot(reports=(report(1), report(0)), designs=(design("copy"), design()))
    assert one.encoded() == two.encoded() and one.digest == two.digest != Snapshot().digest
    one.write(tmp_path / "a.json")
    again = read_snapshot(tmp_path / "a.json")
    assert again.encoded() == one.encoded()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "got none at"), (b"{", "must be an export of Karn"),
        (b'{"v": 9}', "a Karn export up to version 1, got 9"),
        (Snapshot(reports=(report(v=9),)).encoded(), "a Karn report up to version 1, got 9"),
        (Snapshot(designs=(design(v=9),)).encoded(), "a Karn design up to version 1, got 9"),
    ],
)  # fmt: skip
def test_files_that_are_no_snapshot(content: Any, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StateError, match=told):
        read_snapshot(tmp_path / "a.json")
