"""What every command is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from esper.errors import EsperError


class UsageError(EsperError, ValueError):
    """The command line asks for something that cannot be; exit status 2."""


@dataclass
class Context:
    """What is known of a command while it runs, for the message if it is cut short."""

    run_dir: Path | None = None
    """Where the command writes, once it does."""
    goes_on_by: str | None = None
    """What goes on from there; ``None``: esper report shows what a run has written."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command found out: ``result`` for ``--json``, ``lines`` for people; ``ok`` decides the exit status."""

    result: dict[str, Any]
    lines: list[str] = field(default_factory=list[str])
    ok: bool = True


class Command(Protocol):
    """A frozen dataclass whose fields are the command's options."""

    @property
    def json(self) -> str | None:
        """Where the result goes as JSON; ``-`` is standard output."""
        ...

    def execute(self, context: Context) -> Outcome:
        """Do it. An :class:`EsperError` says what went wrong."""
        ...


def unknown_name(family: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of ``known``: near ones first, then all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return UsageError(f"no {family} is called {name!r}; {hint}known: {', '.join(names)}")


def existing_run(run_dir: Path) -> Path:
    """``run_dir`` if it holds a run, else an error with near names."""
    if (run_dir / "events.jsonl").is_file():
        return run_dir
    parent = run_dir.parent
    siblings = sorted(str(path.parent) for path in parent.glob("*/events.jsonl")) if parent.is_dir() else []
    if not siblings:
        siblings = sorted(str(path.parent) for path in Path().glob("runs/*/events.jsonl"))
    near = difflib.get_close_matches(str(run_dir), siblings, n=3, cutoff=0.5) or siblings[-3:]
    remedy = f"there is {', '.join(near)}" if near else "make one with: esper run"
    what = "a folder without events.jsonl" if run_dir.is_dir() else "a file" if run_dir.exists() else "no such folder"
    raise EsperError(f"a run directory holds events.jsonl, got {str(run_dir)!r} ({what}); {remedy}")
