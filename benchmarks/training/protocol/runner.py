"""Trains what plans ask for, in worker processes, until it is done or the deadline passes."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.context import SpawnContext
from typing import Any

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


def run(plans: Plan | Sequence[Plan], store: CellStore, *, workers: int, deadline: float, note: Note) -> bool:
    """Train until nothing is left (``True``) or :func:`time.monotonic` passes ``deadline`` (``False``).

    Of several plans the work of the first comes first, and that of all is done side by side. With ``workers=0``
    trainings run in this process, one after another, and the deadline is looked at between them. What is unfinished at
    the deadline, or when this process is killed, is trained anew by the next call.
    """
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    kept = store.read()
    for plan in plans:
        for record in kept:
            plan.add(record)
    if workers == 0:
        return _run_here(plans, store, deadline, note)
    pool = _pool(workers, gpus() if any(plan.source.device == "cuda" for plan in plans) else [])
    pending: dict[Future[tuple[Result, dict[str, str]]], Work] = {}
    try:
        while time.monotonic() < deadline:
            for plan, work in _ready(plans, {work.cell for work in pending.values()})[: workers - len(pending)]:
                prepared = plan.prepared(work)
                pending[pool.submit(train, prepared)] = prepared
            if not pending:
                return True
            patience = min(60.0, max(0.0, deadline - time.monotonic()))
            finished, _ = wait(pending, timeout=patience, return_when=FIRST_COMPLETED)
            for future in finished:
                _keep(plans, store, pending.pop(future), future.result(), note)
        return False
    finally:
        for process in list((pool._processes or {}).values()) if pending else []:
            process.terminate()  # they would train to their end otherwise
        pool.shutdown(wait=not pending, cancel_futures=True)


def gpus() -> list[str]:
    """The GPUs that workers take in turn, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(n) for n in range(torch.cuda.device_count())] if named is None else [n for n in named.split(",") if n]


def _pool(workers: int, places: list[str]) -> ProcessPoolExecutor:
    context: SpawnContext = get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=settle, initargs=(context.Value("i", 0), places)
    )


def settle(turn: Any, places: list[str]) -> None:
    """One thread a worker, and one GPU, which is the only one that it sees."""
    torch.set_num_threads(1)
    if places:
        with turn.get_lock():
            number, turn.value = turn.value, turn.value + 1
        os.environ["CUDA_VISIBLE_DEVICES"] = places[number % len(places)]  # read when CUDA is first used


def _ready(plans: Sequence[Plan], started: set[Cell]) -> list[tuple[Plan, Work]]:
    """What could be trained now, each cell once, the first plan's first."""
    found: dict[Cell, tuple[Plan, Work]] = {}
    for plan in plans:
        for work in plan.ready():
            if work.cell not in started:
                found.setdefault(work.cell, (plan, work))
    return list(found.values())


def _run_here(plans: Sequence[Plan], store: CellStore, deadline: float, note: Note) -> bool:
    while time.monotonic() < deadline:
        ready = _ready(plans, set())
        if not ready:
            return True
        plan, work = ready[0]
        prepared = plan.prepared(work)
        _keep(plans, store, prepared, train(prepared), note)
    return False


def _keep(
    plans: Sequence[Plan], store: CellStore, work: Work, trained: tuple[Result, dict[str, str]], note: Note
) -> None:
    result, where = trained
    record = Record(cell=work.cell, outcome=result.outcome, given=work.given, environment=where)
    store.write(record, result.score, result.loss)
    for plan in plans:
        plan.add(record)
    note(record)
