"""A run on a message bus: its events go out, its trainings are heard and can be commanded.

A run has a name on the bus that no other run has; it is kept in the run directory, so a resumed run has it again.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import ConfigError
from esper.oona.link import Link
from esper.oona.remote import RemoteController
from esper.runs.artifacts import write_json
from esper.runs.cell_store import CellStore, folder_name
from esper.runs.options import RunOptions

if TYPE_CHECKING:
    from esper.grower import Grower
    from esper.runs.arms import Attach, Cell

FOLDER = "bus"
"""Below the run directory: what has been sent, telemetry that waits, the run's name."""
_NAME = "name.json"
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
def events_followed(options: RunOptions, run_dir: Path, on_note: Callable[[str], None]) -> Generator[None]:
    """While this lasts the run's events go out; nothing where there is no bus.

    Raises
    ------
    ConfigError
        The bus's address or keys cannot be used.
    """
    if options.bus is None:
        yield
        return
    run = name_on_bus(run_dir)
    link = Link(options.bus, run=run, folder=run_dir / FOLDER, allow_unsigned=options.unsigned_commands)
    link.follow(run_dir / "events.jsonl")
    taken = "takes commands" if link.takes_commands else "takes no commands: set ESPER_BUS_KEY"
    on_note(f"bus {link.address} as {run} ({taken})")
    try:
        yield
    finally:
        if not link.stop() or link.bytes_behind:
            on_note(f"the bus has not had all of the events: {link.bytes_behind:,} bytes are left in the run's log")


def attaching(options: RunOptions, run_dir: Path) -> Attach | None:
    """What links each growing training of a run to the bus; ``None`` without one."""
    if options.bus is None:
        return None
    url = options.bus

    def attach(cell: Cell, grower: Grower, store: CellStore | None) -> contextlib.AbstractContextManager[Any]:
        if cell.arm != "grown" or store is None:  # a control that somebody steers is none
            return contextlib.nullcontext()
        job = folder_name(cell)
        link = Link(
            url, run=name_on_bus(run_dir), job=job, folder=run_dir / FOLDER / job,
            allow_unsigned=options.unsigned_commands,
        )  # fmt: skip
        if isinstance(grower.controller, RemoteController):
            grower.controller.line = link
        return link.serving(grower, store.commands_path, checkpoints=True)

    return attach
