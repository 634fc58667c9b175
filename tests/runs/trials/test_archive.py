"""Finished trials are kept, line by line, whatever cuts a sitting short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tests.runs.trials.made import fault, kept, trial

from esper.errors import ConfigError, DataError
from esper.runs.trials import TrialOptions, job
from esper.runs.trials.archive import Archive, header
from esper.runs.trials.records import AnyRecord
from esper.runs.trials.tasks import task_name

pytestmark = pytest.mark.component


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "new" / "folder", "grown")
    records = [trial(3, kept(0.1, -0.2, half=0.01)), trial(1), fault(2, "nan_batch", held=False)]
    for record in records:
        archive.append(record)
    again = Archive(tmp_path / "new" / "folder", "grown")
    assert again.records == sorted(records, key=lambda record: record.number) == archive.records
    assert 3 in again and 0 not in again


def test_a_line_that_a_killed_writer_left_is_cut_off(tmp_path: Path) -> None:
    archive = Archive(tmp_path, "grown")
    archive.append(trial(0))
    with archive.path.open("ab") as stream:
        stream.write(b'{"type":"trial","number":1')
    again = Archive(tmp_path, "grown")
    assert [record.number for record in again.records] == [0]
    again.append(trial(1))
    assert [record.number for record in Archive(tmp_path, "grown").records] == [0, 1]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    archive = Archive(tmp_path, "grown")
    archive.append(trial(0))
    archive.path.write_bytes(archive.path.read_bytes() + b"{}\n")
    with pytest.raises(DataError, match="line 3 is not a trial"):
        Archive(tmp_path, "grown")


def test_other_versions_are_not_mixed(tmp_path: Path) -> None:
    archive = Archive(tmp_path, "grown")
    other = msgspec.structs.replace(header(), torch="1.0")
    archive.path.write_bytes(msgspec.json.encode(other) + b"\n")
    with pytest.raises(ConfigError, match=r"PyTorch 1\.0.*--fresh"):
        Archive(tmp_path, "grown")
    assert Archive(tmp_path, "grown", fresh=True).records == []


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Trials that cost nothing; the numbers of those that were run."""
    run: list[int] = []

    def make(number: int, held_out_rows: int | None = None) -> AnyRecord:
        run.append(number)
        return trial(number, kept(0.1))

    monkeypatch.setattr(job, "grown_trial", make)
    return run


def stop_after(num: int) -> Callable[[int, int, AnyRecord | None], None]:
    def on_record(done: int, total: int, record: AnyRecord | None) -> None:
        if done == num and record is not None:
            raise Interrupted

    return on_record


def ignore(done: int, total: int, record: AnyRecord | None) -> None:
    pass


def test_the_same_command_goes_on_and_ends_as_if_never_stopped(tmp_path: Path, quick: list[int]) -> None:
    options = TrialOptions(num=5, seed=10, run_dir=tmp_path)
    with pytest.raises(Interrupted):
        job.execute(options, stop_after(2))
    told: list[tuple[int, int]] = []
    summary = job.execute(options, lambda done, total, _: told.append((done, total)))
    assert quick == [10, 11, 12, 13, 14]
    assert told == [(2, 5), (3, 5), (4, 5), (5, 5)]
    assert summary == job.execute(TrialOptions(num=5, seed=10, run_dir=tmp_path / "other"), ignore)


def test_more_trials_of_the_same_kind_reuse_what_is_there(tmp_path: Path, quick: list[int]) -> None:
    job.execute(TrialOptions(num=2, run_dir=tmp_path), ignore)
    assert job.execute(TrialOptions(num=3, run_dir=tmp_path), ignore)["trials"] == 3
    assert job.execute(TrialOptions(num=1, run_dir=tmp_path), ignore)["trials"] == 1
    job.execute(TrialOptions(num=1, run_dir=tmp_path, fresh=True), ignore)
    assert quick == [0, 1, 2, 0]


def test_trials_with_other_held_out_batches_lie_apart(tmp_path: Path, quick: list[int]) -> None:
    job.execute(TrialOptions(num=2, run_dir=tmp_path), ignore)
    asked = TrialOptions(num=2, run_dir=tmp_path, held_out_rows=64)
    assert asked.command == "esper trials --n 2 --held-out-rows 64" and asked.kind == "grown"
    assert job.execute(asked, ignore)["trials"] == 2
    assert quick == [0, 1, 0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown-64-rows.jsonl", "grown.jsonl"]


def test_processes_give_what_one_gives() -> None:
    assert sorted(job.run_each(task_name, range(5), 2)) == sorted(map(task_name, range(5)))  # type: ignore[arg-type,type-var]
