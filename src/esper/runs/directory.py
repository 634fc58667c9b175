"""Which directory a run gets: a new one, or that of the same run interrupted earlier."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

from esper.errors import ConfigError, StateError
from esper.files import lock_exclusively
from esper.observe.event_log import read_events
from esper.protocol import RunFinished
from esper.runs.options import RunOptions
from esper.safety.checkpoint import manifest_numbers_or_none, read_manifest
from esper.safety.disk import LocalDisk

PROGRESS = "progress"
"""Checkpoints of the trainings; gone once the run is finished."""
_LOG, _CONFIG, _SUMMARY = "events.jsonl", "config.json", "summary.json"
_FREE = ("run_dir", "jobs", "checkpoint_every", "fresh", "bus", "unsigned_commands")
"""Options that change nothing of what a run finds."""


def open_directory(options: RunOptions, config: dict[str, Any]) -> tuple[Path, bool]:
    """The run directory, and whether an interrupted (or finished) run of this configuration is in it.

    Raises
    ------
    ConfigError
        The directory is in use, or its run has another configuration.
    """
    if options.run_dir is not None:
        earlier = _earlier_in(options.run_dir)
        if earlier is not None and options.fresh:
            _put_away(options.run_dir)
        elif earlier is not None:
            _check_same(options.run_dir, earlier, config)
            return options.run_dir, True
    elif not options.fresh:
        found = _interrupted(options.preset, config)
        if found is not None:
            return found, True
    return claim_directory(options), False


def claim_directory(options: RunOptions) -> Path:
    """Create the run directory: the one asked for (which must be new or empty), or the next free number."""
    if options.run_dir is not None:
        path = options.run_dir
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"a run directory must be new or empty, got {str(path)!r}; choose another --run-dir")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the run directory {str(path)!r} cannot be made ({error}); choose another") from error
        return path
    for number in range(1, 100_000):
        path = Path("runs") / f"{options.preset}-{number:02d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"the run directory {str(path)!r} cannot be made ({error}); use --run-dir") from error
        return path
    raise ConfigError("runs/ holds 99,999 runs of this preset; delete some or use --run-dir")


def tidy(path: Path) -> None:
    """Remove temporary files that a killed run has left beside its own (``.summary.json-...``)."""
    for name in os.listdir(path):
        if name.startswith((".config.json-", ".summary.json-", ".structure.json-", ".model.safetensors-", ".report.")):
            (path / name).unlink(missing_ok=True)


def discard_progress(path: Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(path / PROGRESS, ignore_errors=True)


def finished_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a run that has told its last event; ``None`` if there is something left to do."""
    last = deque(read_events(path / _LOG), maxlen=1)
    if not last or not isinstance(last[0].event, RunFinished) or not (path / _SUMMARY).is_file():
        return None
    return dict(json.loads((path / _SUMMARY).read_text(encoding="utf-8")))


def where(path: Path) -> str:
    """In words, how far a run has come: ``after 3 trainings, in grown-seed1-lr0.01 at step 340``."""
    done, at = 0, list[str]()
    disk = LocalDisk()
    folders = sorted((path / PROGRESS).iterdir()) if (path / PROGRESS).is_dir() else []
    for folder in folders:
        for number in manifest_numbers_or_none(disk, folder)[:1]:
            try:
                manifest = read_manifest(disk, folder, number)
            except (StateError, OSError):
                at.append(f"{folder.name} before a damaged checkpoint")
                continue
            if manifest.document.get("done"):
                done += 1
            else:
                at.append(f"{folder.name} at step {manifest.step}")
    told = f"after {done} training{'' if done == 1 else 's'}"
    return ", in ".join([told, *at]) if done or at else "from its beginning"


def _earlier_in(path: Path) -> dict[str, Any] | None:
    """The configuration of the run in a directory; empty if it was killed before it had written one."""
    if not path.is_dir():
        return None
    names = [name for name in os.listdir(path) if not name.startswith(".")]
    if _CONFIG in names:
        return _read_config(path / _CONFIG)
    is_begun = set(names) <= {_LOG, "report.html"} and _LOG in names and (path / _LOG).stat().st_size == 0
    return {} if is_begun else None


def _check_same(path: Path, earlier: dict[str, Any], config: dict[str, Any]) -> None:
    there, here = earlier, json.loads(json.dumps(config))
    differing = [key for key in {**there, **here} if key not in _FREE and there.get(key) != here.get(key)]
    if earlier and differing:
        told = "; ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in differing)
        raise ConfigError(
            f"a run is resumed with the configuration it was started with, got {len(differing)} differences in "
            f"{str(path)!r}: {told}; use --fresh, or choose another --run-dir"
        )


def _interrupted(preset: str, config: dict[str, Any]) -> Path | None:
    """The newest run under ``runs/`` of this very configuration that has not finished and that nobody writes."""
    for path in sorted(Path("runs").glob(f"{preset}-*/{_CONFIG}"), reverse=True):
        directory = path.parent
        if not (directory / PROGRESS).is_dir() or _is_written(directory / _LOG):
            continue
        try:
            _check_same(directory, _read_config(path), config)
        except ConfigError:
            continue
        return directory
    return None


def _is_written(log: Path) -> bool:
    """Whether a living process holds the log."""
    try:
        fd = os.open(log, os.O_RDWR)
    except OSError:
        return True
    try:
        lock_exclusively(fd)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _put_away(path: Path) -> None:
    """Give an earlier run another name, so that nothing of it is lost."""
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    if (path / _LOG).exists() and _is_written(path / _LOG):
        raise ConfigError(f"a run is put away once it has ended, got {str(path)!r} being written; wait or stop it")
    path.rename(target)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{str(path)!r} must hold a run's configuration, got an error ({error}); use --fresh"
        ) from error
