"""Every schema by name and version: what a message's data become.

What this Esper does not know, by name or by version, is for the dead letters. Fields that it does not know are passed
over; the envelope keeps the data as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from esper.errors import EnvelopeError, StateError
from esper.karn import FieldReport
from esper.karn.report import REPORT_VERSION, check_report
from esper.oona import envelope as wire
from esper.oona import health, observations
from esper.oona.claims import reference_in
from esper.oona.envelope import ARRAYS, CLAIM, JSON, Envelope
from esper.protocol import ACKNOWLEDGEMENT_SCHEMA, ORDER_SCHEMA, Acknowledgement, Command, Order, Record

EVENT_SCHEMA = "esper:event:1"
OBSERVATION_SCHEMA = "esper:observation:1"
DECISION_SCHEMA = "esper:decision:1"
HEALTH_SCHEMA = "esper:health:1"
HEARTBEAT_SCHEMA = "esper:heartbeat:1"
DEAD_LETTER_SCHEMA = "esper:dead-letter:1"
FIELD_REPORT_SCHEMA = f"esper:field-report:{REPORT_VERSION}"


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller has decided, and on what. ``observation`` is the id of the message it has looked at."""

    step: int
    observation: str
    controller: str
    commands: tuple[Command, ...] = ()
    reason: str = ""


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody is there: a job or a controller. ``counts`` are what its publisher has sent and dropped.

    ``name`` is one controller's own, ``trainings`` (``RUN/JOB``) are those that it steers: a part of them where there
    are very many, another part each time.
    """

    role: str
    every_s: float
    """When the next one is due."""
    step: int | None = None
    state: str = ""
    counts: dict[str, int] = {}
    name: str = ""
    trainings: tuple[str, ...] = ()


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that could not be understood, and why. ``original`` may be its beginning only."""

    reason: str
    topic: str
    key: str
    position: str
    attempts: int
    size: int
    sha256: str
    original: bytes
    """Base64 in JSON."""


def _json(kind: Any) -> Callable[[bytes], Any]:
    return lambda data: wire.read_json(data, kind)


def _field_report(data: bytes) -> FieldReport:
    report: FieldReport = wire.read_json(data, FieldReport)
    try:
        check_report(report)
    except StateError as error:
        raise EnvelopeError(f"a field report must be of use ({error})") from error
    return report


_READERS: dict[str, tuple[str, Callable[[bytes], Any]]] = {
    EVENT_SCHEMA: (JSON, _json(Record)),
    ORDER_SCHEMA: (JSON, _json(Order)),
    ACKNOWLEDGEMENT_SCHEMA: (JSON, _json(Acknowledgement)),
    DECISION_SCHEMA: (JSON, _json(Decision)),
    HEARTBEAT_SCHEMA: (JSON, _json(Heartbeat)),
    DEAD_LETTER_SCHEMA: (JSON, _json(DeadLetter)),
    FIELD_REPORT_SCHEMA: (JSON, _field_report),
    OBSERVATION_SCHEMA: (ARRAYS, observations.decode),
    HEALTH_SCHEMA: (ARRAYS, health.decode),
}
"""Content type and reader of each."""
_NAMES = {schema.split(":")[1] for schema in _READERS}


def decode_payload(envelope: Envelope) -> Any:
    """What the data say: an instance of the schema's type, or a ``ClaimReference`` where they are elsewhere.

    Raises
    ------
    EnvelopeError
        The schema's name or version is unknown, or the data are not what it says.
    """
    name, version = envelope.schema
    if name not in _NAMES:
        raise EnvelopeError(f"a schema must be one of {', '.join(sorted(_NAMES))}, got {name[:80]!r}")
    known = _READERS.get(f"esper:{name}:{version}")
    if known is None:
        raise EnvelopeError(f"this Esper must know the version of {name!r}, got {version}; update esper-morph")
    content_type, read = known
    if envelope.datacontenttype == CLAIM:
        return reference_in(envelope)
    if envelope.datacontenttype != content_type:
        got = envelope.datacontenttype[:80]
        raise EnvelopeError(f"data of {name!r} must be {content_type}, got {got!r}")
    return read(envelope.data)
