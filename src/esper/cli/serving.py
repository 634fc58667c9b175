"""``esper controller serve``."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from typing import Any

from esper.cli.attending import attend
from esper.cli.command import Outcome, UsageError
from esper.cli.terminal import labelled, write_lines
from esper.config import TamiyoConfig
from esper.oona.address import open_bus
from esper.oona.signing import Keyring
from esper.oona.steering import HEARTBEAT_S, Steering
from esper.oona.stores import open_claims
from esper.tamiyo import make_controller


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
    asyncio.run(attend(steering, bus, claims, seconds, lambda: _told(steering)))
    result: dict[str, Any] = {"seconds": time.monotonic() - began, "trainings": steering.num_trainings}
    result["counts"] = dict(steering.counts)
    return Outcome(result=result, lines=[labelled("steered", _told(steering))])


def _told(steering: Steering) -> str:
    counts = steering.counts
    return (
        f"{steering.num_trainings} trainings, {counts['decided']:,} decisions, {counts['orders']:,} orders: "
        f"{counts['applied']:,} applied, {counts['refused']:,} refused, {counts['expired']:,} expired"
    )
