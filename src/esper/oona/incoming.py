"""From an envelope to an order that may be taken: for this training, verified, bounded, the same when read again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import msgspec

from esper.errors import EnvelopeError, StateError
from esper.oona.envelope import JSON, Envelope, read_json, seconds
from esper.protocol import ORDER_SCHEMA, Order, Stop
from esper.safety import bounded_json

MAX_ORDER_BYTES = 128 << 10
MAX_ORDER_DEPTH = 12
MAX_ORDER_VALUES = 20_000
_ID = re.compile(r"[!-~]{1,128}")
_MAX_ISSUER_CHARS = 128
_TYPE = "esper.order"


class Doubt(Protocol):
    """What is wrong with a message. Said of one whose sender is known (``is_authentic``), it may still be answered."""

    @property
    def flaw(self) -> str: ...

    @property
    def is_authentic(self) -> bool: ...


Verify = Callable[[Envelope], Doubt | None]
"""``None``: whoever sent this may give orders, and it is fresh."""


class Unsigned:
    """Nobody vouches for the message."""

    flaw, is_authentic = "unsigned", False

    def __str__(self) -> str:
        return "orders must be signed here, and this training has no key; give it one, or allow unsigned orders"


def nobody(envelope: Envelope) -> Doubt | None:
    """Takes no orders at all: a bus that others can reach, and no key."""
    return Unsigned()


def anybody(envelope: Envelope) -> Doubt | None:
    """Takes every order: a bus that only this process can reach, or a user who has said so in so many words."""
    return None


def read_order(envelope: Envelope, *, run: str, job: str, verify: Verify) -> tuple[Order, Doubt | None] | None:
    """The order in a message for this training, and what is wrong with its time; ``None`` if it is another's.

    Raises
    ------
    EnvelopeError
        It is no order that this training can read, or its sender may not give any.
    """
    if envelope.esperrun != run or envelope.subject != job:
        return None
    doubt = verify(envelope)
    if doubt is not None and not doubt.is_authentic:
        raise EnvelopeError(f"an order's sender must be known ({doubt})")
    if envelope.dataschema != ORDER_SCHEMA or envelope.datacontenttype != JSON:
        got = f"{envelope.dataschema[:80]!r} as {envelope.datacontenttype[:80]!r}"
        raise EnvelopeError(f"an order is {ORDER_SCHEMA!r} as {JSON}, got {got}")
    if len(envelope.data) > MAX_ORDER_BYTES:
        raise EnvelopeError(
            f"an order may have {MAX_ORDER_BYTES} bytes, got {len(envelope.data)}; ask for less at once"
        )
    order: Order = read_json(envelope.data, Order)
    for name, inside, outside in (
        ("id", order.id, envelope.id), ("run", order.run, envelope.esperrun), ("job", order.job, envelope.subject),
    ):  # fmt: skip
        if inside != outside:
            raise EnvelopeError(f"an order's {name} is its envelope's {outside[:80]!r}, got {inside[:80]!r}")
    if envelope.type not in (_TYPE, f"{_TYPE}.{order.kind}"):  # what a link lets through goes by the type alone
        says = f"an order's envelope says {_TYPE} or {_TYPE}.{order.kind}, which it holds"
        raise EnvelopeError(f"{says}; got {envelope.type[:80]!r}")
    deadlines = [time for time in (order.deadline, envelope.esperexpires) if time is not None]
    order = msgspec.structs.replace(order, deadline=min(deadlines, key=seconds, default=None))
    check_order(order)
    return order, doubt


def check_order(order: Order) -> None:
    """Refuse what could not be written down and read again as it is.

    Raises
    ------
    EnvelopeError
        Its id or issuer has another form, its deadline is no time, or it is too large.
    """
    if _ID.fullmatch(order.id) is None:
        raise EnvelopeError(f"an order's id has 1 to 128 printable ASCII characters, got {order.id[:80]!r}")
    if not (0 < len(order.issuer) <= _MAX_ISSUER_CHARS and order.issuer.isprintable()):
        raise EnvelopeError(f"an order's issuer is a name of at most 128 characters, got {order.issuer[:80]!r}")
    if order.deadline is not None:
        seconds(order.deadline)
    try:
        data = msgspec.json.encode(order)
        most = {"max_bytes": MAX_ORDER_BYTES, "max_depth": MAX_ORDER_DEPTH, "max_values": MAX_ORDER_VALUES}
        bounded_json.check(data, **most)
        same = msgspec.json.decode(data, type=Order) == order
    except (StateError, msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError) as error:
        raise EnvelopeError(f"an order must be of plain values and not too large ({error}); ask for less") from error
    if not same:
        raise EnvelopeError("an order must be the same when it is read again, got numbers that are none; say null")


def is_emergency(order: Order) -> bool:
    """Whether it goes before all others."""
    return isinstance(order.command, Stop) and order.command.emergency
