"""How orders and what became of them stand in the command log.

::

    order/ID    {"order": ..., "turn": n}                 on the disk before the order is applied
    answer/ID   {"acknowledgement": ..., "content": ...}  on the disk before the acknowledgement is sent

An order that was turned away (expired, no room) has an answer only. The answer to one that was given up holds the order
too. Whoever sends acknowledgements follows the answers. Attempts (:mod:`esper.oona.attempts`) stand there as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from esper.errors import StateError
from esper.protocol import Acknowledgement, Order, Outcome, Snapshot
from esper.safety.command_log import Entry

SNAPSHOT = str(Snapshot.__struct_config__.tag)
JOURNAL = "journal"
"""The gate of the one refusal that a death may forget: the log did not take the order."""
POISON = "poison"
"""The gate of an order that was given up: the process ended whenever it was applied."""
_ORDER, _ANSWER, _ATTEMPT = "order/", "answer/", "attempt/"


@dataclass(frozen=True)
class Intent:
    """An order that is applied in the ``turn``-th real step of the run's whole life, those taken back counted too."""

    order: Order
    turn: int


@dataclass(frozen=True)
class Answer:
    """What became of an order; ``content`` says which command the id stands for (:func:`content_of`).

    ``order`` is set where it was given up, for the dead letters.
    """

    acknowledgement: Acknowledgement
    content: str
    order: Order | None = None


@dataclass(frozen=True)
class Attempt:
    """An order that no life has lived to answer is applied again, for the ``number``-th time; with ``is_over`` it was,
    and the process is still there."""

    order_id: str
    number: int
    is_over: bool = False


class Kept(msgspec.Struct):
    """What a checkpoint holds beside the log's position."""

    answers: list[Answer]
    held: list[Answer]
    ready: list[Order]
    replay: list[Intent]


def intent_entry(intent: Intent, step: int) -> Entry:
    """An order as it stands in the log."""
    payload = {"order": _plain(intent.order), "turn": intent.turn}
    return Entry(id=_ORDER + intent.order.id, step=step, payload=payload)


def answer_entry(answer: Answer) -> Entry:
    """An answer as it stands in the log."""
    told = answer.acknowledgement
    payload = {"acknowledgement": _plain(told), "content": answer.content}
    if answer.order is not None:
        payload["order"] = _plain(answer.order)
    return Entry(id=_ANSWER + told.id, step=told.step, payload=payload)


def attempt_entry(attempt: Attempt, step: int) -> Entry:
    """An attempt as it stands in the log."""
    state = "over" if attempt.is_over else "begun"
    payload = {"order": attempt.order_id, "number": attempt.number, "over": attempt.is_over}
    return Entry(id=f"{_ATTEMPT}{attempt.number}/{state}/{attempt.order_id}", step=step, payload=payload)


def is_order(entry_id: str) -> bool:
    """Whether an entry is an order's, not an answer's."""
    return entry_id.startswith(_ORDER)


def read_entry(entry: Entry) -> Intent | Answer | Attempt:
    """What an entry of the log says.

    Raises
    ------
    StateError
        It is neither an order nor an answer, nor an attempt at an order.
    """
    payload = cast("dict[str, Any]", entry.payload) if isinstance(entry.payload, dict) else {}
    try:
        if entry.id.startswith(_ORDER):
            order = msgspec.convert(payload["order"], Order)
            if entry.id == _ORDER + order.id:
                return Intent(order, msgspec.convert(payload["turn"], int))
        elif entry.id.startswith(_ANSWER):
            told = msgspec.convert(payload["acknowledgement"], Acknowledgement)
            if entry.id == _ANSWER + told.id:
                order = msgspec.convert(payload.get("order"), Order | None)
                return Answer(told, msgspec.convert(payload["content"], str), order)
        elif entry.id.startswith(_ATTEMPT):
            values = (payload["order"], payload["number"], payload["over"])
            attempt = Attempt(*msgspec.convert(values, tuple[str, int, bool]))
            if entry.id == attempt_entry(attempt, 0).id:
                return attempt
    except (KeyError, msgspec.ValidationError) as error:
        raise StateError(
            f"a log of orders holds orders and answers, got another entry {entry.id!r} ({error})"
        ) from error
    raise StateError(f"a log of orders holds orders and answers, got another entry {entry.id!r}; it is another log")


def content_of(order: Order) -> str:
    """What an id stands for: the command, its issuer and whom it is for. Sent again, it may have other times."""
    what = msgspec.json.encode((order.command, order.issuer, order.run, order.job), order="sorted")
    return hashlib.sha256(what).hexdigest()[:32]


def acknowledge(order: Order, outcome: Outcome, gate: str, reason: str, step: int) -> Acknowledgement:
    """What became of an order."""
    return Acknowledgement(
        id=order.id, outcome=outcome, issuer=order.issuer, run=order.run, job=order.job, kind=order.kind, gate=gate,
        reason=reason, step=step,
    )  # fmt: skip


def refused(answer: Answer, reason: str) -> Answer:
    """The answer to a request for a checkpoint that could not be written."""
    told = msgspec.structs.replace(answer.acknowledgement, outcome="refused", gate="snapshot", reason=reason)
    return Answer(told, answer.content)


def _plain(value: Any) -> Any:
    """As it is read again: lists, not tuples."""
    return msgspec.json.decode(msgspec.json.encode(value))
