"""A command that serves a bus until it is told to end: a signal, its time, or that it has done what was asked."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Protocol

from esper.cli.terminal import write_lines
from esper.errors import BusError
from esper.oona.aside import within
from esper.oona.bus import Bus
from esper.oona.claims import Claims

_TOLD_EVERY_S = 60.0
_CLOSE_S = 5.0


class Service(Protocol):
    """What is attended to."""

    async def serve(self, until: asyncio.Event) -> None: ...


async def attend(
    service: Service, bus: Bus, claims: Claims | None, seconds: float | None, told: Callable[[], str]
) -> None:
    """Serve until a signal or the time; with a second signal nothing that is under way is waited for. Once a minute
    ``told`` says how it goes."""
    until = asyncio.Event()
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(service.serve(until))

    def end() -> None:
        if until.is_set():
            serving.cancel()
        until.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    if seconds is not None:
        loop.call_later(seconds, until.set)
    telling = asyncio.create_task(_tell(told, until))
    try:
        await asyncio.wait({serving})
        if not serving.cancelled():
            serving.result()  # or what it has raised
    finally:
        telling.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        closing = [("the bus", bus.close())] + ([] if claims is None else [("the claim store", claims.store.close())])
        for what, call in closing:
            try:
                await within(_CLOSE_S, call, what)
            except BusError as error:
                write_lines([f"{what} could not be closed ({error})"], sys.stderr)


async def _tell(told: Callable[[], str], until: asyncio.Event) -> None:
    while not until.is_set():
        await asyncio.sleep(_TOLD_EVERY_S)
        write_lines([told()], sys.stderr)
