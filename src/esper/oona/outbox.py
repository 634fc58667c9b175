"""What must not be lost on its way out: read from the run's own logs, sent, and only then done with.

A crash between the broker's answer and the cursor sends a line again. Its message has the same id then, by which
receivers tell. Nothing is kept in memory but one batch, and nothing is ever dropped: while the broker is away the log
simply grows, and :meth:`Outbox.behind` says by how much.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from esper.errors import BusError, EnvelopeError
from esper.oona import envelope as wire
from esper.oona.aside import aside, within
from esper.oona.backoff import Backoff, CircuitBreaker
from esper.oona.bell import Bell
from esper.oona.bus import Bus, Delivery, Message
from esper.oona.dead_letters import bury, dead_letter
from esper.oona.envelope import Envelope
from esper.oona.follower import Follower, Line
from esper.oona.schemas import DEAD_LETTER_SCHEMA, EVENT_SCHEMA
from esper.oona.sender import Sender
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, DEAD_LETTERS, EPOCHS, LIFECYCLE, Topic
from esper.protocol import ACKNOWLEDGEMENT_SCHEMA

_CURVES = {"train_loss", "held_out", "overhead", "telemetry"}
_BATCH_LINES = 500
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a line of a log becomes, or a part of it."""

    topic: Topic
    schema: str
    kind: str | None
    subject: str
    data: bytes
    sequence: int | None = None
    time: str | None = None


Classify = Callable[[bytes], Sequence[Draft]]
"""What a line becomes; nothing: it is not to be sent. Raises ``EnvelopeError`` for a line that it cannot read."""


class _Event(msgspec.Struct):
    type: str
    arm: str = "grown"
    seed: int = 0


class _Record(msgspec.Struct):
    """Only what says where an event goes."""

    v: int
    seq: int
    time: float
    event: _Event


_RECORDS = msgspec.json.Decoder(_Record)


def event(line: bytes) -> list[Draft]:
    """A line of ``events.jsonl``: curves go to the epochs, all else to the lifecycle."""
    try:
        record = _RECORDS.decode(line)
        written = wire.timestamp(record.time)
    except (msgspec.MsgspecError, ValueError, OverflowError, OSError, RecursionError) as error:
        raise EnvelopeError(f"a line of an event log must be an event ({error})") from error
    told = record.event
    draft = Draft(
        topic=EPOCHS if told.type in _CURVES else LIFECYCLE,
        schema=EVENT_SCHEMA.rpartition(":")[0] + f":{record.v}",
        kind=told.type,
        subject=f"{told.arm}-seed{told.seed}",
        data=line,
        sequence=record.seq,
        time=written,
    )
    return [draft]


