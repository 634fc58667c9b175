"""``esper trials`` and ``esper soak``: from words to an exit status, with the jobs themselves faked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.runs.soak.samples import sample
from tests.runs.trials.made import culled, fault, gain, kept, trial

from esper.cli import main
from esper.errors import ConfigError
from esper.runs.soak import SoakOptions
from esper.runs.soak.summary import summarise as summarise_soak
from esper.runs.trials import TrialOptions
from esper.runs.trials.records import AnyRecord
from esper.runs.trials.summary import summarise

pytestmark = pytest.mark.component

Install = Callable[..., list[Any]]


@pytest.fixture
def fake_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Replace the trials by records; returns the options they were asked with."""
    monkeypatch.chdir(tmp_path)

    def install(*records: AnyRecord, error: BaseException | None = None) -> list[TrialOptions]:
        asked: list[TrialOptions] = []

        def execute(options: TrialOptions, on_record: Callable[..., None]) -> dict[str, Any]:
            asked.append(options)
            on_record(0, len(records), None)
            if error is not None:
                raise error
            for done, record in enumerate(records, start=1):
                on_record(done, len(records), record)
            return summarise(options.kind, list(records))

        monkeypatch.setattr("esper.runs.trials.job.execute", execute)
        return asked

    return install


def test_rates_on_standard_output_progress_on_standard_error(
    fake_trials: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = fake_trials(trial(0, kept(0.1, 0.2), culled(), headroom=gain(0.5), effect=gain(0.4)))
    assert main(["trials", "--n", "1", "--seed", "7", "--json", "trials.json"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "1 trials, starting" and err.splitlines()[1].startswith("1 of 1 trials")
    assert "permanent cohorts that improve the audit loss, on against off" in out
    assert "open       permanent cohorts that improve the audit loss: above 95.0%, got 100.0% (5.0% to 100.0%)" in out
    assert out.splitlines()[-1] == "kept in    runs/trials"
    assert asked == [TrialOptions(num=1, seed=7)]
    result = json.loads(Path("trials.json").read_text(encoding="utf-8"))
    assert result["command"] == "esper trials --n 1 --seed 7" and result["kind"] == "grown"
    assert result["rates"]["cohorts that became permanent"]["share"] == 0.5


def test_a_missed_bar_fails_the_command(fake_trials: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_trials(trial(0, kept(-0.2)))
    assert main(["trials"]) == 1
    assert "missed     permanent cohorts harmful beyond 1%: at most 0.0%, got 100.0%" in capsys.readouterr().out


def test_faults_show_what_broke(fake_trials: Install, capsys: pytest.CaptureFixture[str]) -> None:
    asked = fake_trials(fault(0, "nan_batch", held=False), fault(1, "inf_batch", held=True))
    assert main(["trials", "--faults", "nan_batch", "inf_batch"]) == 1
    out = capsys.readouterr().out
    assert "nan_batch: it broke" in out and "inf_batch  restored       1     1" in out
    assert asked[0].faults == ("nan_batch", "inf_batch") and asked[0].kind == "faults"


def test_null_trials_and_peers(fake_trials: Install, capsys: pytest.CaptureFixture[str]) -> None:
    fake_trials(trial(0, culled(is_null=True), kind="null: a constant"))
    assert main(["trials", "--null"]) == 0
    assert "null: a constant  0 of 1" in capsys.readouterr().out
    fake_trials(trial(0, kept(0.1, -0.2), kind="gromo"))
    assert main(["trials", "--peer", "gromo"]) == 0
    out = capsys.readouterr().out
    assert "growths harmful beyond 1% against their twin" in out and "missed" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "0"], "n must be at least 1, got 0"),
        (["--null", "--faults", "all"], "trials are of one kind"),
        (["--peer", "grower"], "peer must be one of gromo, gromo-gradmax"),
        (["--jobs", "x"], "must be a whole number"),
    ],
)
def test_mistakes_are_usage_errors(
    fake_trials: Install, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    fake_trials()
    assert main(["trials", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ModuleNotFoundError("no", name="gromo"), 1, "this needs gromo; say: pip install 'esper-morph[bench]'"),
        (KeyboardInterrupt(), 130, "esper trials: interrupted"),
        (ConfigError("use --fresh"), 2, "use --fresh"),
    ],
)
def test_how_it_fails(
    fake_trials: Install, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    fake_trials(error=error)
    assert main(["trials"]) == status
    assert message in capsys.readouterr().err


def test_an_unknown_fault_is_named_with_near_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trials", "--faults", "nan_bach"]) == 2
    assert "did you mean 'nan_batch'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was to be written"


# ----------------------------------------------------------------------------------------------------------------------
# soak


def test_soak_says_what_it_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    enough = {"GRAFTING > ROLLED_BACK": 2000, "DORMANT > GERMINATED": 100_000}
    samples = [
        sample(1, hours / 10, transitions=enough, faults={"nan_batch": 3}, in_use_mb=50 + hours / 10)
        for hours in range(40)
    ]
    asked: list[SoakOptions] = []

    def execute(options: SoakOptions, on_sample: Callable[..., None]) -> dict[str, Any]:
        asked.append(options)
        for each in samples:
            on_sample(each)
        return summarise_soak(samples, "cpu")

    monkeypatch.setattr("esper.runs.soak.job.execute", execute)
    assert main(["soak", "--hours", "2", "--no-faults"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "6 min: 10 steps, 102,000 transitions, 100.0 MB"
    assert "memory     +0.00 MB an hour (+0.00 to +0.00)" in out and "faults     nan_batch 3" in out
    assert "in use     of it +1.00 MB an hour (+1.00 to +1.00) over" in out
    assert "met        rollbacks, at least 1,000" in out and "missed" not in out
    assert asked == [SoakOptions(hours=2.0, faults=False)]
    samples[:] = samples[:2]
    assert main(["soak", "--steps", "5", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["memory"]["mb_per_hour"] is None
    assert main(["soak", "--steps", "5"]) == 1
    assert "too few samples for a slope" in capsys.readouterr().out


def test_soak_needs_an_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak"]) == 2
    assert "a soak needs an end" in capsys.readouterr().err
