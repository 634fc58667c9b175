"""A whole short job from the shell: run, report, export, and the export without Esper."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Esper, clean_environment

pytestmark = pytest.mark.e2e

pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn; pip install 'esper-morph[demo]'")
SHORT = ["run", "--steps", "60", "--seeds", "1", "--lr", "1e-2"]
ARMS = {"grown", "static_small", "static_final", "static_equal_flops", "random_growth"}


def test_run_then_report_then_export_then_rebuild_without_esper(esper: Esper, tmp_path: Path) -> None:
    ran = esper(*SHORT, "--json", "result.json")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.startswith("run runs/digits-01 | report runs/digits-01/report.html (updates while it runs)\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", ran.stdout + ran.stderr)
    assert ran.stdout.startswith("done ") and "controls" not in ran.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert set(result["arms"]) == ARMS
    assert all({"score", "loss", "params", "flops", "seconds"} <= set(arm) for arm in result["arms"].values())
    assert {"germinated", "accepted", "culled", "cancelled", "rolled_back"} <= set(result["cohorts"])
    assert result["stopped_because"]
    files = {path.name for path in (tmp_path / "runs/digits-01").iterdir()}
    assert {"events.jsonl", "config.json", "report.html", "model.safetensors", "structure.json"} <= files

    reported = esper("report", "runs/digits-01")
    assert reported.returncode == 0 and "| finished" in reported.stdout

    exported = esper("export", "runs/digits-01", "-o", "model")
    assert exported.returncode == 0, exported.stderr
    assert "loss difference " in exported.stdout and "output difference " in exported.stdout
    again = esper("export", "runs/digits-01", "-o", "model")
    assert again.returncode == 1 and "new or empty" in again.stderr

    environment = {key: value for key, value in clean_environment().items() if key != "PYTHONPATH"}
    code = (
        "import sys, torch; sys.modules['esper'] = None; sys.path.insert(0, 'model'); import rebuild; "
        "print(tuple(rebuild.load('model')(torch.zeros(3, 64)).shape))"
    )
    rebuilt = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert rebuilt.stdout.strip() == "(3, 10)", rebuilt.stderr


def test_training_that_diverges_says_so_and_what_to_do(esper: Esper, tmp_path: Path) -> None:
    short = ["run", "--no-controls", "--steps", "20", "--seeds", "1"]
    for rates, told in ((["1e30"], "1e+30"), (["1e25", "1e30"], "1e+25, 1e+30")):
        done = esper(*short, "--lr", *rates, OMP_NUM_THREADS="1")
        message = done.stderr.splitlines()[-1]
        assert message == (
            "esper run: training diverged: the held-out loss of grown, seed 0, must stay finite, got nan at learning "
            f"rate {told}; use a smaller one: --lr 0.001"
        )
        assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert (tmp_path / "runs/digits-02/report.html").exists()


def test_a_rate_that_diverges_is_passed_over(esper: Esper) -> None:
    short = ["run", "--no-controls", "--steps", "20", "--seeds", "1", "--jobs", "2"]
    done = esper(*short, "--lr", "1e30", "1e-2", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()
    assert told[1] == "grown: choosing among learning rates 1e+30, 0.01"
    assert told[2].startswith("grown: learning rate 0.01, held-out loss 2.")
    assert "Warning" not in done.stderr  # each worker's warning is an event, shown by the console


def test_run_on_a_terminal_shows_colour_and_a_live_line_unless_told_not_to(
    esper_on_terminal: Callable[..., tuple[int, str]],
) -> None:
    short = ["run", "--no-controls", "--steps", "100", "--seeds", "1", "--lr", "1e-2"]
    status, shown = esper_on_terminal(*short, OMP_NUM_THREADS="1")
    assert status == 0 and "\r\x1b[2K" in shown and "done " in shown
    status, shown = esper_on_terminal(*short, OMP_NUM_THREADS="1", NO_COLOR="1", TERM="dumb")
    assert status == 0 and "\x1b" not in shown and "\r" not in shown


def test_sites_of_a_preset(esper: Esper) -> None:
    done = esper("sites", "code-lm", "--match", "blocks.0.*")
    assert done.returncode == 0, done.stderr
    assert "blocks.0.mlp.fc1-fc2" in done.stdout and "blocks.1" not in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; run as another user")
def test_working_directory_that_cannot_be_written(esper: Esper, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = esper(*SHORT)
    tmp_path.chmod(0o700)
    assert done.returncode == 2 and "cannot be made" in done.stderr and "Traceback" not in done.stderr
