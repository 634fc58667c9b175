"""``esper run --karn``: proposals from a snapshot, the outcome filed, and a resumed run that ends as if untouched."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.karn.made import experience
from tests.runs.interrupted import JOBS, StepStore, ignore
from tests.runs.test_resume import Stop, without_clock
from tests.servers import PostgresServer

from esper.errors import ConfigError, StateError, UnknownNameError
from esper.karn import Database, read_snapshot
from esper.observe.event_log import read_events
from esper.protocol import AnyEvent, Germinated
from esper.runs import RunOptions, execute
from esper.runs.advice import SNAPSHOT, file_run, reports_of

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")


@pytest.fixture(autouse=True)
def _by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.runs.job.CellStore", StepStore)
    monkeypatch.setattr("esper.runs.advice.NUM_BRED", 1)


@pytest.fixture
def db(tmp_path: Path) -> Path:
    path = tmp_path / "karn.db"
    with Database(path) as database:
        database.file(experience())
    return path


def options(tmp_path: Path, db: Path, name: str = "run", **changes: Any) -> RunOptions:
    made = RunOptions(
        preset="digits",
        device="cpu",
        run_dir=tmp_path / name,
        checkpoint_every=0.0,
        karn=db,
        **{**JOBS["short"], "steps": 60},
    )
    return replace(made, **changes)


def told(run_dir: Path) -> list[AnyEvent]:
    return [without_clock(record.event) for record in read_events(run_dir / "events.jsonl")]


def same(one: list[AnyEvent], other: list[AnyEvent]) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    return [msgspec.msgpack.encode(event) for event in one] == [msgspec.msgpack.encode(event) for event in other]


def test_proposals_grow_and_their_outcome_is_filed_once(tmp_path: Path, db: Path) -> None:
    notes: list[str] = []
    asked = options(tmp_path, db)
    execute(asked, ignore, notes.append)
    run_dir = tmp_path / "run"
    born = [event for event in told(run_dir) if isinstance(event, Germinated)]
    assert born and all("Karn proposes" in event.reason and all(event.designs) for event in born)
    assert any(note.startswith("Karn: ") and "reports are new in" in note for note in notes)
    with Database(db) as database:
        reports = database.reports()
        assert len(reports) == 60 + len(reports_of(run_dir))
        assert file_run(database, run_dir).new == 0
    kept = read_snapshot(run_dir / SNAPSHOT)
    assert len(kept.reports) == 60, "what was known when it began"
    execute(asked, ignore, notes.append)
    assert notes[-1] == f"Karn: 0 of {len(reports_of(run_dir))} reports are new in {db}"


def test_on_a_server_and_no_password_is_written_down(tmp_path: Path, postgres_server: PostgresServer) -> None:
    url = postgres_server.new_database()
    with Database(url) as database:
        database.file(experience())
    notes: list[str] = []
    asked = replace(options(tmp_path, tmp_path), karn=url)
    execute(asked, ignore, notes.append)
    place = f"postgresql://***@{url.partition('@')[2]}"
    assert f"Karn: {len(reports_of(tmp_path / 'run'))} of" in notes[-2] and notes[-2].endswith(f"are new in {place}")
    assert f'"karn":"{place}"' in (tmp_path / "run" / "config.json").read_text(encoding="utf-8").replace(" ", "")
    secret = url.partition("@")[0].rpartition(":")[2].encode()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(secret in content for content in written)
    assert secret.decode() not in f"{asked} {notes}"


def test_a_resumed_run_ends_as_one_that_nobody_touched(tmp_path: Path, db: Path) -> None:
    """Others file their reports meanwhile, and its own snapshot stays."""
    execute(options(tmp_path, db, "whole"), ignore)
    with Database(tmp_path / "same.db") as database:
        database.file(experience())
    asked = options(tmp_path, tmp_path / "same.db", "cut")
    seen: list[AnyEvent] = []

    def count(event: AnyEvent) -> None:
        seen.append(event)
        if len(seen) == 5:  # before the first germination
            raise Stop

    with pytest.raises(Stop):
        execute(asked, count)
    with Database(tmp_path / "same.db") as database:
        database.file([msgspec.structs.replace(r, run="another") for r in experience("copy", 600)])
    notes: list[str] = []
    execute(asked, ignore, notes.append)
    assert notes[0].startswith("resuming")
    whole, cut = told(tmp_path / "whole"), told(tmp_path / "cut")
    assert same(whole[1:-1], cut[1:-1]) and any(isinstance(event, Germinated) for event in cut)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_seeds_of_a_run_do_not_learn_from_one_another(tmp_path: Path, db: Path) -> None:
    execute(options(tmp_path, db, "one", seed=1), ignore)
    with Database(tmp_path / "again.db") as again:
        again.file(experience())
    execute(options(tmp_path, tmp_path / "again.db", "both", seed=0, seeds=2), ignore)
    alone = [e for e in told(tmp_path / "one") if isinstance(e, Germinated)]
    beside = [e for e in told(tmp_path / "both") if isinstance(e, Germinated) and e.seed == 1]
    assert same(alone, beside) and alone


def test_the_bandit_is_taught_instead(tmp_path: Path, db: Path) -> None:
    execute(options(tmp_path, db, controller="bandit", settings=("tamiyo.min_gain_per_cost=1e-9",)), ignore)
    born = [event for event in told(tmp_path / "run") if isinstance(event, Germinated)]
    assert born and "Karn" not in born[0].reason and "after 60 cohorts" in born[0].reason


def test_what_cannot_be_filed_costs_the_run_nothing(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def refuse(*args: Any) -> None:
        raise StateError("the disk is full")

    monkeypatch.setattr("esper.runs.advice.file_run", refuse)
    notes: list[str] = []
    summary = execute(options(tmp_path, db, steps=20), ignore, notes.append)
    assert summary["preset"] == "digits"
    assert f"Karn: not filed: the disk is full; then: esper karn import {tmp_path / 'run'} --db {db}" in notes


def test_without_pyribs_nothing_is_bred_and_the_extra_is_named(
    tmp_path: Path, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def missing(*args: Any, **settings: Any) -> None:
        raise ConfigError("pip install 'esper-morph[karn]'")

    monkeypatch.setattr("esper.runs.advice.breed_into", missing)
    notes: list[str] = []
    execute(options(tmp_path, db), ignore, notes.append)
    assert notes[-1] == "Karn: no new designs: pip install 'esper-morph[karn]'"


def test_wrong_choices_are_refused_before_anything_is_written(tmp_path: Path, db: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100, encoding="utf-8")
    for asked, kind, words in (
        (options(tmp_path, db, karn_strategy="hybird"), UnknownNameError, "did you mean 'hybrid'"),
        (options(tmp_path, tmp_path / "text"), StateError, "is damaged"),
    ):
        with pytest.raises(kind, match=words):
            execute(asked, ignore)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="say --karn PATH too"):
        RunOptions(karn_strategy="risk")


def test_a_log_that_begins_otherwise(tmp_path: Path) -> None:
    """A log without a run's first event gets the folder's name."""
    from tests.cli.recorded import run_events

    from esper.observe.event_log import EventLog

    with EventLog(tmp_path / "mine" / "events.jsonl") as log:
        for event in run_events()[1:]:
            log.append(event)
    (report,) = reports_of(tmp_path / "mine")
    assert report.run.startswith("mine@") and report.job == ""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "events.jsonl").write_bytes(b"")
    with warnings.catch_warnings():
        assert reports_of(tmp_path / "empty") == []
