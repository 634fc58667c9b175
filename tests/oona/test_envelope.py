"""The wire format: what is written is read, what is unknown is kept, what is hostile is refused in bounded time."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import EnvelopeError
from esper.oona import envelope as wire
from esper.oona.envelope import Envelope

pytestmark = pytest.mark.unit


def an_envelope(**changes: object) -> Envelope:
    plain = Envelope(
        id="1", source="esper/kasmina", type="esper.command", dataschema="esper:command:1", time=wire.now(),
        subject="grown-seed0", esperrun="digits-01", data=b'{"a": 1}',
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


@given(st.binary(max_size=300), st.text(max_size=30), st.dictionaries(st.text("xyz", min_size=4), st.text(max_size=9)))
def test_what_is_written_is_read(data: bytes, subject: str, extensions: dict[str, str]) -> None:
    sent = an_envelope(data=data, subject=subject, extensions=extensions, traceparent=None)
    assert wire.decode(wire.encode(sent)) == sent


def test_attributes_of_a_newer_sender_are_kept() -> None:
    head, _, data = wire.encode(an_envelope()).partition(b"\n")
    newer = head[:-1] + b',"partitionkey":"7"}\n' + data
    read = wire.decode(newer)
    assert read.extensions == {"partitionkey": "7"}
    assert wire.decode(wire.encode(read)) == read


@given(st.binary(max_size=400))
def test_rubbish_is_refused_or_read_and_nothing_else(value: bytes) -> None:
    try:
        assert isinstance(wire.decode(value), Envelope)
    except EnvelopeError as error:
        assert str(error)
    assert wire.describe(value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (b"", "no newline"),
        (b"[]\n", "must be an object"),
        (b"{}\n", "specversion must be 1.0"),
        (b'{"specversion":"0.3"}\n', "got '0.3'"),
        (b'{"specversion":"1.0","id":7}\n', "Expected `str`"),
        (b'{"a":' + b"[" * 50 + b"]" * 50 + b"}\n", "deep"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}\n", "128 values"),
        (b'{"a":"' + b"x" * (17 << 10) + b'"}\n', "at most"),
        (b"x" * ((2 << 20) + 1), "2097152 bytes"),
    ],
)
def test_each_refusal_states_the_rule(value: bytes, says: str) -> None:
    started = time.process_time()
    with pytest.raises(EnvelopeError, match=says):
        wire.decode(value)
    assert time.process_time() - started < 1


def test_deep_data_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(EnvelopeError, match="16 deep"):
        wire.read_json(b"[" * 100_000 + b"]" * 100_000, list)


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(EnvelopeError, match="send a claim"):
        wire.encode(an_envelope(data=bytes(wire.MAX_MESSAGE_BYTES)))


@pytest.mark.parametrize(
    "schema", ["command", "esper:command", "esper:command:x", "other:command:1", "esper:a:9999999"]
)
def test_a_schema_has_a_name_and_a_version(schema: str) -> None:
    assert an_envelope().schema == ("command", 1)
    with pytest.raises(EnvelopeError, match="esper:NAME:VERSION"):
        _ = an_envelope(dataschema=schema).schema


def test_times_have_a_zone() -> None:
    assert abs(wire.seconds(wire.now()) - time.time()) < 5
    for wrong in ("yesterday", "2026-01-01T00:00:00", ""):
        with pytest.raises(EnvelopeError, match="RFC 3339"):
            wire.seconds(wrong)
