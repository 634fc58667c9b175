"""All trials of a command: those that are finished are read, the others are run, and a summary is made of all."""

from __future__ import annotations

import functools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

from esper.runs.trials.archive import Archive
from esper.runs.trials.faults import fault_names, fault_trial
from esper.runs.trials.nulls import null_trial
from esper.runs.trials.options import TrialOptions
from esper.runs.trials.peer import applies, peer_trial
from esper.runs.trials.records import AnyRecord
from esper.runs.trials.summary import summarise
from esper.runs.trials.trial import grown_trial

Work = Callable[[int], AnyRecord]
OnRecord = Callable[[int, int, AnyRecord | None], None]
"""Told how many of how many are finished, and the newest one (``None``: how it began)."""


def execute(options: TrialOptions, on_record: OnRecord) -> dict[str, Any]:
    """Run what is missing and return the summary of all trials that were asked for.

    Raises
    ------
    EsperError
        For an unknown fault, a folder that cannot be used, or trials of another version in it.
    ModuleNotFoundError
        The peer is not installed.
    """
    work = _work(options)
    numbers = [n for n in range(options.seed, options.seed + options.num) if options.peer is None or applies(n)]
    archive = Archive(options.run_dir, options.archive, fresh=options.fresh)
    missing = [number for number in numbers if number not in archive]
    done = len(numbers) - len(missing)
    on_record(done, len(numbers), None)
    for record in run_each(work, missing, options.jobs):
        archive.append(record)
        done += 1
        on_record(done, len(numbers), record)
    wanted = set(numbers)
    return summarise(options.kind, [record for record in archive.records if record.number in wanted])


def _work(options: TrialOptions) -> Work:
    if options.faults:
        return functools.partial(fault_trial, faults=fault_names(options.faults))
    if options.peer is not None:
        return functools.partial(peer_trial, peer=options.peer)
    if options.null:
        return null_trial
    rows = options.held_out_rows
    return grown_trial if rows is None else functools.partial(grown_trial, held_out_rows=rows)


def run_each(work: Work, numbers: Iterable[int], jobs: int) -> Generator[AnyRecord]:
    """Results as they come; ``work`` must be a function of a module."""
    if jobs == 1:
        with one_thread():
            for number in numbers:
                yield work(number)
        return
    context = multiprocessing.get_context("spawn")
    todo = iter(numbers)
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_worker) as pool:
        pending: set[Future[AnyRecord]] = set()
        try:
            while True:
                while len(pending) < 2 * jobs and (number := next(todo, None)) is not None:
                    pending.add(pool.submit(work, number))
                if not pending:
                    return
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except (KeyboardInterrupt, GeneratorExit):
            for process in list((pool._processes or {}).values()):  # they would go on to the end otherwise
                process.terminate()
            raise


@contextmanager
def one_thread() -> Generator[None]:
    """The order of sums, and so the last bit, depends on the number of threads. Esper's warnings are events too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            _silence()
            yield
    finally:
        torch.set_num_threads(before)


def _prepare_worker() -> None:
    """Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _silence()


def _silence() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"esper\.")
