"""The command as a process of its own: start-up, pipes, terminals, signals."""

from __future__ import annotations

import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Esper, clean_environment
from tests.cli.recorded import write_run

pytestmark = pytest.mark.e2e

OnTerminal = Callable[..., tuple[int, str]]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
QUICK = [["--help"], ["--version"], ["run", "--help"], ["sites", "--help"], ["--print-completion", "bash"]]
STARTUP_SECONDS = 0.3


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_help_and_completion_are_quick_and_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from esper.cli import main; status = main(sys.argv[1:]); sys.stdout.flush()\n"
        "heavy = {'torch', 'numpy', 'asyncio', 'shtab', 'socket'} & set(sys.modules)\n"
        "heavy -= {'shtab', 'socket'} if '--print-completion' in sys.argv else set()\n"  # shtab asks for its version
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    seconds: list[float] = []
    for _ in range(3):  # the least of three: other processes share these cores
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *words], env=clean_environment(), cwd=tmp_path, capture_output=True, text=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(seconds) <= STARTUP_SECONDS


COMPLETIONS = {
    "r": {"run", "report"},
    "--print-completion ": {"bash", "zsh", "tcsh", "fish"},
    "run --bud": {"--budget-params"},
    "run di": {"digits"},
    "sites ": {"digits", "code-lm", "vision"},
    "run digits --size ": {"auto", "cpu", "gpu"},
    "run --temper b": {"balanced"},
    "run vision --data im": {"images.npz"},
    "report ru": {"runs"},
    "export runs -o ru": {"runs"},
}
COMPLETE_IN = {
    "bash": """source ./script; f=$(complete -p esper | sed 's/.*-F \\([^ ]*\\).*/\\1/')
complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $f; echo ${COMPREPLY[@]}; }
""",
    "fish": "source script\n",
}


def completion_line(shell: str, words: str) -> str:
    if shell == "fish":
        return f"string join -- ' ' (complete -C 'esper {words}' | string split -f1 \\t)\n"
    empty = "''" if words.endswith(" ") else ""
    return f"complete_words esper {words}{empty}\n"


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_completion_works_in_the_shell(shell: str, esper: Esper, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}; install it to check its completion")
    (tmp_path / "script").write_text(esper("--print-completion", shell).stdout, encoding="utf-8")
    (tmp_path / "images.npz").touch()
    (tmp_path / "runs").mkdir()
    code = COMPLETE_IN[shell] + "".join(completion_line(shell, words) for words in COMPLETIONS)
    environment = clean_environment(HOME=str(tmp_path))
    done = subprocess.run([shell, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    offered = [{word.rstrip("/") for word in line.split()} for line in done.stdout.splitlines()]
    assert dict(zip(COMPLETIONS, offered, strict=True)) == COMPLETIONS, done.stderr


@pytest.mark.parametrize(("shell", "command"), [("zsh", "zsh -n script"), ("tcsh", "tcsh -f -c 'source script'")])
def test_completion_is_valid_in_the_shell(shell: str, command: str, esper: Esper, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}; install it to check its completion")
    (tmp_path / "script").write_text(esper("--print-completion", shell).stdout, encoding="utf-8")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "environment",
    [{}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"LC_ALL": "C"}],
    ids=lambda environment: " ".join(environment) or "plain",
)
def test_pipes_get_no_control_characters(environment: dict[str, str], esper: Esper, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "digits-01")
    for words in (["run", "--help"], ["report", "runs/digits-01"], ["report", "runs/digits-1"], ["run", "--stpes"]):
        done = esper(*words, **environment)
        assert not CONTROL.search(done.stdout + done.stderr), words
        assert (done.stdout + done.stderr).isascii()


def test_sixty_columns_are_kept_on_a_terminal(esper_on_terminal: OnTerminal, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "digits-01")
    for words in (["run", "--help"], ["report", "runs/digits-01"], ["run", "nosuch"], ["--help"]):
        _, shown = esper_on_terminal(*words, COLUMNS="60")
        assert max(map(len, shown.splitlines())) <= 60, words
        assert not CONTROL.search(shown)


def test_a_c_locale_terminal_gets_ascii(esper_on_terminal: OnTerminal) -> None:
    status, shown = esper_on_terminal("run", "größe", LC_ALL="C")
    assert status == 2 and shown.isascii() and "gr\\xf6\\xdfe" in shown
    status, shown = esper_on_terminal("run", "größe")
    assert status == 2 and "größe" in shown


def test_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "esper.cli", "run", "--help"], cwd=tmp_path, env=clean_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize(
    "words", [["--lr", "1e-3"], ["--lr", "1e-3", "3e-3", "--jobs", "2"]], ids=["one process", "two jobs"]
)
def test_interrupt_ends_with_one_line_and_130(words: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "esper.cli", "run", "--no-controls", "--steps", "100000", *words],
        cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline().startswith("run runs/digits-01 | report runs/digits-01/report.html")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == ""
    line = "esper run: interrupted; what was done stays in runs/digits-01: esper report runs/digits-01"
    assert err.splitlines()[-1] == line and "Traceback" not in err
    assert (tmp_path / "runs/digits-01/report.html").exists()
