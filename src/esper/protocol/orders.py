"""A command with its sender, as it travels, and what became of it."""

from __future__ import annotations

from typing import Literal

import msgspec

from esper.protocol.commands import Command

ORDER_SCHEMA = "esper:order:1"
"""``dataschema`` of a message whose data are an :class:`Order`."""
ACKNOWLEDGEMENT_SCHEMA = "esper:acknowledgement:1"

Outcome = Literal["applied", "refused", "expired"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """Who wants what of which training. Times are RFC 3339 in UTC.

    ``id`` stands for one command for ever: sent again it is answered again, never applied again. Empty: a command of
    this very process, which nobody waits for. ``deadline`` is the last moment at which it may be applied.
    """

    command: Command
    id: str = ""
    issuer: str = "operator"
    run: str = ""
    job: str = ""
    """The training within the run."""
    issued: str = ""
    deadline: str | None = None

    @property
    def kind(self) -> str:
        """The command's name on the wire."""
        return str(self.command.__struct_config__.tag)


class Acknowledgement(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an order. The first answer to an id is the answer for ever.

    ``gate`` and ``reason`` say why it was refused; ``step`` is the one at which it was judged.
    """

    id: str
    outcome: Outcome
    issuer: str = ""
    run: str = ""
    job: str = ""
    kind: str = ""
    gate: str = ""
    reason: str = ""
    step: int = 0
    first: bool = True
    """False: said again, or said to another command under an id that is taken."""
