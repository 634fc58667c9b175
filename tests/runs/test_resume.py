"""A run that is killed anywhere, and started again with the same command, ends as one that nobody has touched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.runs.interrupted import JOBS, StepStore, ignore, options

from esper.errors import ConfigError, EsperError, StateError
from esper.observe.event_log import EventLog, read_events
from esper.observe.report import write_report
from esper.protocol import AnyEvent, ArmFinished, Lifecycle, Overhead, RunFinished, RunStarted, Transitioned
from esper.runs import RunOptions, execute
from esper.safety.checkpoint import manifest_numbers_or_none, read_manifest
from esper.safety.disk import LocalDisk
from esper.safety.manifest import manifest_name

pytestmark = pytest.mark.integration

pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")
ROOT = Path(__file__).parents[2]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
CLOCKED = ("seconds", "run_dir", "checkpoint_every", "jobs")


def timeless(value: Any) -> Any:
    """Without what a clock, a place or the number of processes says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in CLOCKED}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def without_clock(event: AnyEvent) -> AnyEvent:
    if isinstance(event, Overhead):
        return msgspec.structs.replace(event, milliseconds={})
    if isinstance(event, ArmFinished):
        return msgspec.structs.replace(event, seconds=1.0)
    if isinstance(event, RunFinished):
        return msgspec.structs.replace(event, summary=timeless(event.summary))
    if isinstance(event, RunStarted):
        return msgspec.structs.replace(event, run="run", config=timeless(event.config))
    return event


def result_of(run_dir: Path, scratch: Path) -> dict[str, str]:
    """Hashes of all that a run leaves, declared clock fields aside."""
    folder = scratch / "run"
    folder.mkdir(parents=True)
    with EventLog(folder / "events.jsonl", clock=lambda: 0.0) as log:
        for record in read_events(run_dir / "events.jsonl"):
            log.append(without_clock(record.event))
    write_report(folder)
    summary = timeless(json.loads((run_dir / "summary.json").read_text(encoding="utf-8")))
    parts = {
        "events": (folder / "events.jsonl").read_bytes(),
        "report": re.sub(rb"\d+(\.\d+)? ms", b"", (folder / "report.html").read_bytes()),
        "summary": json.dumps(summary).encode(),
        "weights": (run_dir / "model.safetensors").read_bytes(),
        "structure": (run_dir / "structure.json").read_bytes(),
        "files": " ".join(sorted(os.listdir(run_dir))).encode(),
    }
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


@pytest.fixture(autouse=True)
def _by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.runs.job.CellStore", StepStore)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results of runs that nobody has interrupted, by the job's name."""
    known: dict[str, dict[str, str]] = {}

    def result(name: str) -> dict[str, str]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                execute(replace(options(name, folder / "run"), checkpoint_every=1e9), ignore)
            known[name] = result_of(folder / "run", folder / "told")
        return known[name]

    return result


