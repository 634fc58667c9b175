"""A recorded run to read back, and the shell command as a process of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.recorded import write_run


@pytest.fixture
def recorded_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``runs/digits-01`` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return write_run(Path("runs/digits-01"))


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's variables without coverage, test and terminal settings."""
    drop = ("COV", "PYTEST", "PYTHON", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "ESPER", "LC_", "RANK")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    source = str(Path(__file__).parents[2] / "src")
    return {**kept, "PYTHONPATH": source, "LANG": "C.UTF-8", "TERM": "xterm", **extra}


Esper = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def esper(tmp_path: Path) -> Esper:
    """``esper(*words, **environment)`` through pipes, in an empty folder."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "esper.cli", *words], cwd=tmp_path, env=clean_environment(**environment),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture
def esper_on_terminal(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """The same on a pseudo-terminal; returns the exit status and everything that was shown."""

    def run(*words: str, **environment: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "esper.cli", *words], cwd=tmp_path, env=clean_environment(**environment),
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # Linux says EIO when the other end is closed
                break
            if not data:
                break
            shown += data
        os.close(ours)
        return process.wait(timeout=120), shown.decode().replace("\r\n", "\n")

    return run
