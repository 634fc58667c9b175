"""Karn in a run: a snapshot when it begins, proposals while it trains, its outcome filed and new designs at its end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from esper.config import Config
from esper.errors import ConfigError, EsperError
from esper.karn import AdvisedController, Architect, Collector, Database, Design, FieldReport, Snapshot, read_snapshot
from esper.karn.experience import rows
from esper.karn.generation import breed
from esper.karn.location import shown
from esper.observe.event_log import read_events
from esper.protocol import AnyEvent, RunStarted
from esper.runs.options import RunOptions
from esper.tamiyo import Controller, make_controller

SNAPSHOT = "karn.json"
"""What Karn knew when the run began, in the run directory: a resumed run proposes from the same."""
NAME_ON_BUS = "name_on_bus"
"""Where a run's first event tells what the run is called on the bus that it began on."""
NUM_BRED = 4
"""New designs after each run."""


@runtime_checkable
class Learner(Protocol):
    """A controller that learns worth by itself and chooses what grows; Karn gives it what is known already."""

    def learn(self, features: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> None: ...


class Filed(NamedTuple):
    """What an import has found."""

    new: int
    total: int


def take_snapshot(options: RunOptions, run_dir: Path) -> Path | None:
    """The snapshot of this run, taken now if it has none; ``None`` without Karn.

    Raises
    ------
    StateError
        The database cannot be read.
    """
    if options.karn is None:
        return None
    path = run_dir / SNAPSHOT
    if not path.exists():
        with Database(options.karn) as database:
            Snapshot.of(database).write(path)
    return path


def advised_controller(config: Config, snapshot: Path, strategy: str | None) -> Controller:
    """The controller that ``config`` names, with Karn's experience: as its own where it learns, else as proposals."""
    inner = make_controller(config.tamiyo.controller, config.tamiyo, seed=config.seed)
    known = read_snapshot(snapshot)
    if isinstance(inner, Learner):
        inner.learn(*rows(known.reports))
        return inner
    return AdvisedController(inner, Architect(known, strategy=strategy or "hybrid"), seed=config.seed)


def reports_of(run_dir: Path) -> list[FieldReport]:
    """A report of each cohort in a run's log that has ended. Runs of one name are told apart by when they began; one
    that began on a bus, where many machines may begin in the same moment, by its name there.

    Raises
    ------
    EsperError
        There is no log, or it is damaged.
    """
    collector: Collector | None = None
    for record in read_events(run_dir / "events.jsonl"):
        if collector is None:
            name = _name(record.event) or run_dir.name
            began = datetime.fromtimestamp(record.time, UTC).isoformat(timespec="milliseconds")
            collector = Collector(f"{name}@{began}")
        collector.on_event(record.event)
    return [] if collector is None else collector.reports()


def _name(first: AnyEvent) -> str:
    return str(first.config.get(NAME_ON_BUS, first.run)) if isinstance(first, RunStarted) else ""


def file_run(database: Database, run_dir: Path) -> Filed:
    """File a run's reports; filed twice they are there once."""
    reports = reports_of(run_dir)
    return Filed(database.file(reports), len(reports))


def breed_into(database: Database, num: int, seed: int) -> list[Design]:
    """Make up to ``num`` new designs, test and keep them (failed ones with their reason).

    Raises
    ------
    ConfigError
        pyribs is not installed.
    """
    from esper.runs.crucible import crucible, menu

    made = breed(Snapshot.of(database), menu(), crucible, num=num, seed=seed)
    database.add(made)
    return made


def conclude(options: RunOptions, run_dir: Path, note: Callable[[str], None]) -> None:
    """File what a finished run has found, and breed. What goes wrong is told, and costs the run nothing."""
    if options.karn is None:
        return
    place = shown(options.karn)
    try:
        with Database(options.karn) as database:
            filed = file_run(database, run_dir)
            note(f"Karn: {filed.new} of {filed.total} reports are new in {place}")
            if filed.new:
                made = breed_into(database, NUM_BRED, seed=len(database.reports()))
                passed = sum(design.status == "passed" for design in made)
                note(f"Karn: {passed} of {len(made)} new designs passed their test")
    except ConfigError as error:
        note(f"Karn: no new designs: {error}")
    except EsperError as error:
        note(f"Karn: not filed: {error}; then: esper karn import {run_dir} --db {place}")
