from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import esper
from esper.errors import ConfigError, DivergenceError, UnknownNameError
from esper.observe.event_log import read_events
from esper.protocol import AnyEvent, ArmFinished, RunFinished, RunStarted
from esper.runs import RunOptions, execute, load_grown
from esper.runs.arms import ARMS
from esper.runs.directory import claim_directory
from esper.runs.presets.digits import Digits

pytestmark = pytest.mark.integration

pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")

SHORT = RunOptions(steps=60, seeds=2, lr=(1e-2,), controls=False, device="cpu")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[AnyEvent]]]:
    """Run a short job in a directory of its own; returns its summary and what was shown."""

    def run(name: str = "run", **changes: Any) -> tuple[dict[str, Any], list[AnyEvent]]:
        shown: list[AnyEvent] = []
        return execute(replace(SHORT, run_dir=tmp_path / name, **changes), shown.append), shown

    return run


Job = Callable[..., tuple[dict[str, Any], list[AnyEvent]]]


def comparable(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in ("seconds", "run_dir")}
    return [comparable(v) for v in value] if isinstance(value, list) else value


def test_two_processes_find_what_one_does(job: Job, tmp_path: Path) -> None:
    one, shown = job("one", lr=(1e-2, 3e-3))
    two, _ = job("two", lr=(1e-2, 3e-3), jobs=2)
    assert comparable(one) == comparable(two)
    first, second = (load_grown(tmp_path / name)[1].state_dict() for name in ("one", "two"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    kinds = [type(event).__name__ for event in shown if not hasattr(event, "milliseconds")]
    again = [type(record.event).__name__ for record in read_events(tmp_path / "two" / "events.jsonl")]
    assert kinds == [kind for kind in again if kind != "Overhead"]


def test_the_run_directory_holds_everything(job: Job, tmp_path: Path) -> None:
    summary, shown = job()
    run_dir = tmp_path / "run"
    assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8")) == summary
    stored = [record.event for record in read_events(run_dir / "events.jsonl")]
    assert [msgspec.json.encode(event) for event in stored] == [msgspec.json.encode(event) for event in shown]
    assert isinstance(shown[0], RunStarted) and isinstance(shown[-1], RunFinished)
    assert shown[0].environment["esper"] == esper.__version__
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert (config["seeds"], config["steps"], config["lrs"], config["device"]) == ([0, 1], 60, [0.01], "cpu")
    assert "<svg" in (run_dir / "report.html").read_text(encoding="utf-8")
    finished = [event for event in shown if isinstance(event, ArmFinished)]
    assert [(event.arm, event.seed) for event in finished] == [("grown", 0), ("grown", 1)]
    assert summary["arms"]["grown"]["score_per_seed"] == [event.score for event in finished]


def test_the_learning_rate_is_chosen_without_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm is tried at every rate on the first seed; the test split is scored after that, once a kept training."""
    order: list[str] = []
    real = Digits.test

    def spied(self: Digits, model: nn.Module) -> tuple[float, float]:
        order.append("test")
        return real(self, model)

    monkeypatch.setattr(Digits, "test", spied)

    def note(words: str) -> None:
        order.append("choosing" if "choosing" in words else "chosen")

    options = replace(SHORT, seeds=2, lr=(1e-5, 1e-2), controls=True, steps=20, run_dir=tmp_path / "run")
    summary = execute(options, unseen, note)
    assert order == ["choosing", "chosen", "test", "test"] * len(ARMS)
    for arm in ARMS:
        trials = summary["arms"][arm]["lr_trials"]
        assert set(trials) == {"1e-05", "0.01"} and trials["0.01"] < trials["1e-05"]
        assert summary["arms"][arm]["lr"] == 1e-2
    assert set(summary["grown_minus"]) == set(ARMS) - {"grown"}


def unseen(event: AnyEvent) -> None:
    """The events are not what is looked at."""


def test_a_rate_that_diverges_is_not_chosen(job: Job) -> None:
    with pytest.warns(RuntimeWarning, match="the training loss is not finite"):
        summary, _ = job(seeds=1, lr=(1e30, 1e-2), steps=20)
    arm = summary["arms"]["grown"]
    assert arm["lr"] == 1e-2 and not arm["lr_trials"]["1e+30"] < 1e6


@pytest.mark.parametrize("rates", [(1e30,), (1e25, 1e30)], ids=["one", "all"])
def test_rates_that_all_diverge_end_the_job_in_words(job: Job, tmp_path: Path, rates: tuple[float, ...]) -> None:
    with (
        pytest.warns(RuntimeWarning, match="the training loss is not finite"),
        pytest.raises(DivergenceError, match=r"grown, seed 0, must stay finite, got nan .*use a smaller one: --lr"),
    ):
        job(seeds=1, lr=rates, steps=20)
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"preset": "digit"}, UnknownNameError, "did you mean 'digits'"),
        ({"controller": "oracle"}, UnknownNameError, "oracle"),
        ({"start": "warm"}, UnknownNameError, "warm"),
        ({"budget_params": 600}, ConfigError, "at least the host's own 682, got 600; raise it or leave it out"),
        ({"temper": "calm"}, ConfigError, "got 'calm'"),
    ],
)
def test_what_cannot_run_leaves_no_directory(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        execute(replace(SHORT, run_dir=tmp_path / "run", **changes), unseen)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'cuda' needs a GPU that PyTorch can see, got none"):
        execute(replace(SHORT, run_dir=tmp_path / "run", device="cuda"), unseen)


@pytest.mark.component
def test_run_directories_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [claim_directory(RunOptions()) for _ in range(2)] == [Path("runs/digits-01"), Path("runs/digits-02")]
    assert claim_directory(RunOptions(preset="vision")) == Path("runs/vision-01")


@pytest.mark.component
def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    for taken in (tmp_path, file):
        with pytest.raises(ConfigError, match=r"must be new or empty, got .*; choose another --run-dir"):
            claim_directory(RunOptions(run_dir=taken))
    with pytest.raises(ConfigError, match=r"cannot be made .*; choose another"):
        claim_directory(RunOptions(run_dir=file / "below"))
    assert file.read_text(encoding="utf-8") == "mine"
    assert claim_directory(RunOptions(run_dir=tmp_path / "a" / "b")).is_dir()


@pytest.mark.component
def test_runs_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"'runs/digits-01' cannot be made .*; use --run-dir"):
        claim_directory(RunOptions())


@pytest.mark.e2e
def test_a_whole_vision_job(tmp_path: Path, image_file: Path) -> None:
    options = RunOptions(
        preset="vision", steps=24, seeds=1, lr=(0.05,), data=image_file, run_dir=tmp_path / "run", device="cpu"
    )
    shown: list[AnyEvent] = []
    summary = execute(options, shown.append)
    assert set(summary["arms"]) == set(ARMS)
    assert all(0 <= arm["score"] <= 1 and arm["loss"] > 0 for arm in summary["arms"].values())
    assert summary["arms"]["static_small"]["params"] < 100_000 and summary["stopped_because"]
    _, grown, structure = load_grown(tmp_path / "run")
    assert structure["preset"] == "vision"
    assert sum(p.numel() for p in grown.parameters()) == structure["params"]
    assert grown(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
