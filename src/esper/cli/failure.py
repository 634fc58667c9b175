"""How a command that did not work ends: one line for people, an exit status for programs, a traceback on file."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.cli.command import Context, UsageError
from esper.errors import ConfigError, EsperError, UnknownNameError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EXTRAS = {
    "sklearn": ("scikit-learn", "demo"),
    "triton": ("triton", "triton"),
    "redis": ("redis", "redis"),
    "confluent_kafka": ("confluent-kafka", "kafka"),
    "fsspec": ("fsspec", "claims"),
    "ribs": ("ribs", "karn"),
    "psycopg": ("psycopg", "postgres"),
    "gymnasium": ("gymnasium", "rl"),
    "ray": ("ray", "ray"),
    "gromo": ("gromo", "bench"),
}
"""Module to (distribution, extra of esper-morph that brings it)."""


@dataclass(frozen=True)
class Failure:
    """What is said and returned; ``more`` are further lines."""

    message: str
    status: int
    more: Sequence[str] = ()


def describe(error: BaseException, context: Context) -> Failure:
    """What to say about ``error``. Only what nobody foresaw leaves a traceback, in a file unless ESPER_DEBUG=1."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(f"interrupted{_what_stays(context)}", EXIT_INTERRUPTED)
    if isinstance(error, EsperError):
        is_usage = isinstance(error, UsageError | ConfigError | UnknownNameError)
        return Failure(str(error), EXIT_USAGE if is_usage else EXIT_FAILED, _traceback_lines(error))
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        package, extra = EXTRAS[error.name]
        return Failure(f"this needs {package}; say: pip install 'esper-morph[{extra}]'", EXIT_FAILED)
    if isinstance(error, OSError) and error.filename is not None:
        reason = (error.strerror or type(error).__name__).lower()
        text = f"{reason}: {error.filename}; check that the path exists and that you may use it"
        return Failure(text, EXIT_FAILED, _traceback_lines(error))
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        text = "out of memory; try --size cpu or --device cpu, or free the device" + _what_stays(context)
        return Failure(text, EXIT_FAILED, _traceback_lines(error))
    return _unforeseen(error, context)


def is_debugging() -> bool:
    """Whether the user wants tracebacks on the screen."""
    return os.environ.get("ESPER_DEBUG", "") not in ("", "0")


def _unforeseen(error: BaseException, context: Context) -> Failure:
    what = f"unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
    if is_debugging():
        return Failure(what, EXIT_FAILED, _traceback_lines(error))
    path = _write_traceback(error, context.run_dir)
    return Failure(f"{what}; this is a bug in Esper or in the code it was given; traceback: {path}", EXIT_FAILED)


def _write_traceback(error: BaseException, folder: Path | None) -> Path:
    text = "".join(traceback.format_exception(error))
    if folder is not None and os.access(folder, os.W_OK):
        path = folder / "error.log"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
        return path
    fd, name = tempfile.mkstemp(prefix="esper-error-", suffix=".log")
    with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
    return Path(name)


def _traceback_lines(error: BaseException) -> list[str]:
    return "".join(traceback.format_exception(error)).splitlines() if is_debugging() else []


def _what_stays(context: Context) -> str:
    if context.run_dir is None:
        return ""
    return f"; what was done stays in {context.run_dir}: {context.goes_on_by or f'esper report {context.run_dir}'}"
