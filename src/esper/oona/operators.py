"""What a person does on a bus: look at what passes, send one command and wait for its answer, read the dead letters."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import msgspec

from esper.errors import BusError, EnvelopeError
from esper.oona import envelope as wire
from esper.oona.bus import Begin, Bus, Delivery, Subscription
from esper.oona.schemas import decode_payload
from esper.oona.sender import Sender
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, Topic
from esper.protocol import ORDER_SCHEMA, Acknowledgement, Command, Order

_NEVER_AGAIN_S = 24 * 3600.0


async def passing(
    bus: Bus, topics: Sequence[Topic], begin: Begin, wait_s: float = 0.5
) -> AsyncGenerator[list[Delivery]]:
    """Messages as they come, for ever; an empty list where none came for ``wait_s``.

    Raises
    ------
    BusError
        The broker cannot be reached.
    """
    async with _onlooker(bus, topics, begin) as subscription:
        while True:
            deliveries = await subscription.receive(wait_s=wait_s)
            await subscription.acknowledge(deliveries)
            yield deliveries


async def ask(bus: Bus, sender: Sender, command: Command, *, issuer: str, wait_s: float) -> Acknowledgement | None:
    """Send a command to the training that ``sender`` names; returns its answer, ``None`` if none came in time.

    The command runs out when the waiting does: what was given up on is not applied later.

    Raises
    ------
    BusError
        The broker cannot be reached.
    """
    now = datetime.now(UTC)
    order = Order(
        id=wire.fresh_id(), command=command, issuer=issuer, run=sender.run, job=sender.subject,
        issued=_text(now), deadline=_text(now + timedelta(seconds=wait_s)),
    )  # fmt: skip
    envelope = sender.envelope(
        ORDER_SCHEMA, wire.write_json(order), kind=order.kind, id=order.id, expires=order.deadline
    )
    async with _onlooker(bus, [ACKNOWLEDGEMENTS], "newest") as answers:
        await bus.publish(COMMANDS, [await sender.message(envelope)])
        # A little longer than the deadline: the refusal of a late command is an answer too.
        until = now + timedelta(seconds=wait_s + 2)
        while (left := (until - datetime.now(UTC)).total_seconds()) > 0:
            deliveries = await answers.receive(wait_s=min(left, 0.5))
            await answers.acknowledge(deliveries)
            for delivery in deliveries:
                told = answer_in(delivery, sender)
                if told is not None and told.id == order.id:
                    return told
    return None


def answer_in(delivery: Delivery, sender: Sender) -> Acknowledgement | None:
    """The acknowledgement in a message, if it is one; with a key only if it is signed."""
    try:
        envelope = wire.decode(delivery.value)
        if sender.keyring is not None and not sender.keyring.is_signed(envelope):
            return None
        told = decode_payload(envelope)
    except EnvelopeError:  # somebody else's, and no answer either way
        return None
    return told if isinstance(told, Acknowledgement) else None


async def held(bus: Bus, topic: Topic, most: int, *, wait_s: float = 0.5) -> list[Delivery]:
    """What a topic holds, oldest first; it stays there. ``wait_s`` without a message is the end.

    Raises
    ------
    BusError
        The broker cannot be reached.
    """
    found: list[Delivery] = []
    async with _onlooker(bus, [topic], "oldest") as subscription:
        while len(found) < most:
            deliveries = await subscription.receive(most=most - len(found), wait_s=wait_s)
            if not deliveries:
                return found
            found += deliveries  # not acknowledged: what every group is done with is let go of
    return found


@asynccontextmanager
async def _onlooker(bus: Bus, topics: Sequence[Topic], begin: Begin) -> AsyncGenerator[Subscription]:
    """A group of one's own, gone again afterwards: a group that stays would hold up what durable topics let go of."""
    group = f"onlooker-{secrets.token_hex(6)}"
    subscription = await bus.subscribe(
        topics, group=group, consumer="onlooker", begin=begin, redeliver_s=_NEVER_AGAIN_S
    )  # fmt: skip
    try:
        yield subscription
    finally:
        with contextlib.suppress(BusError):  # it is what failed
            await subscription.close()
            await bus.forget(topics, group)


def command_from(kind: str, fields: dict[str, object]) -> Command:
    """A command from its name on the wire and plain fields.

    Raises
    ------
    EnvelopeError
        No command has that name, or it has no such fields.
    """
    known = {str(each.__struct_config__.tag): each for each in Command.__args__}
    kind = kind.replace("-", "_")
    if kind not in known:
        raise EnvelopeError(f"no command is called {kind!r}; known: {', '.join(sorted(known))}")
    unknown = sorted(set(fields) - set(known[kind].__struct_fields__))
    if unknown:
        can = ", ".join(known[kind].__struct_fields__)
        raise EnvelopeError(f"{kind} has the fields {can}, got {', '.join(unknown)}; leave them out")
    try:
        return msgspec.convert({"type": kind, **fields}, Command)
    except msgspec.ValidationError as error:
        raise EnvelopeError(f"a {kind} must have its fields ({error})") from error


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
