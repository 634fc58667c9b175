"""The one thread that talks to the bus, with one event loop for everything that goes in and out.

It starts when it is first needed, outlives every failure of the bus, ends within a bounded time and never keeps the
process alive. If it has died, or stands still, :meth:`Courier.trouble` says so: whoever needs it asks, and does without
what it would have brought.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from esper.errors import CONTAINED, BusError, EsperError
from esper.oona.backoff import Backoff

Errand = Callable[[asyncio.Event], Awaitable[None]]
"""Runs until the event is set, then finishes what it can; ``TelemetryPublisher.run`` is one."""
Farewell = Callable[[], Awaitable[None]]

STANDSTILL_S = 30.0
_BEAT_S = 2.0
_START_S = 10.0
_AT_EXIT_S = 2.0


@dataclass
class _Task:
    errand: Errand
    num_failures: int = 0
    failure: str = ""
    is_running: bool = False


class Courier:
    """A thread and its errands.

    Parameters
    ----------
    on_close:
        Called in the loop when all errands have ended: closes the bus.
    standstill_s:
        The loop counts as standing still when nothing in it has moved for so long.
    """

    def __init__(
        self,
        *,
        on_close: Farewell | None = None,
        standstill_s: float = STANDSTILL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_close, self._standstill_s, self._clock = on_close, standstill_s, clock
        self._tasks: dict[str, _Task] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._is_stopping = False
        self._stop_by = float("inf")
        self._death = ""
        self._beat = clock()
        self._pid = os.getpid()
        self._ready = threading.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._at_exit = functools.partial(_end, weakref.ref(self))

    def add(self, name: str, errand: Errand) -> None:
        """Have the courier run ``errand`` as well; a running courier takes it up at once.

        Raises
        ------
        EsperError
            The name is taken, or the courier has ended.
        """
        self._check_process()
        with self._lock:
            if name in self._tasks or self._is_stopping:
                why = "has ended" if self._is_stopping else f"has {', '.join(self._tasks)}"
                raise EsperError(f"a courier takes errands under new names until it ends, got {name!r}; it {why}")
            self._tasks[name] = _Task(errand)
            if self._thread is None:
                return
        self._ready.wait(_START_S)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended; trouble() says so
                self._loop.call_soon_threadsafe(self._begin, name)

    def start(self) -> None:
        """Begin, if it has not begun yet, and wait until its loop runs.

        Raises
        ------
        EsperError
            The courier has ended, or this is a forked copy of its process.
        """
        self._check_process()
        with self._lock:
            if self._is_stopping:
                raise EsperError("a courier runs once, got one that has ended; make a new one")
            if self._thread is not None:
                return
            self._beat = self._clock()
            self._thread = threading.Thread(target=self._run, daemon=True, name="esper-courier")
            self._thread.start()
        self._ready.wait(_START_S)
        atexit.register(self._at_exit)

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End: errands finish what they can for about ``timeout_s``, then they are cut short. Stopping twice is fine.

        Returns whether the thread has ended; if not (something in it blocks) it is left behind and keeps nothing alive.
        """
        self._check_process()
        with self._lock:
            thread, loop, stop = self._thread, self._loop, self._stop
            self._is_stopping = True
            self._stop_by = self._clock() + timeout_s
        atexit.unregister(self._at_exit)
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(stop.set)
        if thread is None or thread is threading.current_thread():
            return thread is None
        thread.join(timeout_s + 1.0)
        return not thread.is_alive()

    def trouble(self) -> str | None:
        """What is wrong with the courier; ``None`` while it does its work. Takes microseconds, from any thread."""
        if os.getpid() != self._pid:
            return f"the courier belongs to process {self._pid}, this is a forked copy of it"
        if self._death:
            return f"the courier has died ({self._death})"
        if self._thread is not None and not self._is_stopping:
            if not self._thread.is_alive():
                return "the courier has died without a word"
            still_s = self._clock() - self._beat
            if still_s > self._standstill_s:
                return f"the courier has stood still for {still_s:.0f} s"
        return None

    def counts(self) -> dict[str, dict[str, int | str]]:
        """For each errand: whether it runs, how often it has failed, and what it failed of last."""
        with self._lock:
            tasks = dict(self._tasks)
        return {
            name: {"running": int(task.is_running), "failures": task.num_failures, "failure": task.failure}
            for name, task in tasks.items()
        }

    # ---------------------------------------------------------------------------------------------- its own thread

    def _run(self) -> None:
        try:
            asyncio.run(self._work())
        except (EsperError, *CONTAINED) as error:
            self._death = self._death or f"{type(error).__name__}: {error}"
        finally:
            if not self._is_stopping:
                self._death = self._death or "its loop ended"
            self._ready.set()

    async def _work(self) -> None:
        with self._lock:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            names = list(self._tasks)
            if self._is_stopping:
                self._stop.set()
        for name in names:
            self._begin(name)
        self._ready.set()
        beat_s = min(_BEAT_S, self._standstill_s / 4)
        while not self._stop.is_set():
            self._beat = self._clock()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(beat_s):
                    await self._stop.wait()
        await self._wind_down()

    async def _wind_down(self) -> None:
        running = list(self._running.values())
        left = min(max(0.0, self._stop_by - self._clock()), 60.0)
        if running:
            _, late = await asyncio.wait(running, timeout=0.8 * left)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=max(0.1, 0.1 * left))
        if self._on_close is not None:
            with contextlib.suppress(TimeoutError, BusError, OSError):
                async with asyncio.timeout(max(0.1, 0.1 * left)):
                    await self._on_close()

    def _begin(self, name: str) -> None:
        if name not in self._running:
            self._running[name] = asyncio.get_running_loop().create_task(self._see_to(name), name=name)
            self._running[name].add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An error that nobody foresaw ends everything: then the courier is dead, and says so."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._death = f"{task.get_name()}: {type(error).__name__}: {error}"
            self._running_stop().set()

    async def _see_to(self, name: str) -> None:
        """Run an errand, and again after every failure, later each time."""
        task, stop, backoff = self._tasks[name], self._running_stop(), Backoff()
        while True:
            task.is_running, began = True, self._clock()
            try:
                await task.errand(stop)
                return
            except (EsperError, *CONTAINED) as error:
                task.num_failures += 1
                task.failure = f"{type(error).__name__}: {error}"
            finally:
                task.is_running = False
            if stop.is_set():
                return
            if self._clock() - began > 60.0:
                backoff.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff.next_s()):
                    await stop.wait()

    def _running_stop(self) -> asyncio.Event:
        assert self._stop is not None
        return self._stop

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise EsperError(
                f"a courier belongs to the process that made it ({self._pid}), got a forked copy ({os.getpid()}); make "
                "a new one there, or start processes with the method 'spawn'"
            )


def _end(reference: weakref.ref[Courier]) -> None:
    """At the end of the process: a last chance for what is on its way, and no thread in the middle of something."""
    courier = reference()
    if courier is not None and courier.trouble() is None:
        courier.stop(_AT_EXIT_S)
