"""Cells of a long computation: each is done once, kept on the disk, and found again by the next call.

Cells run in worker processes with one thread each. When the time is up no further cell begins, and those that are not
done are dropped: the next call begins them anew.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

Work = Callable[..., Any]
"""A function of a module (workers import it) with JSON-ready arguments and result."""
_LEFT_FOR_LAST = 3.0
"""Seconds before the end at which cells that still run are given up."""


def _begin() -> None:
    torch.set_num_threads(1)


def _timed(work: Work, args: Sequence[Any]) -> tuple[Any, float]:
    started = time.process_time()
    found = work(*args)
    return found, time.process_time() - started


class Cells:
    """Finished cells by name, one a line of a file; of several lines for one cell the last counts.

    Parameters
    ----------
    workers:
        Processes; 0 computes in this one.
    until:
        Value of ``time.monotonic()`` at which to stop.
    """

    def __init__(self, path: Path, *, workers: int, until: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.workers, self.until = path, workers, until
        self.known: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                self._note(json.loads(line))
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed
        if text and not text.endswith("\n"):
            self._append("")  # so that the next cell has a line of its own
        self._pool: ProcessPoolExecutor | None = None

    def fill(self, work: Work, wanted: dict[str, Sequence[Any]], *, again: Collection[str] = ()) -> bool:
        """Do what is missing, in this order, and once more those of ``again``; returns whether all of it is done."""
        missing = [name for name in wanted if name not in self.known or name in again]
        if self.workers > 0:
            return self._fill_in_pool(work, wanted, missing)
        for name in missing:
            if time.monotonic() >= self.until:
                return False
            self._keep(name, *_timed(work, wanted[name]))
        return True

    def forget(self, names: Collection[str]) -> None:
        """These have to be done anew; what they cost stays counted."""
        for name in names:
            line = {"cell": name, "forgotten": True}
            self._append(json.dumps(line))
            self._note(line)

    def close(self) -> None:
        """Let the workers go; those that still compute are ended."""
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())  # pyright: ignore[reportPrivateUsage]
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            self._pool = None

    def _fill_in_pool(self, work: Work, wanted: dict[str, Sequence[Any]], missing: list[str]) -> bool:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin)
        running: dict[Future[tuple[Any, float]], str] = {}
        waiting, left_over = list(reversed(missing)), set(missing)
        while (waiting or running) and time.monotonic() < self.until:
            while waiting and len(running) < self.workers:
                name = waiting.pop()
                running[self._pool.submit(_timed, work, wanted[name])] = name
            left = max(0.1, self.until - _LEFT_FOR_LAST - time.monotonic())
            done, _ = wait(running, timeout=left, return_when=FIRST_COMPLETED)
            for future in done:
                name, error = running.pop(future), future.exception()
                if error is None:
                    self._keep(name, *future.result())
                    left_over.discard(name)
                else:  # the others are worth having all the same
                    print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if not done and time.monotonic() >= self.until - _LEFT_FOR_LAST:
                break
        for future in running:
            future.cancel()
        return not left_over

    def _keep(self, name: str, value: Any, seconds: float) -> None:
        line = {"cell": name, "value": value, "cpu_s": round(self.seconds.get(name, 0.0) + seconds, 2)}
        self._append(json.dumps(line))
        self._note(line)
        print(f"{name} ({seconds:.1f} s)", file=sys.stderr, flush=True)

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _note(self, line: dict[str, Any]) -> None:
        if line.get("forgotten"):
            self.known.pop(line["cell"], None)
        else:
            self.known[line["cell"]], self.seconds[line["cell"]] = line["value"], line["cpu_s"]
