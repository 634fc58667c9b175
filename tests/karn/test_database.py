"""What a Karn database promises, whatever engine is under it: each test runs over SQLite and over PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.karn.engines import Engine
from tests.karn.made import design, report

from esper.errors import StateError
from esper.karn import Database, Snapshot, read_snapshot
from esper.karn.schema import MIGRATIONS, VERSION, migrate

pytestmark = pytest.mark.component

ROOT = Path(__file__).parents[2]


def test_reports_come_back_as_they_were_and_only_once(engine: Engine) -> None:
    reports = [report(number, gain=None if number % 2 else 0.1) for number in range(3)]
    with Database(engine.place) as database:
        assert database.file(reports) == 3
        assert database.file([msgspec.structs.replace(reports[0], reason="told otherwise"), report(3)]) == 1
        assert database.reports() == [*reports, report(3)]
    with Database(engine.place, must_exist=True) as again:
        assert again.reports() == [*reports, report(3)]
        again.check()
        assert "p@ss" not in again.name and "p%40ss" not in again.name


def test_the_order_is_that_of_bytes(engine: Engine) -> None:
    names = ["Zebra", "_run", "apple", "zebra", "Äpfel", "run 10", "run 9"]
    with Database(engine.place) as database:
        database.file([report(run=name) for name in names])
        assert [r.run for r in database.reports()] == sorted(names, key=lambda name: name.encode())


def test_what_has_grown_becomes_a_design(engine: Engine) -> None:
    with Database(engine.place) as database:
        database.file([report(0), report(1), report(2, start="tiny", design="no such design")])
        assert {(d.choice.start, d.operator, d.status) for d in database.designs()} == {
            ("random_zero", "observed", "passed"), ("tiny", "observed", "passed"),
        }  # fmt: skip
    assert len(engine.ask("SELECT * FROM uses")) == 3


def test_designs_know_their_parents_and_children(engine: Engine) -> None:
    parent, child = design(), design("copy", parents=(design().name,), generation=1)
    with Database(engine.place) as database:
        assert database.add([parent, child, parent]) == 2
        assert database.add([msgspec.structs.replace(child, reason="other")]) == 0
        assert database.children(parent.name) == [child.name] and database.children(child.name) == []
        assert sorted(database.designs(), key=lambda d: d.name) == sorted([parent, child], key=lambda d: d.name)


def test_all_reports_of_a_filing_or_none(engine: Engine) -> None:
    with Database(engine.place) as database:
        with pytest.raises(AttributeError):
            database.file([report(0), None])  # type: ignore[list-item]
        assert database.reports() == []
        assert database.file([report(0)]) == 1, "the transaction was given up"


def test_many_writers_lose_nothing(engine: Engine) -> None:
    """Each opens it anew, the first ones at the same moment; they file the same things in different orders."""
    barrier, errors = threading.Barrier(6), list[BaseException]()

    def write(writer: int) -> None:
        try:
            barrier.wait()
            for number in range(6):
                with Database(engine.place) as database:
                    shared = [report(number, run="shared"), report(number + 6, run="shared")]
                    shared = shared if writer % 2 else shared[::-1]
                    database.file([report(number, run=f"run {writer}"), *shared])
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    with Database(engine.place) as database:
        assert len(database.reports()) == 6 * 6 + 12


def test_a_killed_writer_leaves_all_whole(engine: Engine) -> None:
    with Database(engine.place) as database:
        database.file([report(0)])
    code = (
        "import os, sys; from tests.karn.made import report; from esper.karn import Database\n"
        "def some():\n"
        "    yield report(1)\n"
        "    print('half done', flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "Database(sys.argv[1]).file(some())"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code, engine.place], timeout=60, env=environment, capture_output=True, text=True
    )
    assert done.returncode == -9 and done.stdout == "half done\n", done.stderr
    with Database(engine.place) as database:
        assert database.reports() == [report(0)] and database.file([report(1)]) == 1


def test_a_writer_that_never_ends(engine: Engine) -> None:
    with Database(engine.place, busy_s=0.05) as database:
        with engine.busy():
            with pytest.raises(StateError, match=r"cannot be used .*another process writes it; try again"):
                database.file([report()])
            assert database.reports() == [], "readers do not wait"
        assert database.file([report()]) == 1


def test_everything_moves_from_any_to_any(engine: Engine, tmp_path: Path) -> None:
    child = design("copy", parents=(design().name,), generation=1)
    with Database(engine.place) as here, Database(tmp_path / "other.db") as there:
        here.add([design(), child])
        here.file([report(0), report(1, start="gradmax")])
        Snapshot.of(here).write(tmp_path / "out.json")
        moved = read_snapshot(tmp_path / "out.json")
        for _ in range(2):
            there.add(moved.designs)
            there.file(moved.reports)
        assert Snapshot.of(there).encoded() == Snapshot.of(here).encoded()
        assert there.children(design().name) == here.children(design().name) == [child.name]
    back = Snapshot.of(Database(tmp_path / "other.db"))
    with Database(engine.place) as here:
        assert (here.add(back.designs), here.file(back.reports)) == (0, 0)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def test_another_programs(engine: Engine) -> None:
    engine.make_foreign()
    with pytest.raises(StateError, match=r"got another program's .*; choose another"):
        Database(engine.place)
    engine.change("INSERT INTO songs VALUES ('whole')")


def test_a_newer_schema(engine: Engine) -> None:
    Database(engine.place).close()
    engine.make_newer(VERSION + 1)
    with pytest.raises(StateError, match=f"up to version {VERSION}, got {VERSION + 1} .*update esper-morph"):
        Database(engine.place)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (msgspec.json.encode(msgspec.structs.replace(report(), v=99)), "entries up to version 1, got 99 .*'a' in"),
        (b"{", "is damaged; .*entry 'a'"), (b"\xff\x00", "is damaged; .*entry 'a'"),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_read(engine: Engine, body: bytes, told: str) -> None:
    Database(engine.place).close()
    engine.change("INSERT INTO reports VALUES ('a', 'a', 'a', 1, 0, ?)", body)
    with pytest.raises(StateError, match=told), Database(engine.place) as database:
        database.check()


def test_reading_makes_nothing(engine: Engine) -> None:
    for _ in range(2):
        with pytest.raises(StateError, match=r"a Karn database is .*, got no.* at .*make one with: esper karn import"):
            Database(engine.place, must_exist=True)


# ----------------------------------------------------------------------------------------------------------------------
# Versions


def test_migrations_run_once_each_and_keep_what_is_there(engine: Engine) -> None:
    store = engine.store()
    first = (*[()] * VERSION, ("CREATE TABLE a (x INTEGER)", "INSERT INTO a VALUES (1)"))
    migrate(store, first)
    migrate(store, (*first, ("ALTER TABLE a ADD COLUMN y INTEGER DEFAULT 7",)))
    migrate(store, (*first, ("ALTER TABLE a ADD COLUMN y INTEGER DEFAULT 7",)))
    assert engine.ask("SELECT x, y FROM a") == [(1, 7)]
    with store.reading():
        assert store.version() == VERSION + 2
    with pytest.raises(StateError, match="cannot be used"):
        migrate(store, (*first, ("SELECT 1",), ("CREATE TABLE b (x INTEGER)", "nonsense")))
    with store.reading():
        assert store.version() == VERSION + 2, "a step that fails leaves nothing behind"
    with pytest.raises(StateError), store.reading():
        store.fetch("SELECT * FROM b")
    store.close()


def test_a_database_has_a_name_of_its_own(engine: Engine, tmp_path: Path) -> None:
    with Database(engine.place) as one, Database(tmp_path / "other.db") as other:
        name = one.identity
        assert len(name) == 16 and set(name) <= set("0123456789abcdef") and name != other.identity
    with Database(engine.place) as again:
        assert again.identity == name


def test_an_older_database_gets_a_name_and_keeps_its_reports(engine: Engine) -> None:
    store = engine.store()
    migrate(store, MIGRATIONS[:1])
    store.close()
    body = msgspec.json.encode(report(0))
    engine.change("INSERT INTO reports VALUES (?, 'run', 'digits', 1, 0, ?)", report(0).id, body)
    with Database(engine.place) as database:
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
        (b'{"steps": 3}', "must be an export of Karn, got JSON without v, reports, designs; name what"),
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
