"""A whole job: the grown arm, its controls, everything written to a run directory."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import platform
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from esper.errors import ConfigError, DivergenceError
from esper.kasmina.starts import STARTS
from esper.observe.event_log import EventLog
from esper.observe.report import write_report
from esper.protocol import AnyEvent, RunFinished, RunStarted
from esper.runs.arms import ARMS, Cell, Trained, configure, equal_flops_widths, load_preset, score, train
from esper.runs.artifacts import write_json, write_model
from esper.runs.hosts import build
from esper.runs.options import RunOptions
from esper.runs.preset import Preset
from esper.runs.presets import check_preset
from esper.runs.statistics import summarise
from esper.tamiyo import make_controller

REPORT_EVERY_S = 5.0


def execute(
    options: RunOptions, on_event: Callable[[AnyEvent], None], on_note: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run a job and return its summary (also in ``summary.json`` and the last event).

    ``on_note`` is told in words what events do not show (the choice of learning rates).

    Raises
    ------
    EsperError
        For unknown names, missing data, a run directory that is in use, or a training that diverged.
    """
    check_preset(options.preset)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' needs a GPU that PyTorch can see, got none; use device='cpu'")
    size = ("gpu" if device == "cuda" else "cpu") if options.size == "auto" else options.size
    preset = load_preset(options, device, size)
    _check_settings(options, preset)
    run_dir = claim_directory(options)
    with EventLog(run_dir / "events.jsonl") as log:
        job = _Job(options, preset, device, size, run_dir, log, on_event, on_note or _silent)
        try:
            return job.run()
        finally:
            write_report(run_dir)


def _check_settings(options: RunOptions, preset: Preset) -> None:
    """Refuse what would fail later, before anything is written."""
    config = configure(preset.config(options.steps or preset.steps), options, options.seed)
    make_controller(config.tamiyo.controller, config.tamiyo, seed=0)
    if config.fit.start is not None:
        STARTS[config.fit.start]
    host = sum(parameter.numel() for parameter in build(preset.spec(preset.small_widths)).parameters())
    if config.budget.params is not None and config.budget.params < host:
        raise ConfigError(
            f"budget_params must be at least the host's own {host}, got {config.budget.params}; "
            "raise it or leave it out"
        )


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


class _Job:
    def __init__(
        self,
        options: RunOptions,
        preset: Preset,
        device: str,
        size: str,
        run_dir: Path,
        log: EventLog,
        on_event: Callable[[AnyEvent], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.on_note = on_note
        self.options, self.preset, self.device, self.size = options, preset, device, size
        self.run_dir, self.log, self.on_event = run_dir, log, on_event
        self.steps = options.steps or preset.steps
        self.lrs = options.lr or preset.lrs
        self.seeds = [options.seed + number for number in range(options.seeds or preset.seeds)]
        self.results: dict[str, list[Trained]] = {}
        self.lr_trials: dict[str, dict[float, float]] = {}
        self._reported = 0.0

    def run(self) -> dict[str, Any]:
        config = {k: v for k, v in dataclasses.asdict(self.options).items() if v is not None}
        config = {k: str(v) if isinstance(v, Path) else v for k, v in config.items()}
        config.update(steps=self.steps, lrs=list(self.lrs), seeds=self.seeds, device=self.device, size=self.size)
        write_json(self.run_dir / "config.json", config)
        self._emit(
            RunStarted(step=0, run=self.run_dir.name, preset=self.preset.name, config=config, environment=environment())
        )
        for arm in ARMS if self.options.controls else ARMS[:1]:
            self._run_arm(arm)
            if arm == "grown":
                self._save(self.results["grown"][0])
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
            device=self.device, size=self.size, schedule=schedule,
        )  # fmt: skip

    def _train_all(self, cells: list[Cell], *, live: bool) -> list[Trained]:
        emit: Callable[[AnyEvent], None] = self._emit if live else _ignore
        if self.options.jobs == 1 or len(cells) <= 1:
            return [train(cell, self.preset, emit) for cell in cells]
        context = multiprocessing.get_context("spawn")
        workers = min(self.options.jobs, len(cells))
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker) as pool:
            pending: list[Future[Trained]] = [pool.submit(_train_alone, cell) for cell in cells]
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
        self.log.append(event)
        self.on_event(event)
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            write_report(self.run_dir)
            self._reported = time.monotonic()


def _prepare_worker() -> None:
    """Ctrl-C is the parent's to handle; each of Esper's warnings is an event too, which the parent gets."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"esper\.")


def _train_alone(cell: Cell) -> Trained:
    """One training in a process of its own."""
    torch.set_num_threads(1)
    return train(cell, load_preset(cell.options, cell.device, cell.size), _ignore)


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
