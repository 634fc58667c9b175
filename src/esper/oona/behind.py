"""A bus that is far behind the run's logs: what is still taken then, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from esper.errors import StateError
from esper.oona.envelope import Envelope
from esper.oona.follower import Follower
from esper.oona.incoming import Doubt, Verify, nobody

ALWAYS = (".stop", ".cull", ".cancel", ".roll_back", ".pause")
"""Ends of the types of orders that end something: they are taken all the same."""


class Behind:
    """The bus is so far behind that nothing more is promised."""

    flaw, is_authentic = "behind", True

    def __str__(self) -> str:
        return "the run's logs are too far ahead of the bus; send a new order when it has caught up"


def unless_behind(verify: Verify, is_behind: Callable[[], bool]) -> Verify:
    """Past the bound nothing is taken but what ends something."""

    def check(envelope: Envelope) -> Doubt | None:
        doubt = verify(envelope)
        if doubt is None and is_behind() and not envelope.type.endswith(ALWAYS):
            return Behind()
        return doubt

    return check if verify is not nobody else verify


def bytes_left(log: Path, cursor: Path) -> int:
    """How much of a log its own link has not sent, as the two files say; 0 where they cannot be read."""
    try:
        return Follower(log, cursor).num_bytes_left
    except (StateError, OSError):
        return 0
