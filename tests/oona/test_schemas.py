"""Every schema reads what its writer writes; what is unknown is named, and dead letters come back as they were."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.karn.made import report
from tests.oona.test_health import a_snapshot
from tests.oona.test_observations import a_large_one, differences

from esper.errors import EnvelopeError
from esper.observe.event_log import encode_record
from esper.oona import dead_letters, observations, schemas
from esper.oona import envelope as wire
from esper.oona.bus import Delivery
from esper.oona.claims import ClaimReference
from esper.oona.envelope import CLAIM, Envelope
from esper.oona.memory import Hub, MemoryBus
from esper.oona.schemas import DeadLetter, Decision, Heartbeat, decode_payload
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.topics import DEAD_LETTERS
from esper.protocol import Acknowledgement, HeldOut, Order, Record, SetBudget, Stop

pytestmark = pytest.mark.unit

SENDER = Sender(source="esper/kasmina", run="digits-01", subject="grown-seed0", keyring=Keyring({"a": "k" * 32}))
RECORD = Record(v=1, seq=4, time=1.8e9, event=HeldOut(step=3, loss=float("nan"), params=1, flops=2.0))

PLAIN: dict[str, Any] = {
    schemas.ORDER_SCHEMA: Order(command=Stop(reason="enough"), id="7", run="digits-01"),
    schemas.ACKNOWLEDGEMENT_SCHEMA: Acknowledgement(id="7", outcome="refused", gate="budget", reason="no room"),
    schemas.DECISION_SCHEMA: Decision(step=3, observation="9", controller="ppo", commands=(SetBudget(params=9),)),
    schemas.HEARTBEAT_SCHEMA: Heartbeat(role="job", every_s=5.0, step=3, counts={"dropped": 1}),
    schemas.DEAD_LETTER_SCHEMA: DeadLetter(
        reason="r", topic="t", key="k", position="1", attempts=2, size=3, sha256="0", original=b"\xff\x00\n"
    ),
    schemas.FIELD_REPORT_SCHEMA: report(3, gain=None),
}


@pytest.mark.parametrize("schema", PLAIN)
def test_what_is_written_is_read(schema: str) -> None:
    envelope = SENDER.envelope(schema, wire.write_json(PLAIN[schema]))
    assert decode_payload(wire.decode(wire.encode(envelope))) == PLAIN[schema]


def test_events_go_as_they_are_in_the_log() -> None:
    line = encode_record(RECORD).rstrip()
    read = decode_payload(SENDER.envelope(schemas.EVENT_SCHEMA, line))
    assert repr(read) == repr(RECORD)
    assert wire.write_json(RECORD) == line


def test_arrays_go_as_arrays() -> None:
    sent = a_large_one(3)
    envelope = SENDER.envelope(schemas.OBSERVATION_SCHEMA, observations.encode(sent))
    assert differences(sent, decode_payload(envelope)) == []
    assert decode_payload(SENDER.envelope(schemas.HEALTH_SCHEMA, a_snapshot().pack())).head.step == 5


def test_fields_of_a_newer_sender_are_passed_over_and_kept() -> None:
    data = b'{"role":"job","every_s":1,"mood":"good"}'
    envelope = wire.decode(wire.encode(SENDER.envelope(schemas.HEARTBEAT_SCHEMA, data)))
    assert decode_payload(envelope) == Heartbeat(role="job", every_s=1.0)
    assert envelope.data == data


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataschema": "esper:recipe:1"}, "one of .*heartbeat.*got 'recipe'"),
        ({"dataschema": "esper:heartbeat:2"}, "version of 'heartbeat', got 2"),
        ({"dataschema": "esper:heartbeat:01"}, None),
        ({"dataschema": "http://x"}, "esper:NAME:VERSION"),
        ({"datacontenttype": "text/plain"}, "application/json"),
        ({"datacontenttype": CLAIM}, "what their schema says"),
        ({"data": b"{}"}, "missing required field"),
        ({"data": b"[" * 100}, "deep"),
        ({"data": b"\xff"}, "what their schema says"),
    ],
)
def test_each_refusal_states_the_rule(changes: dict[str, Any], says: str | None) -> None:
    envelope = SENDER.envelope(schemas.HEARTBEAT_SCHEMA, wire.write_json(PLAIN[schemas.HEARTBEAT_SCHEMA]))
    changed = msgspec.structs.replace(envelope, **changes)
    if says is None:  # 1 and 01 are one version
        assert decode_payload(changed) == PLAIN[schemas.HEARTBEAT_SCHEMA]
        return
    with pytest.raises(EnvelopeError, match=says):
        decode_payload(changed)


def test_claims_are_references_until_they_are_redeemed() -> None:
    claim = ClaimReference(
        sha256="a" * 64, size=9, expires="2026-01-01T00:00:00Z", media_type="application/vnd.safetensors"
    )
    envelope = SENDER.envelope(schemas.HEALTH_SCHEMA, wire.write_json(claim))
    assert decode_payload(msgspec.structs.replace(envelope, datacontenttype=CLAIM)) == claim


# ----------------------------------------------------------------------------------------------------------------------
# Dead letters


def buried(*deliveries: Delivery, reason: str = "why") -> list[Delivery]:
    async def bury_and_read() -> list[Delivery]:
        bus = MemoryBus(hub=Hub())
        readers = await bus.subscribe([DEAD_LETTERS], group="people", consumer="one")
        for delivery in deliveries:
            await dead_letters.bury(bus, SENDER, delivery, reason)
        return await readers.receive(wait_s=0.0)

    return asyncio.run(bury_and_read())


def test_a_dead_letter_holds_everything_about_a_message() -> None:
    sent = Delivery(topic="kasmina.control.commands", key="k", value=b"\xffrubbish", position="17-0", attempts=3)
    (found,) = buried(sent)
    letter = dead_letters.read_letter(found)
    assert (letter.topic, letter.key, letter.position, letter.attempts) == (sent.topic, "k", "17-0", 3)
    assert (letter.reason, letter.original, letter.size) == ("why", sent.value, 8)
    message = dead_letters.revived(letter)
    assert (message.key, message.value) == ("k", sent.value)
    assert SENDER.keyring is not None
    assert SENDER.keyring.is_signed(wire.decode(found.value))


def test_the_same_message_is_the_same_letter() -> None:
    sent = Delivery(topic="t", key="k", value=b"x", position="1")
    first, again = buried(sent, sent)
    assert wire.decode(first.value).id == wire.decode(again.value).id


def test_of_a_large_message_the_beginning_is_kept() -> None:
    sent = Delivery(topic="t", key="k", value=bytes(2 << 20), position="1")
    letter = dead_letters.read_letter(buried(sent)[0])
    assert (len(letter.original), letter.size) == (256 << 10, 2 << 20)
    with pytest.raises(EnvelopeError, match="262144 of 2097152 bytes"):
        dead_letters.revived(letter)


def test_what_is_no_letter_is_refused() -> None:
    other = SENDER.envelope(schemas.HEARTBEAT_SCHEMA, wire.write_json(PLAIN[schemas.HEARTBEAT_SCHEMA]))
    for value in (b"rubbish", wire.encode(other)):
        with pytest.raises(EnvelopeError):
            dead_letters.read_letter(Delivery(topic="t", key="k", value=value, position="1"))


@settings(max_examples=300)
@given(st.binary(max_size=300), st.text(max_size=20), st.text(max_size=20))
def test_whatever_arrives_can_be_buried(value: bytes, key: str, reason: str) -> None:
    (found,) = buried(Delivery(topic="t", key=key + "\ud800", value=value, position="1"), reason=reason + "\udfff")
    assert dead_letters.read_letter(found).original == value


def _all_messages() -> list[bytes]:
    payloads = [SENDER.envelope(schema, wire.write_json(value)) for schema, value in PLAIN.items()]
    payloads += [SENDER.envelope(schemas.EVENT_SCHEMA, encode_record(RECORD).rstrip())]
    payloads += [SENDER.envelope(schemas.OBSERVATION_SCHEMA, observations.encode(a_large_one(2)))]
    payloads += [SENDER.envelope(schemas.HEALTH_SCHEMA, a_snapshot().pack())]
    return [wire.encode(payload) for payload in payloads]


_EDIT = st.tuples(st.integers(0, 1 << 16), st.binary(max_size=4))


@settings(max_examples=500)
@given(
    st.sampled_from(_all_messages()), st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(max_size=4)), max_size=4)
)
def test_fuzzed_messages_are_read_or_refused(value: bytes, edits: list[tuple[int, bytes]]) -> None:
    changed = bytearray(value)
    for place, data in edits:
        at = place % len(changed)
        changed[at : at + len(data)] = data
    try:
        envelope = wire.decode(bytes(changed))
        assert isinstance(envelope, Envelope)
        decode_payload(envelope)
    except EnvelopeError as error:
        assert str(error)
