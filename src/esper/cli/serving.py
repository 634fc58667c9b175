"""``esper controller serve``."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from typing import Any

from esper.cli.command import Outcome, UsageError
from esper.cli.terminal import labelled, write_lines
from esper.config import TamiyoConfig
from esper.errors import BusError
from esper.oona.address import open_bus
from esper.oona.aside import within
from esper.oona.bus import Bus
from esper.oona.claims import Claims
from esper.oona.signing import Keyring
from esper.oona.steering import HEARTBEAT_S, Steering
from esper.oona.stores import open_claims
from esper.tamiyo import make_controller

_TOLD_EVERY_S = 60.0
_CLOSE_S = 5.0


def serve(url: str, controller: str, temper: str | None, seconds: float | None, *, unsigned: bool) -> Outcome:
    """Steer every training on the bus that was started with ``--controller remote``, until it is interrupted.

    Raises
    ------
    UsageError
        Nobody would take what it says: there is no key.
    EsperError
        The bus, the keys or the controller cannot be used.
    """
    config = TamiyoConfig() if temper is None else TamiyoConfig(temper=temper)
    make_controller(controller, config)  # an unknown name is said now, not when the first training comes
    bus, keyring, claims = open_bus(url), Keyring.from_environment(), open_claims(url)
    if keyring is None and bus.is_remote and not unsigned:
        raise UsageError(
            "over a bus that others can reach commands must be signed, and there is no key; set ESPER_BUS_KEY here and "
            "where the trainings run, or say --unsigned here and esper run --unsigned-commands there"
        )
    steering = Steering(
        bus, lambda: make_controller(controller, config), name=controller, keyring=keyring, claims=claims,
        consumer=f"server-{secrets.token_hex(4)}", settle_s=1.5 * HEARTBEAT_S,
        on_note=lambda text: write_lines([text], sys.stderr),
    )  # fmt: skip
    write_lines([f"steering by {controller} over {bus.address}; end it with Ctrl-C"], sys.stderr)
    began = time.monotonic()
    asyncio.run(_serve(steering, bus, claims, seconds))
    result: dict[str, Any] = {"seconds": time.monotonic() - began, "trainings": steering.num_trainings}
    result["counts"] = dict(steering.counts)
    return Outcome(result=result, lines=[labelled("steered", _told(steering))])


async def _serve(steering: Steering, bus: Bus, claims: Claims | None, seconds: float | None) -> None:
    """Serve until a signal or the time; with a second signal nothing that is under way is waited for."""
    until = asyncio.Event()
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(steering.serve(until))

    def end() -> None:
        if until.is_set():
            serving.cancel()
        until.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    if seconds is not None:
        loop.call_later(seconds, until.set)
    telling = asyncio.create_task(_tell(steering, until))
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


async def _tell(steering: Steering, until: asyncio.Event) -> None:
    while not until.is_set():
        await asyncio.sleep(_TOLD_EVERY_S)
        write_lines([_told(steering)], sys.stderr)


def _told(steering: Steering) -> str:
    counts = steering.counts
    return (
        f"{steering.num_trainings} trainings, {counts['decided']:,} decisions, {counts['orders']:,} orders: "
        f"{counts['applied']:,} applied, {counts['refused']:,} refused, {counts['expired']:,} expired"
    )
