"""report, sites, export and doctor on recorded or faked material."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from tests.cli.recorded import SITE, write_run

from esper.cli import main
from esper.cli.command import Context, UsageError
from esper.cli.doctor import Doctor
from esper.cli.sites import near_patterns, select
from esper.errors import EsperError
from esper.protocol import SiteInfo, SiteKind, Skipped

pytestmark = pytest.mark.component

# ----------------------------------------------------------------------------------------------------------------------
# report


def test_report_writes_the_page_and_sums_up(recorded_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recorded_run / "structure.json").write_text("{}", encoding="utf-8")  # there is a model to export
    assert main(["report", str(recorded_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run        runs/digits-01 | preset digits | finished"
    assert lines[1] == "cohorts    1 germinated: 1 kept"
    assert lines[2].startswith("done       0.500 -> 0.400")
    assert lines[3].split() == ["arm", "accuracy", "+/-", "loss", "params", "FLOPs", "time"]
    assert lines[4].split() == ["grown", "0.900", "-", "0.100", "1.2k", "2M", "3", "s"]
    assert lines[-2:] == [
        "report     runs/digits-01/report.html",
        "next       esper export runs/digits-01 -o model/",
    ]
    assert (recorded_run / "report.html").read_text(encoding="utf-8").startswith("<!")


def test_report_of_a_killed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "digits-02", finish=False)
    with (run / "events.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"v":1,"seq":9,"ti')
    assert main(["report", str(run), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finished"] is False and set(result["arms"]) == {"grown", "static_small"}
    assert main(["report", str(run)]) == 0
    assert "not finished, last event of" in capsys.readouterr().out


def test_report_of_a_run_killed_at_its_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "digits-02", finish=False)
    first, *_ = (run / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "events.jsonl").write_text(first, encoding="utf-8")
    assert main(["report", str(run)]) == 0
    assert "so far     nothing measured yet" in capsys.readouterr().out.splitlines()


def test_report_as_json_has_the_runs_summary(recorded_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(recorded_run), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finished"] is True and result["stopped_because"] == "gain per cost"
    assert result["report"] == "runs/digits-01/report.html"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/digits-1", "got 'runs/digits-1' (no such folder); there is runs/digits-01"),
        ("digits-01", "got 'digits-01' (no such folder); there is runs/digits-01"),
        ("runs", "got 'runs' (a folder without events.jsonl); there is runs/digits-01"),
        ("runs/digits-01/events.jsonl", "(a file); there is runs/digits-01"),
    ],
)
@pytest.mark.parametrize("command", ["report", "export"])
def test_directory_without_a_run_names_near_ones(
    command: str, name: str, message: str, recorded_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, name, *(["-o", "model"] if command == "export" else [])]
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert not Path("model").exists()


def test_nothing_run_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/digits-01"]) == 1
    assert "make one with: esper run" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# export


def test_export_shows_what_was_checked(
    recorded_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_export(run_dir: Path, out: Path) -> dict[str, Any]:
        return {"path": str(out), "tensors": 6, "params": 1202, "loss_difference": 9.1e-8}

    monkeypatch.setattr("esper.runs.write_export", write_export, raising=False)
    assert main(["export", str(recorded_run), "-o", "my model"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "exported   my model",
        "checked    read back | tensors 6 | params 1,202 | loss difference 9.1e-08",
        "next       python 'my model/rebuild.py'",
    ]
    assert main(["export", str(recorded_run), "-o", "m", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 6


# ----------------------------------------------------------------------------------------------------------------------
# sites

LAYER = SiteInfo(
    name="norm", kind=SiteKind.NORM_LAYER, in_features=8, out_features=8, hidden_features=0, num_chunks=8, weights=16
)
SKIPPED = Skipped(name="head", reason="tied to embed")


@pytest.fixture
def _fake_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    def preset_sites(
        preset: str, size: str, data: Path | None, *, layers: bool
    ) -> tuple[tuple[SiteInfo, ...], tuple[Skipped, ...]]:
        if layers:
            return (LAYER,), ()
        return (SITE,), (SKIPPED if data is None else Skipped(name="head", reason=str(data)),)

    monkeypatch.setattr("esper.runs.preset_sites", preset_sites, raising=False)


@pytest.mark.usefixtures("_fake_sites")
def test_sites_lists_what_grows_and_why_the_rest_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "site  kind         in  hidden  out  chunks  weights",
        "0-2   linear span  64       8   10      10      610",
        "1 site | skipped 1",
        "  head: tied to embed",
    ]
    assert main(["sites", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sites"][0]["kind"] == "linear_span"
    assert result["skipped"] == [{"name": "head", "reason": "tied to embed"}]


@pytest.mark.usefixtures("_fake_sites")
def test_sites_lists_layers_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "--layers"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["norm", "norm", "layer", "8", "-", "8", "8", "16"]


@pytest.mark.usefixtures("_fake_sites")
def test_sites_of_the_users_own_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "vision", "--data", "images.npz"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  head: images.npz"


@pytest.mark.usefixtures("_fake_sites")
def test_sites_by_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites", "--match", "he*"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "0 sites | skipped 1"
    assert main(["sites", "--match", "haed"]) == 2
    assert "'haed' matches none of 2; near: 'head' (1), 'head*' (1); list all" in capsys.readouterr().err


def test_near_patterns_keep_the_pattern_general() -> None:
    names = [f"blocks.{i}.mlp" for i in range(12)] + [f"blocks.{i}.attention.out" for i in range(12)]
    assert near_patterns("blocks.*.mpl", names)[0] == "'blocks.*.mlp*' (12)"
    assert len(near_patterns("zzz", names)) == 3


def test_select_without_patterns_keeps_all() -> None:
    assert select([SITE], [SKIPPED], []) == ((SITE,), (SKIPPED,))
    assert select([SITE], [SKIPPED], ["0-*"]) == ((SITE,), ())
    with pytest.raises(UsageError):
        select([SITE], [SKIPPED], ["0-*", "nothing"])


# ----------------------------------------------------------------------------------------------------------------------
# doctor


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, tuple[str, str]]]:
    status = main(["doctor", "--json", "-", *words])
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is (status == 0)
    return status, {finding["name"]: (finding["state"], finding["detail"]) for finding in result["findings"]}


def test_doctor_finds_this_installation_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, findings = doctor(capsys)
    assert status == 0
    assert {"esper", "python", "torch", "threads", "device", "numpy", "import esper", "runs"} <= set(findings)
    assert findings["runs"] == ("ok", "runs can be written")
    assert not Path("runs").exists()
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "result     esper can run here"


def test_doctor_names_what_brings_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("scikit-learn", "safetensors"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, findings = doctor(capsys)
    assert findings["[demo] scikit-learn"] == ("missing", "not installed; pip install 'esper-morph[demo]' brings it")
    assert findings["safetensors"] == ("broken", "not installed; say: pip install safetensors")
    assert status == 1
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "result     1 broken: safetensors"


def test_doctor_without_torch_still_looks_at_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch":
            raise ImportError("libtorch.so: cannot open shared object file")
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", refuse)
        outcome = Doctor().execute(Context())
    findings = {finding["name"]: (finding["state"], finding["detail"]) for finding in outcome.result["findings"]}
    assert not outcome.ok and findings["torch"][0] == "broken"
    assert "libtorch.so" in findings["torch"][1] and "pip install 'torch>=2.6'" in findings["torch"][1]
    assert findings["import esper"][0] == "ok"


def test_doctor_refuses_an_old_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.__version__", "2.5.1+cpu")
    status, findings = doctor(capsys)
    assert status == 1 and findings["torch"] == ("broken", "2.5.1+cpu; pip install 'torch>=2.6'")


def test_doctor_tries_the_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", broken)
    status, findings = doctor(capsys)
    assert status == 1 and "does not compute (no kernel image)" in findings["device"][1]

    class Properties:
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(8))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    status, findings = doctor(capsys)
    assert status == 0 and findings["device"] == ("ok", "cuda: H100, 80 GiB")


def test_doctor_reports_a_package_in_the_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("esper.shadowing.shadowing_problem", lambda: "something is in the way; remove it")
    status, findings = doctor(capsys)
    assert status == 1 and findings["import esper"] == ("broken", "something is in the way; remove it")


def test_doctor_reports_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    status, findings = doctor(capsys, "--run-dir", str(file / "runs"))
    assert status == 1 and findings["runs"][0] == "broken" and "cannot be written" in findings["runs"][1]


def test_errors_of_the_log_reach_the_user(recorded_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = recorded_run / "events.jsonl"
    log.write_text("nonsense\n" + log.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["report", str(recorded_run)]) == 1
    err = capsys.readouterr().err
    assert "line 1" in err and issubclass(UsageError, EsperError)