def acknowledgement(line: bytes) -> list[Draft]:
    """A line of ``commands.jsonl``, which holds one entry or several: answers are acknowledgements, orders are not
    sent, those that were given up are dead letters."""
    command: Any = wire.read_json(line, dict[str, Any]).get("command")
    several = cast("list[Any]", command) if isinstance(command, list) else [command]
    drafts: list[Draft] = []
    for entry in several:
        named = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
        if not str(named.get("id", "")).startswith("answer/"):
            continue
        try:
            drafts += _answered(cast("dict[str, Any]", named["payload"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise EnvelopeError(f"an answer must hold an acknowledgement ({type(error).__name__}: {error})") from error
    return drafts


def _answered(payload: dict[str, Any]) -> list[Draft]:
    told, order = payload["acknowledgement"], payload.get("order")
    job = str(told["job"])
    answer = Draft(
        topic=ACKNOWLEDGEMENTS, schema=ACKNOWLEDGEMENT_SCHEMA, kind=str(told["outcome"]), subject=job,
        data=wire.write_json(told),
    )  # fmt: skip
    if order is None:
        return [answer]
    place = Delivery(
        topic=COMMANDS.name, key=f"{told['run']}/{job}", value=wire.write_json(order), position=str(told["id"])
    )
    letter = wire.write_json(dead_letter(place, str(told["reason"])))
    return [answer, Draft(topic=DEAD_LETTERS, schema=DEAD_LETTER_SCHEMA, kind=None, subject=job, data=letter)]


class Outbox:
    """Sends one log.

    Parameters
    ----------
    follower:
        Reads it.
    classify:
        :func:`event` or :func:`acknowledgement`.
    breaker, backoff:
        Shared with whoever else sends over this bus in this thread, or the outbox's own.
    poll_s:
        How often to look into the log where nobody calls :meth:`nudge`.
    linger_s:
        How long to wait after a nudge for what comes with it: one decision tells several events.
    save_every_s:
        How much may be sent again after a crash.
    patience_s:
        How long a broker may take for a batch.
    """

    def __init__(
        self,
        bus: Bus,
        sender: Sender,
        follower: Follower,
        classify: Classify,
        *,
        breaker: CircuitBreaker | None = None,
        backoff: Backoff | None = None,
        poll_s: float = 1.0,
        linger_s: float = 0.005,
        save_every_s: float = 1.0,
        patience_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus, self._sender, self._follower, self._classify = bus, sender, follower, classify
        self._breaker, self._backoff = breaker or CircuitBreaker(clock=clock), backoff or Backoff()
        self._poll_s, self._linger_s = poll_s, linger_s
        self._save_every_s, self._patience_s = save_every_s, patience_s
        self._clock = clock
        self._saved_at = clock()
        self._level_at = clock()
        """When nothing was left to send, last."""
        self._bell = Bell()
        self._not_before = 0.0
        self._counts = {"sent": 0, "skipped": 0, "buried": 0, "failures": 0, "save_failures": 0}

    # ---------------------------------------------------------------------------------------------- any thread

    def nudge(self) -> None:
        """There is something new in the log."""
        self._bell.ring()

    def behind(self) -> tuple[int, float]:
        """Bytes of the log that were not sent, and seconds since all was: at least as long as the oldest waits."""
        left = self._follower.num_bytes_left
        return left, self._clock() - self._level_at if left else 0.0

    def counts(self) -> dict[str, int]:
        """Messages ``sent`` (some of them perhaps twice), lines ``skipped``, lines ``buried`` because they could not be
        read, ``failures`` of the broker and of the disk, times the log was ``rewritten``."""
        return {**self._counts, "rewritten": self._follower.rewrites}

    # ---------------------------------------------------------------------------------------------- the courier's

    async def run(self, stop: asyncio.Event) -> None:
        """Send until ``stop`` is set and the broker has all of the log, or does not answer."""
        last = asyncio.create_task(self._bell.ring_at(stop))
        try:
            while True:
                wait_s = await self.turn()
                if wait_s is None:
                    await asyncio.sleep(0)
                elif stop.is_set():
                    return
                else:
                    await self._bell.wait(wait_s)
                    await asyncio.sleep(self._linger_s)
        finally:
            last.cancel()
            await self._save()

    async def turn(self) -> float | None:
        """Send one batch. Seconds after which to look again; ``None``: there is more at once."""
        away_s = max(self._not_before - self._clock(), self._breaker.wait_s)
        if away_s > 0:
            return away_s
        try:
            lines = self._follower.read(_BATCH_LINES, _BATCH_BYTES)
            if lines and not self._breaker.allow():
                return max(self._breaker.wait_s, 0.01)
            if lines:
                await self._send(lines)
                self._breaker.succeeded()
        except (BusError, OSError) as error:
            if isinstance(error, BusError):
                self._breaker.failed()
            return self._failed()
        if lines:
            self._backoff.reset()
            self._follower.advance(lines[-1])
        if self._clock() - self._saved_at >= self._save_every_s:
            await self._save()
        if lines and self._follower.num_bytes_left:
            return None
        self._level_at = self._clock()
        return self._poll_s

    def _failed(self) -> float:
        """Seconds until the next attempt."""
        self._counts["failures"] += 1
        wait_s = self._backoff.next_s()
        self._not_before = self._clock() + wait_s
        return max(wait_s, self._breaker.wait_s)

    async def _send(self, lines: list[Line]) -> None:
        batches: dict[str, tuple[Topic, list[Message]]] = {}
        for line in lines:
            try:
                drafts = self._classify(line.data)
                self._counts["skipped"] += not drafts
                for number, draft in enumerate(drafts):
                    message = await self._sender.message(self._envelope(line, draft, number))
                    batches.setdefault(draft.topic.name, (draft.topic, []))[1].append(message)
            except EnvelopeError as error:
                await self._bury(line, str(error))
        for topic, messages in batches.values():
            await within(self._patience_s, self._bus.publish(topic, messages), f"the bus at {self._bus.address}")
            self._counts["sent"] += len(messages)

    def _envelope(self, line: Line, draft: Draft, number: int) -> Envelope:
        sequence = {} if draft.sequence is None else {"sequence": str(draft.sequence)}
        rewrites = {} if self._follower.rewrites == 0 else {"esperrewrites": str(self._follower.rewrites)}
        return self._sender.envelope(
            draft.schema, draft.data, kind=draft.kind, subject=draft.subject, time=draft.time,
            id=self._id(line, number), extensions={**sequence, **rewrites},
        )  # fmt: skip

    def _id(self, line: Line, number: int) -> str:
        """The same for the same part of the same line at the same place of the same run, whenever it is sent."""
        part = f"{number}\0" if number else ""
        place = f"{self._sender.run}\0{self._follower.path.name}\0{line.start}\0{part}".encode()
        return hashlib.sha256(place + line.data).hexdigest()[:32]

    async def _bury(self, line: Line, reason: str) -> None:
        """A line that nobody can read, or that is too long for the bus: said, not passed over."""
        place = Delivery(
            topic=self._follower.path.name, key=f"{self._sender.run}/{self._sender.subject}", value=line.data,
            position=str(line.start),
        )  # fmt: skip
        await within(self._patience_s, bury(self._bus, self._sender, place, reason), f"the bus at {self._bus.address}")
        self._counts["buried"] += 1

    async def _save(self) -> None:
        self._saved_at = self._clock()
        try:
            await aside(self._follower.save)
        except OSError:
            self._counts["save_failures"] += 1
