"""A whole job: the grown arm, its controls, everything written to a run directory."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from esper.errors import ConfigError, DivergenceError
from esper.karn import Database
from esper.karn.location import shown
from esper.karn.selection import find_selection
from esper.kasmina.starts import STARTS
from esper.observe.report import write_report
from esper.protocol import AnyEvent, RunFinished, RunStarted
from esper.runs.advice import NAME_ON_BUS, conclude, take_snapshot
from esper.runs.arms import ARMS, Attach, Cell, Trained, configure, equal_flops_widths, load_preset, score, train
from esper.runs.artifacts import write_json, write_model
from esper.runs.bus import attaching, events_followed, name_on_bus
from esper.runs.cell_store import CellStore, folder_name
from esper.runs.directory import PROGRESS, discard_progress, finished_summary, open_directory, tidy, where
from esper.runs.hosts import build
from esper.runs.options import RunOptions
from esper.runs.preset import Preset
from esper.runs.presets import check_preset
from esper.runs.record import RunRecord
from esper.runs.statistics import summarise
from esper.tamiyo import make_controller

REPORT_EVERY_S = 5.0


def execute(
    options: RunOptions,
    on_event: Callable[[AnyEvent], None],
    on_note: Callable[[str], None] | None = None,
    on_past: Callable[[AnyEvent], None] | None = None,
) -> dict[str, Any]:
    """Run a job, or go on with the same one interrupted earlier; returns its summary (also in ``summary.json`` and the
    last event).

    ``on_note`` is told in words what events do not show (the choice of learning rates, from where a run is resumed),
    ``on_past`` the events that an interrupted run has told already.

    Raises
    ------
    EsperError
        For unknown names, missing data, a run directory that is in use or holds another run, or a training that
        diverged.
    """
    check_preset(options.preset)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' needs a GPU that PyTorch can see, got none; use device='cpu'")
    size = ("gpu" if device == "cuda" else "cpu") if options.size == "auto" else options.size
    preset = load_preset(options, device, size)
    _check_settings(options, preset)
    config = configuration(options, preset, device, size)
    run_dir, is_resumed = open_directory(options, config)
    note = on_note or _silent
    with (
        RunRecord(run_dir / "events.jsonl", on_event, on_past) as record,
        events_followed(options, run_dir, note) as report,
    ):
        try:
            tidy(run_dir)
            summary = finished_summary(run_dir) if is_resumed else None
            if summary is not None:
                note(f"{run_dir} is finished; --fresh begins anew")
                record.pass_by()
            else:
                if is_resumed:
                    note(f"resuming {run_dir} {where(run_dir)}")
                summary = _Job(options, preset, device, size, run_dir, config, record, note, report).run()
            discard_progress(run_dir)
            report()
            conclude(options, run_dir, note)
            return summary
        finally:
            write_report(run_dir)


def configuration(options: RunOptions, preset: Preset, device: str, size: str) -> dict[str, Any]:
    """What was asked for, with the preset's own values where nothing was: what makes a run the same run."""
    config = {k: v for k, v in dataclasses.asdict(options).items() if v is not None and k != "fresh"}
    config = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
    if options.karn is not None:
        config["karn"] = shown(options.karn)  # written down, so without its password
    seeds = [options.seed + number for number in range(options.seeds or preset.seeds)]
    config.update(steps=options.steps or preset.steps, lrs=list(options.lr or preset.lrs), seeds=seeds)
    return {**config, "device": device, "size": size}


def _check_settings(options: RunOptions, preset: Preset) -> None:
    """Refuse what would fail later, before anything is written."""
    config = configure(preset.config(options.steps or preset.steps), options, options.seed)
    make_controller(config.tamiyo.controller, config.tamiyo, seed=0)
    if options.karn_strategy is not None:
        find_selection(options.karn_strategy)
    if options.karn is not None:
        Database(options.karn).close()
    if config.fit.start is not None:
        STARTS[config.fit.start]
    host = sum(parameter.numel() for parameter in build(preset.spec(preset.small_widths)).parameters())
    if config.budget.params is not None and config.budget.params < host:
        raise ConfigError(
            f"budget_params must be at least the host's own {host}, got {config.budget.params}; "
            "raise it or leave it out"
        )


