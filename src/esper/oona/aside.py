"""Calls that may block (a disk, an object store), away from the event loop.

Each has a daemon thread of its own: one that never returns holds up neither the others nor the end of the process, as
a thread of a pool would. They are rare; what happens often does not go through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from esper.errors import CONTAINED, BusError, EsperError

T = TypeVar("T")
_ABANDONED: set[asyncio.Task[Any]] = set()


async def aside(function: Callable[[], T]) -> T:
    """What ``function`` returns or raises, from a thread of its own."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(act: Callable[[Any], None], value: object) -> None:
        if not future.done():  # whoever waited may have been cancelled
            act(value)

    def run() -> None:
        told: tuple[Callable[[Any], None], object]
        told = future.set_exception, RuntimeError("a call aside ended without a result")
        try:
            told = future.set_result, function()
        except (EsperError, *CONTAINED) as error:
            told = future.set_exception, error
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, *told)

    threading.Thread(target=run, daemon=True, name="esper-aside").start()
    return await future


async def within(seconds: float, call: Coroutine[Any, Any, T], what: str) -> T:
    """What ``call`` returns, if it does so in time. Otherwise it is cancelled, and not waited for.

    Raises
    ------
    BusError
        It took longer.
    """
    task = asyncio.ensure_future(call)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if done:
        return task.result()
    task.cancel()
    _ABANDONED.add(task)  # else it could be collected before it has ended
    task.add_done_callback(_forget)
    raise BusError(f"{what} must answer within {seconds:g} s, got nothing; is the broker there?")


def _forget(task: asyncio.Task[Any]) -> None:
    _ABANDONED.discard(task)
    if not task.cancelled():
        task.exception()  # seen; asyncio would complain otherwise
