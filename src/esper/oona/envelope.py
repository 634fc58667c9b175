"""What is on the wire: a header of CloudEvents attributes as JSON, a newline, the data as it is.

Nothing is decoded before its size and depth are known. Attributes that this version does not know are kept.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from esper.errors import EnvelopeError, StateError
from esper.observe.event_log import plain
from esper.safety import bounded_json

SPEC_VERSION = "1.0"
JSON = "application/json"
ARRAYS = "application/vnd.safetensors"
CLAIM = "application/vnd.esper.claim+json"
"""The data are elsewhere (``claims``); this says which they are."""

MAX_HEADER_BYTES = 16 << 10
MAX_MESSAGE_BYTES = 2 << 20
MAX_DEPTH = 16
MAX_VALUES = 200_000


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """One message.

    Attributes have their CloudEvents names; ``esper...`` are extensions. ``time`` and ``esperexpires`` are RFC 3339 in
    UTC; ``dataschema`` is ``esper:NAME:VERSION``; ``esperrun`` is the run, ``subject`` the job in it.
    """

    id: str
    source: str
    type: str
    dataschema: str
    time: str
    specversion: str = SPEC_VERSION
    subject: str = ""
    datacontenttype: str = JSON
    esperrun: str = ""
    traceparent: str | None = None
    esperexpires: str | None = None
    esperkeyid: str | None = None
    espersignature: str | None = None
    extensions: dict[str, Any] = {}
    """Attributes of a newer sender."""
    data: bytes = b""

    @property
    def schema(self) -> tuple[str, int]:
        """Name and version of the data's schema.

        Raises
        ------
        EnvelopeError
            ``dataschema`` has another form.
        """
        parts = self.dataschema.split(":")
        if len(parts) != 3 or parts[0] != "esper" or not parts[2].isdecimal() or len(parts[2]) > 6:
            raise EnvelopeError(f"dataschema must be esper:NAME:VERSION, got {self.dataschema[:80]!r}")
        return parts[1], int(parts[2])

    def header(self) -> dict[str, Any]:
        """The attributes that are set, known ones first."""
        named = {name: getattr(self, name) for name in _NAMES}
        return {**{k: v for k, v in named.items() if v is not None}, **self.extensions}


_NAMES = tuple(name for name in Envelope.__struct_fields__ if name not in ("extensions", "data"))
_ENCODER = msgspec.json.Encoder()


def now() -> str:
    """The time as an envelope has it."""
    return timestamp(time.time())


def timestamp(unix_s: float) -> str:
    """A unix time as an envelope has it."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def fresh_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_hex(16)


def seconds(text: str) -> float:
    """Unix time of what :func:`timestamp` writes.

    Raises
    ------
    EnvelopeError
        It is no RFC 3339 time with a zone.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise EnvelopeError(f"a time must be RFC 3339 with its zone, got {text[:40]!r}")
    return moment.timestamp()


def encode(envelope: Envelope, *, max_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """The message as bytes.

    Raises
    ------
    EnvelopeError
        It is larger than a message may be, or an attribute has no form in JSON.
    """
    try:
        head = _ENCODER.encode(envelope.header())
    except (TypeError, ValueError, OverflowError) as error:  # ValueError: half of a surrogate pair, for one
        raise EnvelopeError(f"an envelope's attributes must have a form in JSON ({error})") from error
    value = b"\n".join((head, envelope.data))
    if len(value) > max_bytes:
        raise EnvelopeError(f"a message may have {max_bytes} bytes, got {len(value)}; send a claim instead")
    return value


def num_bytes(envelope: Envelope) -> int:
    """The size of :func:`encode`'s message, without making it.

    Raises
    ------
    EnvelopeError
        An attribute has no form in JSON.
    """
    return len(encode(msgspec.structs.replace(envelope, data=b""))) + len(envelope.data)


def decode(value: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Envelope:
    """The message that ``value`` holds. Its data are not looked at.

    Raises
    ------
    EnvelopeError
        It is no envelope, too large or too deep, or of another version of CloudEvents.
    """
    if len(value) > max_bytes:
        raise EnvelopeError(f"a message may have {max_bytes} bytes, got {len(value)}")
    head, newline, data = value.partition(b"\n")
    if not newline:
        raise EnvelopeError("an envelope is a header, a newline and data, got no newline")
    try:
        fields = bounded_json.decode(head, max_bytes=MAX_HEADER_BYTES, max_depth=2, max_values=128)
    except StateError as error:
        raise EnvelopeError(f"an envelope's header must be readable ({error})") from error
    if not isinstance(fields, dict):
        raise EnvelopeError("an envelope's header must be an object")
    named = cast("dict[str, Any]", fields)
    if named.get("specversion") != SPEC_VERSION:
        raise EnvelopeError(f"specversion must be {SPEC_VERSION}, got {str(named.get('specversion'))[:40]!r}")
    extensions = {name: value for name, value in named.items() if name not in _NAMES}
    known = {name: value for name, value in named.items() if name in _NAMES}
    try:
        return msgspec.convert({**known, "extensions": extensions, "data": data}, Envelope)
    except (msgspec.ValidationError, RecursionError) as error:
        raise EnvelopeError(f"an envelope's attributes must fit ({error})") from error


def read_json(data: bytes, kind: Any) -> Any:
    """Data of type ``application/json`` as ``kind``; fields that it does not know are passed over.

    Raises
    ------
    EnvelopeError
        They are not of that kind, too large or too deep.
    """
    try:
        bounded_json.check(data, max_bytes=MAX_MESSAGE_BYTES, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
        return msgspec.json.decode(data, type=kind, strict=False)
    except (StateError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EnvelopeError(f"data must be what their schema says ({error})") from error


def write_json(value: Any) -> bytes:
    """``value`` as data of type ``application/json``; NaN and infinities as text, which :func:`read_json` understands.

    Raises
    ------
    EnvelopeError
        Something in it has no JSON form.
    """
    try:
        return _ENCODER.encode(plain(value))
    except (TypeError, ValueError, OverflowError) as error:
        raise EnvelopeError(f"data must have a form in JSON ({error}); use str, int, float or bool") from error


def describe(value: bytes) -> str:
    """A message for people: one line of JSON, whatever it is."""
    try:
        envelope = decode(value)
    except EnvelopeError as error:
        return json.dumps({"unreadable": str(error), "bytes": len(value)})
    data: Any = f"{len(envelope.data)} bytes"
    if envelope.datacontenttype in (JSON, CLAIM):
        try:
            data = read_json(envelope.data, Any)
        except EnvelopeError as error:
            data = {"unreadable": str(error), "bytes": len(envelope.data)}
    return json.dumps({**envelope.header(), "data": data})
