"""Run a job in child processes that are killed (SIGKILL) at chosen points, until one of them comes to the end.

``python tests/runs/interrupted.py FOLDER JOB FIRST LAST KILLS`` runs a job in so many chains of processes, and prints
for each chain how many kills there were and how many of them were inside a save.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from esper.observe.event_log import EventLog
from esper.protocol import AnyEvent, Lifecycle, Transitioned
from esper.runs import RunOptions, arms, execute, job
from esper.runs.cell_store import CellStore
from esper.safety import checkpoint
from esper.safety.disk import LocalDisk
from esper.safety.simulation.faults import FaultyDisk

JOBS: dict[str, dict[str, Any]] = {
    "short": {"steps": 120, "seeds": 1, "lr": (1e-2,), "controls": False},
    "whole": {"steps": 60, "seeds": 2, "lr": (1e-2, 3e-3), "controls": True},
    "long": {"steps": 400, "seeds": 1, "lr": (1e-2,), "controls": False},
    "grown": {
        "steps": 130, "seeds": 1, "lr": (1e-2,), "controls": False,
        "settings": (
            "evidence.accept=always", "graft.ramp_steps=6", "graft.settle_steps=8", "graft.warmup_steps=4",
            "graft.stabilize_steps=10", "graft.fine_tune_steps=10", "capture.batches=8", "tamiyo.first=20",
            "fit.start=random_zero",
        ),
    },
}  # fmt: skip
"""``grown`` accepts a cohort in step 57, one step after a checkpoint, and another in step 97."""
JOBS["pair"] = {**JOBS["grown"], "seeds": 2}

Fault = tuple[str, int]

PLANNED: dict[str, list[Fault]] = {
    "grown": [
        ("kept", 0),  # while the log is told that a cohort became permanent
        ("step", 4),  # after that, before the checkpoint that would hold it: step 56 is gone back to
        ("step", 20),  # after checkpoints that hold it
        ("death", 9),  # inside the first save of a process that began with an annex
        ("kept", 0),  # the second acceptance, beside an annex
    ]
}
"""Faults of the first chain of a job; others are drawn."""


SAVE_EVERY = 8
"""Steps between two checkpoints: counted here, so that a seed says where a process dies."""


class StepStore(CellStore):
    """A store that goes by steps, not by the clock."""

    _num_asked = 0

    def is_due(self) -> bool:
        self._num_asked += 1
        return self._num_asked % SAVE_EVERY == 0


def options(name: str, run_dir: Path) -> RunOptions:
    return RunOptions(preset="digits", device="cpu", run_dir=run_dir, checkpoint_every=0.0, **JOBS[name])


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def plant(kind: str, number: int) -> None:
    """End this process at the ``number``-th file operation of a save, training step or event."""
    count = 0

    def counted() -> bool:
        nonlocal count
        count += 1
        return count > number

    if kind in ("death", "half"):
        disk = FaultyDisk(LocalDisk(), {number: kind}, die=die)
        checkpoint.LocalDisk = lambda: disk  # type: ignore[misc,assignment]
    elif kind == "step":
        obey = arms.obey
        arms.obey = lambda: die() if counted() else obey()
    elif kind == "event":
        write = EventLog._write

        def torn(self: EventLog, line: bytes) -> None:
            if counted():
                write(self, line[: random.Random(number).randrange(len(line))])
                die()
            write(self, line)

        EventLog._write = torn  # type: ignore[method-assign]
    elif kind == "kept":
        append = EventLog.append

        def last(self: EventLog, event: AnyEvent) -> Any:
            if isinstance(event, Transitioned) and event.target is Lifecycle.FOSSILIZED and counted():
                die()
            return append(self, event)

        EventLog.append = last  # type: ignore[method-assign]
    elif kind == "report":
        report = job.write_report
        job.write_report = lambda *args: die() if counted() else report(*args)


def attempt(name: str, run_dir: Path, fault: Fault | None) -> bool:
    """One process; returns whether it came to the end."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            job.CellStore = StepStore  # type: ignore[misc]
            if fault is not None:
                plant(*fault)
            execute(options(name, run_dir), ignore, lambda text: print(text, file=sys.stderr))
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, "the job failed"
    return True


def ignore(event: AnyEvent) -> None:
    """Nobody looks."""


def fault_of(rng: random.Random) -> Fault:
    """More than half of the deaths are inside a save."""
    kind = rng.choice(("death", "half", "death", "half", "step", "event", "report"))
    most = {"death": 70, "half": 70, "step": 15, "event": 4, "report": 1}[kind]
    return kind, rng.randrange(most)


def interrupted(name: str, run_dir: Path, seed: int, kills: int) -> dict[str, int]:
    """Kill a job up to ``kills`` times, then let it end."""
    rng = random.Random(seed)
    counts = {"kills": 0, "inside a save": 0}
    planned = list(PLANNED.get(name, ())) if seed == 0 else []
    while counts["kills"] < kills:
        fault = planned.pop(0) if planned else fault_of(rng)
        if attempt(name, run_dir, fault):
            return counts
        counts["kills"] += 1
        counts["inside a save"] += fault[0] in ("death", "half")
    assert attempt(name, run_dir, None)
    return counts


def warm_up() -> None:
    """Import in this process, once, what every child would import by itself."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        execute(RunOptions(steps=10, seeds=1, lr=(1e-2,), controls=False, run_dir=Path(folder) / "run"), ignore)


if __name__ == "__main__":
    warm_up()
    folder, job_name, first, last, most_kills = sys.argv[1:]
    for chain in range(int(first), int(last)):
        print(*interrupted(job_name, Path(folder) / f"{job_name}-{chain}", chain, int(most_kills)).values(), flush=True)
