"""What could not be understood is kept with the reason, so that a person can look at it and send it again."""

from __future__ import annotations

import hashlib

from esper.errors import EnvelopeError
from esper.oona import envelope as wire
from esper.oona.bus import Bus, Delivery, Message
from esper.oona.schemas import DEAD_LETTER_SCHEMA, DeadLetter, decode_payload
from esper.oona.sender import Sender
from esper.oona.topics import DEAD_LETTERS

MOST_ORIGINAL_BYTES = 256 << 10
"""More of an original is not kept; its size and hash are."""
_MOST_REASON_CHARS = 1000


async def bury(bus: Bus, sender: Sender, delivery: Delivery, reason: str) -> None:
    """Send a message to the dead letters; acknowledge it after that. Sent twice it is the same letter.

    Raises
    ------
    BusError
        The broker did not take it: do not acknowledge the message.
    """
    letter = dead_letter(delivery, reason)
    identity = f"{letter.topic}\0{letter.position}\0{letter.sha256}"
    envelope = sender.envelope(
        DEAD_LETTER_SCHEMA, wire.write_json(letter), id=hashlib.sha256(identity.encode()).hexdigest()[:32]
    )
    await bus.publish(DEAD_LETTERS, [await sender.message(envelope)])


def dead_letter(delivery: Delivery, reason: str) -> DeadLetter:
    """The letter about a message."""
    return DeadLetter(
        # a reason may quote what no encoding takes (half of a surrogate pair)
        reason=_printable(reason[:_MOST_REASON_CHARS]), topic=delivery.topic, key=_printable(delivery.key[:1000]),
        position=delivery.position, attempts=delivery.attempts, size=len(delivery.value),
        sha256=hashlib.sha256(delivery.value).hexdigest(), original=delivery.value[:MOST_ORIGINAL_BYTES],
    )  # fmt: skip


def read_letter(delivery: Delivery) -> DeadLetter:
    """The letter that a message of the dead letters' topic holds.

    Raises
    ------
    EnvelopeError
        It is none; whatever it is, it is not buried again.
    """
    letter = decode_payload(wire.decode(delivery.value))
    if not isinstance(letter, DeadLetter):
        raise EnvelopeError(f"the dead letters hold dead letters, got {type(letter).__name__}")
    return letter


def revived(letter: DeadLetter) -> Message:
    """The original message, to be sent to its topic again.

    Raises
    ------
    EnvelopeError
        Only its beginning was kept.
    """
    if hashlib.sha256(letter.original).hexdigest() != letter.sha256:
        raise EnvelopeError(
            f"a letter can be sent again if all of it was kept, got {len(letter.original)} of {letter.size} bytes"
        )
    return Message(letter.key, letter.original)


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
