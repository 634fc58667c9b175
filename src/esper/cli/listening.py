"""``esper karn listen``."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.cli.attending import attend
from esper.cli.command import Outcome
from esper.cli.terminal import labelled, write_lines
from esper.karn import Database, FieldReport
from esper.oona.address import open_bus
from esper.oona.registrar import Registrar
from esper.oona.signing import Keyring
from esper.oona.stores import open_claims


def listen(url: str, place: str | Path, seconds: float | None, count: int | None) -> Outcome:
    """File the field reports of all runs on the bus, until it is interrupted, its time is over or there were enough.

    Raises
    ------
    EsperError
        The database, the bus or the keys cannot be used.
    """
    bus, keyring, claims = open_bus(url), Keyring.from_environment(), open_claims(url)
    with Database(place) as database:
        name, group = database.name, f"karn {database.identity}"
    registrar = Registrar(
        bus, lambda reports: _file(place, reports), group=group, consumer=f"listener-{secrets.token_hex(4)}",
        keyring=keyring, claims=claims, most=count, on_note=lambda text: write_lines([text], sys.stderr),
    )  # fmt: skip
    write_lines([f"listening on {bus.address} as {group!r} for {name}; end it with Ctrl-C"], sys.stderr)
    if not bus.is_remote:
        write_lines([f"{bus.address} is inside this process: no run reaches it; name the runs' own bus"], sys.stderr)
    elif keyring is None:
        write_lines(["no ESPER_BUS_KEY: whoever reaches the bus is believed"], sys.stderr)
    asyncio.run(attend(registrar, bus, claims, seconds, lambda: _told(registrar, name)))
    counts = registrar.counts
    result: dict[str, Any] = {"db": name, "group": group}
    result |= {name: counts[name] for name in ("filed", "new", "buried")}
    return Outcome(result=result, lines=[labelled("filed", _told(registrar, name))])


def _file(place: str | Path, reports: Sequence[FieldReport]) -> int:
    """In a thread of its own, which SQLite wants a connection of its own for."""
    with Database(place) as database:
        return database.file(reports)


def _told(registrar: Registrar, name: str) -> str:
    counts = registrar.counts
    dead = f", {counts['buried']} in the dead letters" if counts["buried"] else ""
    return f"{counts['new']} of {counts['filed']} reports are new in {name}{dead}"
