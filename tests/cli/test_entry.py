"""From words to an exit status, with the job itself faked."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.recorded import run_events

from esper.cli import main
from esper.cli.entry import COMMANDS
from esper.errors import ConfigError, DataError, UnknownNameError
from esper.protocol import AnyEvent, RunStarted
from esper.runs import RunOptions
from esper.tamiyo import known_controllers

pytestmark = pytest.mark.component

Fake = Callable[..., None]


@pytest.fixture
def fake_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replace the job by one that plays recorded events, then raises ``error`` if there is one."""
    monkeypatch.chdir(tmp_path)
    for name in ("ESPER_DEBUG", "RANK", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def install(error: BaseException | None = None, *, starts: bool = True) -> None:
        def execute(
            options: RunOptions, on_event: Callable[[AnyEvent], None], on_note: Callable[[str], None], on_past: object
        ) -> dict[str, Any]:
            events = run_events() if starts else []
            if starts:
                Path("runs/digits-01").mkdir(parents=True)
            for event in events[: 3 if error else None]:
                on_event(event)
                if isinstance(event, RunStarted):
                    on_note("grown: learning rate 0.003, held-out loss 0.4")
            if error is not None:
                raise error
            return {"arms": {"grown": {"score": float("nan")}}, "run_dir": "runs/digits-01"}

        monkeypatch.setattr("esper.runs.execute", execute, raising=False)

    return install


def test_result_on_standard_output_progress_on_standard_error(
    fake_job: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_job()
    assert main(["run"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "run runs/digits-01 | report runs/digits-01/report.html (updates while it runs)"
    assert err.splitlines()[1] == "grown: learning rate 0.003, held-out loss 0.4"
    assert "KEPT" in err and "done" not in err
    assert out.splitlines()[0] == "done       0.500 -> 0.400, params +97%; stopped: gain per cost below threshold"
    assert "grown 0.900 | small, no growth 0.800" in out.splitlines()[1]
    assert out.splitlines()[-1] == "next       esper report runs/digits-01 | esper export runs/digits-01 -o model/"
    assert "\x1b" not in out + err and "\r" not in out + err


def test_json_on_standard_output_is_all_that_is_there(fake_job: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake_job()
    assert main(["run", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"]["grown"]["score"] is None


def test_json_in_a_file_comes_beside_the_text(fake_job: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake_job()
    assert main(["run", "--json", "result.json"]) == 0
    assert json.loads(Path("result.json").read_text(encoding="utf-8"))["run_dir"] == "runs/digits-01"
    assert capsys.readouterr().out.startswith("done")


def test_run_directory_that_was_asked_for_is_named(fake_job: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake_job()
    assert main(["run", "--run-dir", "mine"]) == 0
    assert capsys.readouterr().err.startswith("run mine | report mine/report.html")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("lr must be positive, got 0; use 3e-3"), 2, "esper run: lr must be positive, got 0; use 3e-3"),
        (UnknownNameError("no start is called 'x'; known: y"), 2, "esper run: no start is called 'x'; known: y"),
        (DataError("x_train must be uint8"), 1, "esper run: x_train must be uint8"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs"),
            1,
            "esper run: no space left on device: runs; check",
        ),
        (ModuleNotFoundError("no", name="sklearn"), 1, "this needs scikit-learn; say: pip install 'esper-morph[demo]'"),
        (MemoryError(), 1, "esper run: out of memory; try --size cpu"),
        (KeyboardInterrupt(), 130, "esper run: interrupted\n"),
    ],
)
def test_expected_errors_are_one_line_and_an_exit_status(
    error: BaseException, status: int, message: str, fake_job: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_job(error, starts=False)
    assert main(["run", "--json", "result.json"]) == status
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""
    told = json.loads(Path("result.json").read_text(encoding="utf-8"))
    assert told["exit_status"] == status and told["error"] in err


def test_interrupted_run_says_what_stays(fake_job: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake_job(KeyboardInterrupt())
    assert main(["run"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "esper run: interrupted; what was done stays in runs/digits-01: esper report runs/digits-01"


def test_unforeseen_error_leaves_its_traceback_in_the_run_directory(
    fake_job: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_job(ZeroDivisionError("division\nby zero"))
    assert main(["run"]) == 1
    err = capsys.readouterr().err
    assert "esper run: unexpected ZeroDivisionError: division by zero; this is a bug" in err
    assert "traceback: runs/digits-01/error.log" in err and "Traceback" not in err
    assert "ZeroDivisionError" in Path("runs/digits-01/error.log").read_text(encoding="utf-8")


def test_without_a_run_directory_the_traceback_goes_to_a_temporary_file(
    fake_job: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fake_job(ZeroDivisionError(), starts=False)
    assert main(["run"]) == 1
    path = Path(capsys.readouterr().err.strip().rpartition("traceback: ")[2])
    assert path.parent == tmp_path and "in execute" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), DataError("x")])
def test_debugging_shows_the_traceback_at_once(
    error: Exception, fake_job: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_DEBUG", "1")
    fake_job(error, starts=False)
    assert main(["run"]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last):" in err and "in execute" in err and "error.log" not in err


def test_failure_as_json_on_standard_output(fake_job: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake_job(DataError("no data"), starts=False)
    assert main(["run", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "no data", "exit_status": 1}


def test_json_path_that_cannot_be_written_stops_before_the_job(
    fake_job: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_job()
    assert main(["run", "--json", "missing/result.json"]) == 2
    assert "mkdir -p missing" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_json_path_that_goes_away_meanwhile_is_told(
    fake_job: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "result.json")

    fake_job()
    monkeypatch.setattr("esper.cli.json_output.write_file", refuse)
    assert main(["run", "--json", "result.json"]) == 1
    err = capsys.readouterr().err
    assert "--json result.json could not be written" in err and "no space left on device: result.json" in err


def test_control_characters_in_names_do_not_reach_the_screen(
    fake_job: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_job()
    assert main(["run", "\x1b[2Jdigits"]) == 2
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rum"], "esper: no command is called 'rum'; did you mean 'run'? known: run, report, export, inspect, "),
        (["--verson"], "esper: no option is called '--verson'; did you mean '--version'?"),
        (["--print-completion"], "--print-completion takes one shell of bash, zsh, tcsh, fish, got ''"),
        (["--print-completion", "csh"], "--print-completion takes one shell of bash, zsh, tcsh, fish, got 'csh'"),
        (["run", "digts"], "esper run: no preset is called 'digts'; did you mean 'digits'? known: digits, code-lm"),
        (["sites", "vison"], "esper sites: no preset is called 'vison'; did you mean 'vision'?"),
        (["export", "runs/x"], "esper export: missing: -o OUT; see esper export --help"),
        (["report"], "esper report: missing: RUN_DIR; see esper report --help"),
    ],
)
def test_wrong_usage_is_status_2_with_near_names(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and summary in out for name, (_, _, summary) in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().err == out
    assert max(map(len, out.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from esper import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"esper {__version__}\n"


def test_help_of_run_names_every_controller(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    listed = shown.partition("Who decides: ")[2].partition(", or one")[0].split(", ")
    assert sorted(listed) == sorted((*known_controllers(), "remote"))


def test_command_help_and_completion_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    assert "usage: esper run" in capsys.readouterr().out
    assert main(["--print-completion", "bash"]) == 0
    assert "esper" in capsys.readouterr().out


def test_run_started_alone_is_enough_for_the_first_line(
    fake_job: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(
        options: RunOptions, on_event: Callable[[AnyEvent], None], on_note: Callable[[str], None], on_past: object
    ) -> dict[str, Any]:
        on_event(RunStarted(step=0, run="digits-07", preset="digits", config={}, environment={}))
        return {"run_dir": "runs/digits-07"}

    fake_job()
    monkeypatch.setattr("esper.runs.execute", execute, raising=False)
    assert main(["run"]) == 0
    out, err = capsys.readouterr()
    assert "runs/digits-07" in err and out.startswith("so far ")


def test_interrupt_while_a_command_is_still_loading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("esper.cli.entry._dispatch", interrupted)
    assert main(["run"]) == 130
    assert capsys.readouterr().err == "esper run: interrupted\n"
