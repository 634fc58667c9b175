"""``esper controller`` from words to lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.cli import main
from esper.cli.controller import WORDS

pytestmark = pytest.mark.component

TINY = ["--side-by-side", "4", "--steps", "6", "--updates", "2", "--episodes", "8"]


def test_trains_evaluates_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["controller", "train", "--run-dir", str(run), *TINY]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("update 2: 8 episodes, return ")
    lines = out.splitlines()
    assert lines[0] == "trained    2 updates, 8 episodes"
    assert lines[1].endswith("the best possible is 0.9000")
    assert lines[-1] == (
        f"next       esper controller compare --environment planted --players {run}/policy heuristic never random"
    )
    assert "mean return; last: " in (run / "curves.html").read_text(encoding="utf-8")
    assert main(["controller", "train", "--run-dir", str(run), *TINY, "--workers", "2"]) == 2
    assert "workers: 1 there, 2 here" in capsys.readouterr().err
    assert main(["controller", "train", "--run-dir", str(run), *TINY, "--workers", "2", "--fresh"]) == 0
    capsys.readouterr()
    few = ["--side-by-side", "4", "--episodes", "4"]
    assert main(["controller", "compare", *few, "--players", f"{run}/policy", "never", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["players"]) == {f"{run}/policy", "never"} and result["episodes"] == 4
    assert main(["controller", "evaluate", *few, "--players", "never"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "player  return  95%",
        "never   0.0000  0.0000 to 0.0000",
        "episodes   4 each, the same for all",
        "best       0.9000 is the most there is",
    ]
    assert main(["controller", "evaluate", *few, "--players", str(run)]) == 2
    assert f"got '{run}' without a card.json in it; name '{run}/policy'" in capsys.readouterr().err
    assert main(["controller", "compare", *few]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:4]]
    assert rows == ["player", "never", "random", "heuristic"]


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        (["serv"], 2, "no word is called 'serv'"),
        ([], 2, "missing: WORD"),
        (["evaluate"], 2, "evaluate takes one player, got 3"),
        (["train", "--updates", "0"], 2, "updates must be at least 1, got 0"),
        (["train", "--workers", "64"], 2, "at least one of the 32 episodes side by side, got 64 workers"),
        (["train", "--size", "huge"], 2, "no policy size is called 'huge'"),
        (["compare", "--environment", "moon"], 2, "no environment is called 'moon'"),
        (["compare", "--players", "nobody"], 2, "no controller is called 'nobody'"),
        (["compare", "--players", "here/nobody"], 2, "got 'here/nobody' without a card.json in it; esper controller"),
        (["train", "--side-by-side", "0"], 2, "--side-by-side must be at least 1, got 0"),
        (["compare", "--episodes", "0"], 2, "--episodes must be at least 1, got 0"),
        (["train", "--environment", "greenhouse/teacher"], 2, "nothing is trained on tasks of evaluation"),
    ],
)
def test_mistakes(
    words: list[str], status: int, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["controller", *words]) == status
    assert complaint in capsys.readouterr().err


def test_an_interrupted_training_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.learning.job.train", interrupted)
    assert main(["controller", "train", "--run-dir", str(tmp_path / "run"), *TINY]) == 130
    assert capsys.readouterr().err == (
        f"esper controller: interrupted; what was done stays in {tmp_path / 'run'}: the same command goes on from its "
        "last checkpoint\n"
    )


def test_help_names_every_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["controller", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in WORDS)
