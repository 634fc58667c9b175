"""Trains what a plan asks for, in worker processes, until it is done or the deadline passes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch
from benchmarks.training.protocol.arms import Result
from benchmarks.training.protocol.cells import Cell, CellStore, Record
from benchmarks.training.protocol.plan import Plan, Work

from esper.runs.job import environment

Note = Callable[[Record], None]


def train(work: Work) -> tuple[Result, dict[str, str]]:
    """One cell, in this process."""
    with warnings.catch_warnings():
        # What Esper warns of (a start that was refused, say) is in its events; a benchmark repeats it thousandfold.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"esper\.")
        result = work.arm.train(work.task.preset(work.source), work.cell, work.given)
    return result, environment()


def run(plan: Plan, store: CellStore, *, workers: int, deadline: float, note: Note) -> bool:
    """Train until nothing is left (``True``) or :func:`time.monotonic` passes ``deadline`` (``False``).

    With ``workers=0`` trainings run in this process, one after another, and the deadline is looked at between them.
    What is unfinished at the deadline, or when this process is killed, is trained anew by the next call.
    """
    for record in store.read():
        plan.add(record)
    if workers == 0:
        return _run_here(plan, store, deadline, note)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
    pending: dict[Future[tuple[Result, dict[str, str]]], Work] = {}
    try:
        while time.monotonic() < deadline:
            started = {work.cell for work in pending.values()}
            for work in [work for work in plan.ready() if work.cell not in started][: workers - len(pending)]:
                prepared = plan.prepared(work)
                pending[pool.submit(train, prepared)] = prepared
            if not pending:
                return True
            patience = min(60.0, max(0.0, deadline - time.monotonic()))
            finished, _ = wait(pending, timeout=patience, return_when=FIRST_COMPLETED)
            for future in finished:
                _keep(plan, store, pending.pop(future), future.result(), note)
        return False
    finally:
        for process in list((pool._processes or {}).values()) if pending else []:
            process.terminate()  # they would train to their end otherwise
        pool.shutdown(wait=not pending, cancel_futures=True)


def _run_here(plan: Plan, store: CellStore, deadline: float, note: Note) -> bool:
    while time.monotonic() < deadline:
        ready = plan.ready()
        if not ready:
            return True
        work = plan.prepared(ready[0])
        _keep(plan, store, work, train(work), note)
    return False


def _keep(plan: Plan, store: CellStore, work: Work, trained: tuple[Result, dict[str, str]], note: Note) -> None:
    result, where = trained
    cell: Cell = work.cell
    record = Record(cell=cell, outcome=result.outcome, given=work.given, environment=where)
    store.write(record, result.score, result.loss)
    plan.add(record)
    note(record)


def _one_thread() -> None:
    torch.set_num_threads(1)
