"""Telemetry on its way out: offered by the training thread, sent by the courier, waiting on the disk in between.

::

    offer  ->  queue (bounded; the oldest goes first)  ->  bus
                 |                                          ^
                 +-- bus away: spool (health reports only) --+

What an outage has left on the disk is sent before what came after it, so health reports keep their order. Heartbeats
and observations are of no use later: they wait in memory, if at all, until they expire.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from esper.errors import CONTAINED, BusError, ConfigError, EnvelopeError, EsperError, StateError
from esper.oona import envelope as wire
from esper.oona.aside import within
from esper.oona.backoff import Backoff, CircuitBreaker
from esper.oona.bell import Bell
from esper.oona.bus import Bus, Message
from esper.oona.claims import MOST_BYTES
from esper.oona.envelope import Envelope
from esper.oona.patience import patience_for
from esper.oona.rate import TokenBucket
from esper.oona.sender import Sender
from esper.oona.spool import Losses, Spool, Spooled
from esper.oona.topics import HEALTH, Topic
from esper.oona.waiting import PRIORITIES, Offer, Waiting

_MOST_SPOOLED = MOST_BYTES + wire.MAX_HEADER_BYTES + 1
_SPOOLING = (HEALTH.name,)
_FLEETING = tuple(name for name in PRIORITIES if name not in _SPOOLING)


@dataclass(frozen=True, kw_only=True)
class PublisherLimits:
    """Bounds of a publisher.

    ``queue_...``: what waits in memory. ``batch_...``: what is sent at once. ``..._per_s``: telemetry at most, with
    bursts of two seconds' worth. ``patience_s``: how long a broker may take for a batch, beside a second for each MiB.
    """

    queue_offers: int = 10_000
    queue_bytes: int = 64 << 20
    batch_messages: int = 500
    batch_bytes: int = 4 << 20
    messages_per_s: float = 50_000.0
    bytes_per_s: float = 256e6
    patience_s: float = 10.0

    def __post_init__(self) -> None:
        wrong = [name for name in self.__dataclass_fields__ if not 0 < getattr(self, name) < float("inf")]
        if wrong:
            raise ConfigError(f"a publisher's bounds must be above 0, got {wrong[0]}={getattr(self, wrong[0])}")


@dataclass
class Turn:
    """What one round has done: whether there may be more at once, and seconds after which to look again."""

    more: bool = False
    wait_s: float = field(default=float("inf"))

    def after(self, seconds: float) -> None:
        self.wait_s = min(self.wait_s, seconds)


class TelemetryPublisher:
    """Sends what may be lost, without anybody waiting for it.

    :meth:`offer` may be called from any thread and takes microseconds; all else belongs to the courier.

    Parameters
    ----------
    make_spool:
        Opens the spool, in the courier's thread; ``None``: nothing waits on the disk.
    breaker, backoff:
        Shared with whoever else sends over this bus in this thread, or the publisher's own.
    clock:
        Unix time.
    """

    def __init__(
        self,
        bus: Bus,
        sender: Sender,
        *,
        make_spool: Callable[[], Spool] | None = None,
        limits: PublisherLimits | None = None,
        breaker: CircuitBreaker | None = None,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or PublisherLimits()
        self._bus, self._sender, self._make_spool, self._clock = bus, sender, make_spool, clock
        self._breaker = breaker or CircuitBreaker(clock=monotonic)
        self._backoff = backoff or Backoff()
        self._monotonic = monotonic
        self._not_before = 0.0
        self._spool: Spool | None = None
        self._waiting = Waiting(max_offers=self.limits.queue_offers, max_bytes=self.limits.queue_bytes, clock=clock)
        self._messages = TokenBucket(self.limits.messages_per_s, 2 * self.limits.messages_per_s, clock=monotonic)
        self._bytes = TokenBucket(self.limits.bytes_per_s, 2 * self.limits.bytes_per_s, clock=monotonic)
        self._bell = Bell()

    # ---------------------------------------------------------------------------------------------- any thread

    def offer(
        self,
        topic: Topic,
        build: Callable[[Mapping[str, int]], Envelope],
        *,
        num_bytes: int,
        valid_s: float | None = None,
        supersedes: bool = False,
    ) -> bool:
        """Have a message sent; whether it waits now. Never blocks.

        Parameters
        ----------
        build:
            Makes the message later, in the courier's thread, from the publisher's counts at that time; what it reads
            must not change until then.
        num_bytes:
            About the size of the message; what counts for the queue's bound.
        valid_s:
            Seconds after which nobody wants it any more; ``None``: ever.
        supersedes:
            One of the topic that waits in memory and was offered so as well is dropped for this one.

        Raises
        ------
        BusError
            The topic's messages may not be lost; they have another way.
        """
        expires = 0.0 if valid_s is None else self._clock() + valid_s
        kept = self._waiting.offer(Offer(topic, num_bytes, build, expires, supersedes))
        self._bell.ring()
        return kept

    def counts(self) -> dict[str, int]:
        """What became of everything that was offered: ``offered + recovered = delivered + dropped + pending``."""
        return self._waiting.counts()

    # ---------------------------------------------------------------------------------------------- the courier's

    async def run(self, stop: asyncio.Event) -> None:
        """Send until ``stop`` is set and what could be sent is sent; the rest goes to the spool.

        After an error that is contained it may be run again, and goes on with what waits.
        """
        is_over = True
        last = asyncio.create_task(self._bell.ring_at(stop))
        try:
            while True:
                turn = await self.turn()
                if turn.more:
                    await asyncio.sleep(0)
                elif stop.is_set():
                    return
                else:
                    await self._bell.wait(turn.wait_s)
        except (EsperError, *CONTAINED):
            is_over = stop.is_set()
            raise
        finally:
            last.cancel()
            if is_over:
                self.close()

    async def turn(self) -> Turn:
        """Send one batch of what is fleeting and one of what can wait."""
        turn = Turn()
        if self._make_spool is not None:
            self._open_spool(self._make_spool)
        if self._may_send(turn):
            await self._send_queued(_FLEETING, turn)
        if self._spool is not None and self._spool.num_records:
            self._spool_queued(self._spool)  # behind what waits there already
            if self._may_send(turn):
                await self._send_spooled(self._spool, turn)
        elif self._may_send(turn):
            await self._send_queued(_SPOOLING, turn)
        elif self._spool is not None:
            self._spool_queued(self._spool)
        return turn

    def close(self) -> None:
        """What is left in memory goes to the disk, or is dropped and counted. Closing twice is harmless."""
        spool, self._spool, self._make_spool = self._spool, None, None
        if spool is not None:
            try:
                self._spool_queued(spool)
            finally:
                spool.close()
        self._waiting.give_up("closed")

    def _open_spool(self, make: Callable[[], Spool]) -> None:
        self._make_spool = None
        try:
            self._spool = make()
        except (OSError, StateError):
            self._waiting.note("spool_unusable")  # then there is none
            return
        losses = self._spool.take_losses()
        self._waiting.recovered(self._spool.num_records + losses.records.total())
        self._note(losses)

    def _may_send(self, turn: Turn) -> bool:
        limit_s = max(self._messages.wait_s, self._bytes.wait_s)
        away_s = max(self._not_before - self._monotonic(), self._breaker.wait_s)
        wait_s = max(limit_s, away_s)
        if wait_s <= 0:
            return True
        if self._waiting.num_queued or (self._spool is not None and self._spool.num_records):
            turn.after(wait_s)
        return False

    # ---------------------------------------------------------------------------------------------- queue

    async def _send_queued(self, topics: Sequence[str], turn: Turn) -> None:
        built = self._built(self._waiting.take(topics, self.limits.batch_messages, self.limits.batch_bytes))
        if not built:
            turn.more = turn.more or self._waiting.num_queued > 0
            return
        offers = [offer for offer, _ in built]
        try:
            fates = await self._published(offers[0].topic, [envelope for _, envelope in built])
        except BaseException:
            self._waiting.put_back(offers)
            raise
        if fates is not None:
            self._waiting.delivered([offer for offer, sent in zip(offers, fates, strict=True) if sent])
            self._waiting.dropped([offer for offer, sent in zip(offers, fates, strict=True) if not sent], "unsendable")
            turn.more = True
        elif self._spool is not None and topics == _SPOOLING:
            self._store(self._spool, built)
        else:
            self._waiting.put_back(offers)
        if fates is None:
            turn.after(max(0.0, self._not_before - self._monotonic(), self._breaker.wait_s))

    def _spool_queued(self, spool: Spool) -> None:
        while offers := self._waiting.take(_SPOOLING, self.limits.batch_messages, self.limits.batch_bytes):
            self._store(spool, self._built(offers))

    def _store(self, spool: Spool, built: Sequence[tuple[Offer, Envelope]]) -> None:
        for offer, envelope in built:
            key = f"{envelope.esperrun}/{envelope.subject}"
            value = wire.encode(envelope, max_bytes=_MOST_SPOOLED)
            spool.append(Spooled(offer.topic.name, key, offer.expires, value))
        losses = spool.take_losses()
        self._waiting.spooled([offer for offer, _ in built], losses.records)
        self._note(Losses(damaged_bytes=losses.damaged_bytes))

    def _built(self, offers: Sequence[Offer]) -> list[tuple[Offer, Envelope]]:
        built: list[tuple[Offer, Envelope]] = []
        for offer in offers:
            try:
                envelope = offer.build(self._waiting.counts())
                if len(envelope.data) > MOST_BYTES:
                    raise EnvelopeError(f"a message may stand for {MOST_BYTES} bytes, got {len(envelope.data)}")
                built.append((offer, envelope))
            except (EnvelopeError, ArithmeticError, LookupError, TypeError, ValueError):
                self._waiting.dropped([offer], "unsendable")
        return built

    # ---------------------------------------------------------------------------------------------- spool

    async def _send_spooled(self, spool: Spool, turn: Turn) -> None:
        records = spool.peek(self.limits.batch_messages, self.limits.batch_bytes)
        self._note(spool.take_losses())
        if not records:
            return
        now = self._clock()
        lost: Counter[str] = Counter()
        wanted: list[Envelope] = []
        for record in records:
            try:
                if 0 < record.expires < now:
                    lost["expired"] += 1
                else:
                    wanted.append(wire.decode(record.value, max_bytes=_MOST_SPOOLED))
            except EnvelopeError:
                lost["unsendable"] += 1
        fates = await self._published(HEALTH, wanted) if wanted else []
        if fates is None:
            turn.after(max(0.0, self._not_before - self._monotonic(), self._breaker.wait_s))
            return
        spool.done(len(records))
        lost["unsendable"] += fates.count(False)
        self._waiting.unspooled(fates.count(True), +lost)
        turn.more = True

    def _note(self, losses: Losses) -> None:
        self._waiting.unspooled(0, losses.records)
        if losses.damaged_bytes:
            self._waiting.note("spool_damaged_bytes", losses.damaged_bytes)

    # ---------------------------------------------------------------------------------------------- bus

    async def _published(self, topic: Topic, envelopes: Sequence[Envelope]) -> list[bool] | None:
        """For each whether the broker has taken it or it can never be sent; ``None`` where the broker is away."""
        if not self._breaker.allow():
            return None
        messages: list[Message] = []
        fates: list[bool] = []
        try:
            for envelope in envelopes:
                message = await self._message(envelope)
                fates.append(message is not None)
                messages += [] if message is None else [message]
            if messages:
                publish = self._bus.publish(topic, messages)
                limit_s = self.limits.patience_s + patience_for(sum(len(message.value) for message in messages))
                await within(limit_s, publish, f"the bus at {self._bus.address}")
        except BusError:
            self._breaker.failed()
            self._not_before = self._monotonic() + self._backoff.next_s()
            self._waiting.note("failures")
            return None
        self._breaker.succeeded()
        self._backoff.reset()
        self._not_before = 0.0
        self._messages.spend(len(messages))
        self._bytes.spend(sum(len(envelope.data) for envelope in envelopes))
        return fates

    async def _message(self, envelope: Envelope) -> Message | None:
        """``None`` for what can never be sent."""
        try:
            return await self._sender.message(envelope)
        except EnvelopeError:
            return None