def kill(name: str, folder: Path, chains: int, kills: int, *, timeout: float = 280) -> tuple[list[int], str]:
    """Kill ``chains`` runs up to ``kills`` times each; returns how many kills there were and how many in a save, and
    what the runs have said."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, str(ROOT / "tests/runs/interrupted.py"), str(folder), name, "0", str(chains), str(kills)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    rows = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(rows) == chains
    return [sum(column) for column in zip(*rows, strict=True)], done.stderr


@needs_fork
def test_twenty_kills_change_nothing(tmp_path: Path, untouched: Any) -> None:
    (kills, in_a_save), _ = kill("short", tmp_path, 2, 11)
    assert kills >= 20 and in_a_save >= 8
    for chain in range(2):
        assert result_of(tmp_path / f"short-{chain}", tmp_path / f"told-{chain}") == untouched("short")


@needs_fork
@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("name", "chains", "most"), [("short", 12, 12), ("whole", 8, 12), ("grown", 8, 12)])
def test_very_many_kills_change_nothing(name: str, chains: int, most: int, tmp_path: Path, untouched: Any) -> None:
    """Together more than 200, more than half of them inside a save; ``whole`` has control arms and two rates, ``grown``
    accepts two cohorts."""
    (kills, in_a_save), _ = kill(name, tmp_path, chains, most, timeout=7200)
    print(f"{name}: {kills} kills, {in_a_save} inside a save")
    assert kills >= 0.8 * chains * most and in_a_save >= kills / 3
    for chain in range(chains):
        assert result_of(tmp_path / f"{name}-{chain}", tmp_path / f"told-{chain}") == untouched(name)


@needs_fork
def test_kills_around_an_accepted_growth_change_nothing(tmp_path: Path, untouched: Any) -> None:
    """Accepted between two checkpoints and lost with the process; accepted before the one that is gone on from."""
    (kills, _), said = kill("grown", tmp_path, 1, 5)
    assert kills == 5
    resumed = [int(step) for step in re.findall(r"resuming .* at step (\d+)", said)]
    assert resumed[:3] == [56, 56, 72], "the acceptance of step 57 is done twice, and then it is in the checkpoint"
    assert 72 <= resumed[3] < resumed[4] < 97 and len(resumed) == 5
    events = [record.event for record in read_events(tmp_path / "grown-0" / "events.jsonl")]
    kept = [event.step for event in events if isinstance(event, Transitioned) and event.target is Lifecycle.FOSSILIZED]
    assert kept == [57, 97]
    assert result_of(tmp_path / "grown-0", tmp_path / "told") == untouched("grown")


def steps_kept(run_dir: Path) -> list[int]:
    """How far each training of a run has come, by its newest checkpoint."""
    disk, steps = LocalDisk(), list[int]()
    for folder in (run_dir / "progress").glob("grown-*"):
        try:
            steps += [read_manifest(disk, folder, n).step for n in manifest_numbers_or_none(disk, folder)[:1]]
        except OSError:
            steps.append(0)  # it was removed as an older one in this moment
    return steps


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
@pytest.mark.parametrize("kills", [[60], pytest.param([20, 40, 58, 70, 90, 99, 110], marks=pytest.mark.long)])
def test_kills_of_a_run_with_two_processes_change_nothing(kills: list[int], tmp_path: Path, untouched: Any) -> None:
    """Killed alone, in turn with all its processes, once both trainings have come so far; what it leaves of itself
    must not stand in the way of the next one."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    arguments = ["--seeds", "2", "--steps", "130", "--lr", "0.01", "--no-controls", "--device", "cpu", "--jobs", "2"]
    arguments += ["--checkpoint-every", "0.02", "--run-dir", str(tmp_path / "run"), "--set", *JOBS["pair"]["settings"]]
    command = [sys.executable, "-m", "esper", "run", "digits", *arguments]
    for number, step in enumerate(kills):
        with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            while not (min(kept := steps_kept(tmp_path / "run"), default=0) >= step and len(kept) == 2):
                assert process.poll() is None, "it has ended before it could be killed"
                time.sleep(0.02)
            if number % 2:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr
    assert result_of(tmp_path / "run", tmp_path / "told") == untouched("pair")


# ----------------------------------------------------------------------------------------------------------------------
# What a user meets


class Stop(Exception):
    """The test's own end of a run."""


