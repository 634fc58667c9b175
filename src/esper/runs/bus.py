"""A run on a message bus: its events go out, its trainings are heard and can be commanded.

A run has a name on the bus that no other run has; it is kept in the run directory, so a resumed run has it again.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import ConfigError, EsperError
from esper.oona.desk import Desk
from esper.oona.incoming import nobody
from esper.oona.link import Link, LinkLimits
from esper.oona.remote import RemoteController
from esper.oona.signing import Keyring
from esper.runs.advice import reports_of
from esper.runs.artifacts import write_json
from esper.runs.cell_store import CellStore, folder_name
from esper.runs.options import RunOptions

if TYPE_CHECKING:
    from esper.grower import Grower
    from esper.runs.arms import Attach, Cell

FOLDER = "bus"
"""Below the run directory: what has been sent, telemetry that waits, the run's name."""
_NAME = "name.json"
_LEFT, _LEFT_CURSOR = "answers-left.jsonl", "answers-left.cursor"
"""Answers of a training that has ended while the bus was away."""
_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]")


def name_on_bus(run_dir: Path) -> str:
    """The run's name on the bus; made up once.

    Raises
    ------
    ConfigError
        The file that keeps it is damaged.
    """
    path = run_dir / FOLDER / _NAME
    if path.exists():
        try:
            name = json.loads(path.read_text(encoding="utf-8"))["run"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} must hold the run's name on the bus, got an error ({error}); remove it for a new name"
            ) from error
        return str(name)
    name = f"{_UNUSUAL.sub('-', run_dir.resolve().name)[:80]}-{secrets.token_hex(4)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"run": name})
    return name


@contextmanager
def events_followed(
    options: RunOptions, run_dir: Path, on_note: Callable[[str], None]
) -> Generator[Callable[[], None]]:  # fmt: skip
    """While this lasts the run's events go out, and what earlier trainings could not tell; nothing without a bus.

    What it gives sends Karn's reports of all cohorts in the run's log, each once: call it when no training that grows
    is under way.

    Raises
    ------
    ConfigError
        The bus's address or keys cannot be used.
    """
    if options.bus is None:
        yield _tell_nobody
        return
    run = name_on_bus(run_dir)
    link = Link(options.bus, run=run, folder=run_dir / FOLDER, allow_unsigned=options.unsigned_commands)
    link.follow(run_dir / "events.jsonl")
    left = sorted((run_dir / FOLDER).glob(f"*/{_LEFT}"))
    outboxes = {log: link.follow_answers(log, log.with_name(_LEFT_CURSOR)) for log in left}
    taken = "takes commands" if link.takes_commands else "takes no commands: set ESPER_BUS_KEY"
    on_note(f"bus {link.address} as {run} ({taken})")
    try:
        yield lambda: _report(link, run_dir, on_note)
    finally:
        link.stop()
        for log, sending in outboxes.items():
            if not sending.behind()[0]:
                log.unlink()
                log.with_name(_LEFT_CURSOR).unlink(missing_ok=True)
        waiting = sorted((run_dir / FOLDER).glob(f"*/{_LEFT}"))
        if link.bytes_behind or waiting:
            on_note(
                f"the bus has not had all of it: {link.bytes_behind:,} bytes of events and reports and the answers of "
                f"{len(waiting)} trainings wait in {run_dir / FOLDER}; the same command sends them"
            )


def _report(link: Link, run_dir: Path, on_note: Callable[[str], None]) -> None:
    """What cannot be told is said, and costs the run nothing."""
    try:
        link.report(reports_of(run_dir))
    except EsperError as error:
        on_note(f"Karn's reports have not gone to the bus: {error}; the same command sends them")


def _tell_nobody() -> None:
    """There is no bus."""


def attaching(options: RunOptions, run_dir: Path) -> Attach:
    """What links each growing training of a run to the bus; its keys are read once a process.

    Without a bus a training that has taken orders before still has its log read: they are part of what it is.
    """
    keyring = None if options.bus is None else Keyring.from_environment()

    def attach(cell: Cell, grower: Grower, store: CellStore | None) -> contextlib.AbstractContextManager[Any]:
        if cell.arm != "grown" or store is None:  # a control that somebody steers is none
            return contextlib.nullcontext()
        if options.bus is None:
            return _served(grower, store, run_dir, folder_name(cell))
        return _linked(options, keyring, grower, store, run_dir, folder_name(cell))

    return attach


@contextmanager
def _linked(
    options: RunOptions, keyring: Keyring | None, grower: Grower, store: CellStore, run_dir: Path, job: str,
    limits: LinkLimits | None = None,
) -> Generator[None]:  # fmt: skip
    assert options.bus is not None
    folder = run_dir / FOLDER / job
    link = Link(
        options.bus, run=name_on_bus(run_dir), job=job, folder=folder, allow_unsigned=options.unsigned_commands,
        keyring=keyring, limits=limits, run_logs=[(run_dir / "events.jsonl", run_dir / FOLDER / "events.cursor")],
    )  # fmt: skip
    if isinstance(grower.controller, RemoteController):
        grower.controller.line = link
    with link.serving(grower, store.commands_path, checkpoints=True):
        yield
    if link.bytes_behind:  # the log goes with the training's checkpoints; what was answered has to be told all the same
        if (folder / "answers.cursor").exists():
            shutil.copyfile(folder / "answers.cursor", folder / _LEFT_CURSOR)
        shutil.copyfile(store.commands_path, folder / _LEFT)


@contextmanager
def _served(grower: Grower, store: CellStore, run_dir: Path, job: str) -> Generator[None]:
    """No bus this time: nobody commands, but what was ordered before is applied again."""
    if not store.commands_path.exists():
        yield
        return
    desk = Desk(store.commands_path, run=name_on_bus(run_dir), job=job, verify=nobody)
    grower.serve(desk, checkpoints=True)
    try:
        yield
    finally:
        grower.serve(None)
        desk.close()
