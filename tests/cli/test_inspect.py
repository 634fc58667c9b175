"""``esper inspect``: what is there, whether it holds, and an exit status that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.safety.stored import save_some
from tests.safety.test_saving import grown_run

from esper.cli import main
from esper.observe.event_log import EventLog
from esper.protocol import HeldOut
from esper.safety.command_log import CommandLog
from esper.safety.disk import LocalDisk
from esper.safety.manifest import SCHEMA_VERSION, manifest_name, tensors_name

pytestmark = pytest.mark.integration


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, Any]]:
    status = main(["inspect", str(path), "--json", str(path.parent / "result.json")])
    out = capsys.readouterr()
    return status, out.out + out.err, json.loads((path.parent / "result.json").read_text(encoding="utf-8"))


def test_a_folder_of_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    save_some(LocalDisk(), 2, [], folder=folder)
    status, told, result = inspect(folder, capsys)
    assert status == 0 and result["ok"] and "all intact" in told
    newest = result["checkpoints"][str(folder)][0]
    assert (newest["number"], newest["step"], newest["kind"], newest["schema"]) == (2, 2, "test", SCHEMA_VERSION)
    paths = list(folder.glob("checkpoint-00000002*"))
    assert newest["num_bytes"] == sum(path.stat().st_size for path in paths) and newest["files"] == len(paths)
    assert set(newest["written_by"]) == {"esper", "torch", "python"} and newest["growth"] is None


@pytest.mark.parametrize("name", [manifest_name(2), tensors_name(2, 0)])
def test_damage_is_shown_and_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    save_some(LocalDisk(), 2, [], folder=folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-9] + bytes(9))
    status, told, result = inspect(folder, capsys)
    assert status == 1 and not result["ok"] and f"1 damaged: {folder} 2" in told
    problems = [fact["problem"] for fact in result["checkpoints"][str(folder)]]
    assert problems[0] and problems[1] is None


def test_what_has_grown_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = grown_run()
    run.grower.save(tmp_path / "c")
    status, told, result = inspect(tmp_path / "c", capsys)
    growth = result["checkpoints"][str(tmp_path / "c")][0]["growth"]
    assert status == 0 and growth == {"sites": 2, "annexes": 0, "seeds": 1, "cohorts": {"1": "GRAFTING"}}
    assert "2 sites, 0 grown for good, 1 seeds alive, cohorts: 1 GRAFTING" in told


def test_a_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    save_some(LocalDisk(), 1, [], folder=run_dir / "progress" / "grown-seed0-lr0.01")
    (run_dir / "progress" / "empty").mkdir()
    with EventLog(run_dir / "events.jsonl") as log:
        log.append(HeldOut(step=1, loss=1.0, params=1, flops=1.0))
    with CommandLog(run_dir / "commands.jsonl") as commands:
        commands.append("a", step=1, payload=None)
    save_file({"a": torch.zeros(2)}, run_dir / "model.safetensors")
    (run_dir / "config.json").write_text("{}", encoding="utf-8")
    status, told, result = inspect(run_dir, capsys)
    assert status == 0 and len(result["checkpoints"]) == 2 and "no checkpoint yet" in told
    assert "1 events" in told and "1 commands" in told and "1 tensors" in told
    for name in ("events.jsonl", "commands.jsonl", "model.safetensors", "config.json"):
        good = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(b"[\n" + good)
        status, told, result = inspect(run_dir, capsys)
        assert status == 1 and f"1 damaged: {name}" in told
        (run_dir / name).write_bytes(good)


def test_what_is_neither_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, said in (("file", "a file"), ("none", "no such folder"), ("empty", "with neither")):
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert said in capsys.readouterr().err