class _Job:
    def __init__(
        self,
        options: RunOptions,
        preset: Preset,
        device: str,
        size: str,
        run_dir: Path,
        config: dict[str, Any],
        record: RunRecord,
        on_note: Callable[[str], None],
        on_grown: Callable[[], None],
    ) -> None:
        self.on_note, self.on_grown = on_note, on_grown
        self.options, self.preset, self.device, self.size = options, preset, device, size
        self.run_dir, self.config, self.record = run_dir, config, record
        self.attach = attaching(options, run_dir)
        self.steps: int = config["steps"]
        self.lrs: tuple[float, ...] = tuple(config["lrs"])
        self.seeds: list[int] = config["seeds"]
        self.results: dict[str, list[Trained]] = {}
        self.lr_trials: dict[str, dict[float, float]] = {}
        self.snapshot: Path | None = None
        self._reported = 0.0

    def run(self) -> dict[str, Any]:
        if not (self.run_dir / "config.json").exists():
            write_json(self.run_dir / "config.json", self.config)
        self.snapshot = take_snapshot(self.options, self.run_dir)
        named = {} if self.options.bus is None else {NAME_ON_BUS: name_on_bus(self.run_dir)}
        started = RunStarted(
            step=0, run=self.run_dir.name, preset=self.preset.name, config={**self.config, **named},
            environment=environment(),
        )  # fmt: skip
        self._emit(started)
        for arm in ARMS if self.options.controls else ARMS[:1]:
            self._run_arm(arm)
            if arm == "grown":
                self._save(self.results["grown"][0])
                self.on_grown()
        summary = summarise(self.results, self.lr_trials)
        summary["run_dir"] = str(self.run_dir)
        summary["preset"] = self.preset.name
        write_json(self.run_dir / "summary.json", summary)
        self._emit(RunFinished(step=self.steps, summary=summary))
        return summary

    def _run_arm(self, arm: str) -> None:
        """Choose the arm's learning rate on the first seed and held-out loss, then train the other seeds at it."""
        first = self.seeds[0]
        if len(self.lrs) == 1:
            self.results[arm] = self._train_all([self._cell(arm, seed, self.lrs[0]) for seed in self.seeds], live=True)
        else:
            self.on_note(f"{arm}: choosing among learning rates {', '.join(f'{lr:g}' for lr in self.lrs)}")
            trials = self._train_all([self._cell(arm, first, lr) for lr in self.lrs], live=False)
            self.lr_trials[arm] = {trained.cell.lr: trained.held_out for trained in trials}
            best = min(trials, key=lambda trained: _unknown_last(trained.held_out))
            self.on_note(f"{arm}: learning rate {best.cell.lr:g}, held-out loss {best.held_out:.4g}")
            for event in best.events:
                self._emit(event)
            self._save(best)  # what is finished outlives a crash of what follows
            others = [self._cell(arm, seed, best.cell.lr) for seed in self.seeds[1:]]
            self.results[arm] = [best, *self._train_all(others, live=True)]
        for trained in self.results[arm]:
            self._refuse_divergence(trained)
            self._emit(score(trained, self.preset))

    def _save(self, trained: Trained) -> None:
        """Keep the grown model of the first seed."""
        if trained.cell.arm == "grown" and math.isfinite(trained.held_out):
            write_model(self.run_dir, self.preset, trained)

    def _refuse_divergence(self, trained: Trained) -> None:
        """Neither scores nor gains mean anything when the training of the chosen learning rate has diverged."""
        if math.isfinite(trained.held_out):
            return
        tried = self.lrs if len(self.lrs) > 1 and trained is self.results[trained.cell.arm][0] else (trained.cell.lr,)
        rates = ", ".join(f"{lr:g}" for lr in tried)
        smaller = min(*self.preset.lrs, min(tried) / 10)
        raise DivergenceError(
            f"training diverged: the held-out loss of {trained.cell.arm}, seed {trained.cell.seed}, must stay finite, "
            f"got {trained.held_out} at learning rate {rates}; use a smaller one: --lr {smaller:g}"
        )

    def _cell(self, arm: str, seed: int, lr: float) -> Cell:
        widths: Sequence[int] = self.preset.small_widths
        schedule: tuple[Any, ...] = ()
        if arm != "grown":
            twin = self.results["grown"][self.seeds.index(seed)]
            if arm == "static_final":
                widths = twin.widths
            elif arm == "static_equal_flops":
                widths = equal_flops_widths(self.preset, twin.flops, self.steps, widths, twin.widths)
            elif arm == "random_growth":
                schedule = twin.kept
        return Cell(
            arm=arm, seed=seed, lr=lr, steps=self.steps, widths=tuple(widths), options=self.options,
            device=self.device, size=self.size, schedule=schedule, snapshot=self.snapshot if arm == "grown" else None,
        )  # fmt: skip

    def _train_all(self, cells: list[Cell], *, live: bool) -> list[Trained]:
        emit: Callable[[AnyEvent], None] = self._emit if live else _ignore
        if self.options.jobs == 1 or len(cells) <= 1:
            return [_train_here(cell, self.preset, emit, self.run_dir, self.attach) for cell in cells]
        context = multiprocessing.get_context("spawn")
        workers = min(self.options.jobs, len(cells))
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
            pending: list[Future[Trained]] = [pool.submit(_train_alone, cell, self.run_dir) for cell in cells]
            try:
                done = [future.result() for future in pending]
            except KeyboardInterrupt:
                for process in list((pool._processes or {}).values()):  # they would train to the end otherwise
                    process.terminate()
                raise
        for trained in done:
            for event in trained.events:
                emit(event)
        return done

    def _emit(self, event: AnyEvent) -> None:
        self.record.emit(event)
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            write_report(self.run_dir)
            self._reported = time.monotonic()


def _prepare_worker() -> None:
    """Ctrl-C is the parent's to handle; each of Esper's warnings is an event too, which the parent gets.

    A parent that was killed can end nobody: what it has left would train on and keep the run's folders from the one
    that resumes it, so a worker ends with its parent.
    """
    threading.Thread(target=_end_with_parent, name="esper-parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"esper\.")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    parent.join()
    os._exit(1)  # at once, as a kill: checkpoints are made for that


def _train_alone(cell: Cell, run_dir: Path) -> Trained:
    """One training in a process of its own."""
    torch.set_num_threads(1)
    preset = load_preset(cell.options, cell.device, cell.size)
    return _train_here(cell, preset, _ignore, run_dir, attaching(cell.options, run_dir))


def _train_here(cell: Cell, preset: Preset, emit: Callable[[AnyEvent], None], run_dir: Path, attach: Attach) -> Trained:
    """One training, kept below the run directory."""
    store = CellStore(run_dir / PROGRESS / folder_name(cell), cell, cell.options.checkpoint_every)
    try:
        return train(cell, preset, emit, store, attach)
    finally:
        store.close()


def _ignore(event: AnyEvent) -> None:
    """A learning-rate trial is not shown."""


def _silent(note: str) -> None:
    """Nobody asked for notes."""


def _unknown_last(value: float) -> float:
    return value if value == value else float("inf")


def environment() -> dict[str, str]:
    """Versions and the device, for the run's first event."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())
    return {
        "esper": __import__("esper").__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