def begin(run_dir: Path | None, events: int, **changes: Any) -> RunOptions:
    """A run that ends in the middle, after so many events."""
    asked = RunOptions(preset="digits", device="cpu", run_dir=run_dir, checkpoint_every=0.0, **JOBS["short"])
    asked = replace(asked, **changes)
    seen: list[AnyEvent] = []

    def count(event: AnyEvent) -> None:
        seen.append(event)
        if len(seen) == events:
            raise Stop

    with pytest.raises(Stop):
        execute(asked, count)
    return asked


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_resuming_says_from_where_and_tells_what_is_past_apart(tmp_path: Path, untouched: Any) -> None:
    asked = begin(tmp_path / "run", 20)
    notes: list[str] = []
    past: list[AnyEvent] = []
    new: list[AnyEvent] = []
    execute(asked, new.append, notes.append, past.append)
    assert re.match(r"resuming .*run after 0 trainings, in grown-seed0-lr0.01 at step \d+", notes[0])
    assert isinstance(past[0], RunStarted) and isinstance(new[-1], RunFinished) and len(past) >= 19
    assert result_of(tmp_path / "run", tmp_path / "told") == untouched("short")
    again: list[AnyEvent] = []
    summary = execute(asked, new.append, notes.append, again.append)
    assert "is finished; --fresh begins anew" in notes[-1] and len(again) == len(past) + len(new)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert not (tmp_path / "run" / "progress").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    asked = begin(tmp_path / "run", 6)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(ConfigError, match=r"1 differences in .*run': steps: 120 there, 90 here; use --fresh"):
        execute(replace(asked, steps=90), ignore)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
    execute(replace(asked, steps=20, fresh=True), ignore)
    assert (tmp_path / "run.1" / "config.json").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["steps"] == 20


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_a_directory_the_interrupted_run_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = begin(None, 6, steps=20)
    begin(None, 6, steps=30)
    summary = execute(asked, ignore)
    assert summary["run_dir"] == "runs/digits-01"
    assert execute(asked, ignore)["run_dir"] == "runs/digits-03", "a finished run is not run again"
    begin(None, 6, steps=20)
    assert execute(replace(asked, fresh=True), ignore)["run_dir"] == "runs/digits-05"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_checkpoint_costs_time_and_nothing_else(tmp_path: Path, untouched: Any) -> None:
    asked = begin(tmp_path / "run", 20)
    folder = tmp_path / "run" / "progress" / "grown-seed0-lr0.01"
    newest = max(int(path.stem.split("-")[1]) for path in folder.glob("checkpoint-*.json"))
    (folder / manifest_name(newest)).write_bytes(b"{")
    execute(asked, ignore)
    assert result_of(tmp_path / "run", tmp_path / "told") == untouched("short")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", ["cut", "torn", "gone", "other"])
def test_a_log_that_a_power_cut_has_hurt_is_told_again(damage: str, tmp_path: Path, untouched: Any) -> None:
    asked = begin(tmp_path / "run", 20)
    log = tmp_path / "run" / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lost = {
        "cut": b"".join(lines[:-5]) + lines[-5][:20],
        "torn": b"".join([*lines[:8], bytes(len(lines[8]) - 1) + b"\n", *lines[9:]]),
        "gone": b"",
        "other": b"".join([*lines[:8], lines[8].replace(b'"step":', b'"step":1'), *lines[9:]]),
    }
    log.write_bytes(lost[damage])
    execute(asked, ignore)
    assert result_of(tmp_path / "run", tmp_path / "told") == untouched("short")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_disk_that_takes_no_checkpoint_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: Any
) -> None:
    from esper.safety.checkpoint import Checkpoints

    def refuse(*args: Any, **settings: Any) -> None:
        raise StateError("no space")

    monkeypatch.setattr(Checkpoints, "save", refuse)
    with pytest.warns(RuntimeWarning, match="the run goes on without a new checkpoint: no space"):
        execute(options("short", tmp_path / "run"), ignore)
    assert result_of(tmp_path / "run", tmp_path / "told") == untouched("short")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_run_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    asked = begin(tmp_path / "run", 6)
    with EventLog(tmp_path / "run" / "events.jsonl"):
        with pytest.raises(EsperError, match="already writes"):
            execute(asked, ignore)
        with pytest.raises(ConfigError, match="being written; wait or stop it"):
            execute(replace(asked, fresh=True), ignore)


def test_a_directory_without_its_configuration(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "events.jsonl").write_bytes(b"")
    (run_dir / ".config.json-x").write_bytes(b"{")
    execute(replace(options("short", run_dir), steps=10), ignore)
    assert not list(run_dir.glob(".config*"))
    (run_dir / "config.json").write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match="must hold a run's configuration"):
        execute(replace(options("short", run_dir), steps=10), ignore)
