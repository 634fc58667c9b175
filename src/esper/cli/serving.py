"""``esper controller serve``."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

from esper.cli.attending import attend
from esper.cli.command import Outcome, UsageError
from esper.cli.terminal import labelled, write_lines
from esper.config import Config, TamiyoConfig
from esper.oona.address import open_bus
from esper.oona.signing import Keyring
from esper.oona.steering import HEARTBEAT_S, Steering
from esper.oona.stores import open_claims
from esper.settings import with_settings
from esper.tamiyo import make_controller


def controller_config(temper: str | None, settings: Sequence[str]) -> TamiyoConfig:
    """What all trainings are decided by: ``settings`` as typed, ``tamiyo.NAME=VALUE``, over the defaults.

    Raises
    ------
    UsageError
        A setting that is not the controller's, or not of that form: the others belong to the trainings.
    ConfigError
        No such setting, or a value that does not fit.
    """
    typed: dict[str, str] = {} if temper is None else {"tamiyo.temper": temper}
    for item in settings:
        name, equals, value = item.partition("=")
        if not equals or not name.strip().startswith("tamiyo."):
            raise UsageError(
                f"--set takes tamiyo.NAME=VALUE here, got {item!r}; what does not concern the controller is set where "
                "the training runs (esper run --set)"
            )
        typed[name.strip()] = value.strip()
    return with_settings(Config(), typed).tamiyo


def serve(url: str, controller: str, config: TamiyoConfig, seconds: float | None, *, unsigned: bool) -> Outcome:
    """Steer every training on the bus that was started with ``--controller remote``, until it is interrupted.

    Raises
    ------
    UsageError
        Nobody would take what it says: there is no key.
    EsperError
        The bus, the keys or the controller cannot be used.
    """
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
