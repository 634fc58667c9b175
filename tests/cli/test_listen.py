"""``esper run --bus`` and ``esper karn listen``: what a run has found is in a database elsewhere, each report once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import clean_environment
from tests.karn.made import report
from tests.servers import RedisServer, redis_server

from esper.cli import main
from esper.karn import Database, FieldReport
from esper.oona.address import open_bus
from esper.oona.bus import Message
from esper.oona.link import Link
from esper.oona.topics import FIELD_REPORTS
from esper.runs.advice import file_run, reports_of
from esper.runs.bus import name_on_bus

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")

KEY = "k" * 40
__all__ = ["redis_server"]


@pytest.fixture
def url(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_BUS_KEY", KEY)
    return f"{redis_server.url}?prefix={tmp_path.name[-60:]}."


def train(url: str, run_dir: str, *words: str) -> list[FieldReport]:
    small = ["--steps", "120", "--seeds", "1", "--lr", "0.01", "--no-controls", "--device", "cpu"]
    assert main(["run", *small, "--run-dir", run_dir, "--bus", url, *words]) == 0
    return reports_of(Path(run_dir))


def listen(capsys: pytest.CaptureFixture[str], url: str, db: str, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["karn", "listen", "--bus", url, "--db", db, "--json", "-", *words]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def held(db: str) -> tuple[list[FieldReport], list[str]]:
    with Database(Path(db)) as database:
        return database.reports(), [design.name for design in database.designs()]


def test_a_listener_holds_what_the_runs_own_database_would(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("esper.runs.advice.breed_into", lambda *args, **settings: [])
    found = train(url, "one", "--karn", "local.db")
    assert found and found[0].run.startswith(f"{name_on_bus(Path('one'))}@")
    told = listen(capsys, url, "karn.db", "--count", str(len(found)), "--seconds", "30")
    assert (told["filed"], told["new"], told["buried"]) == (len(found), len(found), 0)
    assert held("karn.db") == held("local.db") and held("karn.db")[0] == found
    assert train(url, "one", "--karn", "local.db") == found, "the same command, given again, tells nothing twice"
    other = train(url, "two", "--seed", "1")
    assert listen(capsys, url, "karn.db", "--count", str(len(other)), "--seconds", "30")["new"] == len(other)
    with Database(Path("local.db")) as database:
        file_run(database, Path("two"))
    assert held("karn.db") == held("local.db")
    again = listen(capsys, url, "another.db", "--count", str(len(found + other)), "--seconds", "30")
    assert again["new"] == len(found + other) and again["group"] != told["group"], "each database gets all of them"
    assert main(["karn", "import", "one", "--db", "karn.db"]) == 0
    assert f"0 of {len(found)} reports are new" in capsys.readouterr().out


def test_a_run_that_was_not_on_a_bus_keeps_its_reports_names(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["run", "--steps", "120", "--seeds", "1", "--lr", "0.01", "--no-controls", "--device", "cpu"]
    assert main([*small, "--run-dir", "one"]) == 0
    assert main(["karn", "import", "one", "--db", "karn.db"]) == 0
    found = reports_of(Path("one"))
    assert found[0].run.startswith("one@")
    assert main([*small, "--run-dir", "one", "--bus", url]) == 0
    told = listen(capsys, url, "karn.db", "--count", str(len(found)), "--seconds", "30")
    assert (told["filed"], told["new"]) == (len(found), 0)


def test_a_run_whose_bus_is_away_sends_its_reports_when_it_is_given_again(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train("redis://127.0.0.1:1?timeout=0.2", "one")
    assert "bytes of events and reports" in capsys.readouterr().err
    assert train(url, "one") == found
    told = listen(capsys, url, "karn.db", "--count", str(len(found)), "--seconds", "30")
    assert told["new"] == len(found) and held("karn.db")[0] == found


def test_poison_goes_to_the_dead_letters_and_is_told(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def put() -> None:
        bus = open_bus(url)
        await bus.publish(FIELD_REPORTS, [Message("run/job", b"rubbish")])
        await bus.close()

    asyncio.run(put())
    assert main(["karn", "listen", "--bus", url, "--db", "karn.db", "--seconds", "0.7"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "filed      0 of 0 reports are new in karn.db, 1 in the dead letters\n"
    assert "listening on redis://" in shown.err and "a report is for the dead letters" in shown.err
    assert KEY not in shown.out + shown.err and "whoever reaches" not in shown.err
    assert main(["bus", "dead-letters", "--bus", url]) == 0
    assert "karn.field_reports" in capsys.readouterr().out


def test_a_signal_ends_it_with_what_was_filed(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_BUS_KEY")
    link = Link(url, run="run", folder=tmp_path / "bus")
    link.report([report(0), report(1)])
    assert link.stop()
    words = [sys.executable, "-m", "esper.cli", "karn", "listen", "--bus", url, "--db", "karn.db"]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    first = [process.stderr.readline() for _ in range(2)]
    assert "listening on redis://" in first[0] and "no ESPER_BUS_KEY: whoever reaches the bus is believed" in first[1]
    end = time.monotonic() + 30
    while len(held("karn.db")[0]) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "filed      2 of 2 reports are new in karn.db\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--count", "0"], "--count must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be above 0, got 0"),
        (["--seconds", "inf"], "--seconds must be above 0, got inf"),
        (["here"], "listen takes nothing more, got 'here'"),
        (["--bus", "http://x"], "a bus begins with one of"),
        (["--db", "."], "cannot be used"),
    ],
)
def test_each_mistake_is_named(words: list[str], says: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["karn", "listen", *words]) in (1, 2)
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()
