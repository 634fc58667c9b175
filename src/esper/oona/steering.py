"""A controller for any number of trainings: it answers their observations with orders.

::

    training --- observation ---> decide ---- orders -----> training
                                     '------- decision ---> whoever wants to know
             --- acknowledgement --> the next observation may be decided on

Each training has a controller of its own, made when its first observation comes. Nothing is decided for a training
whose last orders have neither been answered nor run out, so a slow bus cannot make it do something twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import msgspec

from esper.errors import CONTAINED, BusError, EnvelopeError, EsperError
from esper.oona import envelope as wire
from esper.oona.aside import within
from esper.oona.backoff import Backoff
from esper.oona.bus import Bus, Delivery, Message, Subscription
from esper.oona.claims import ClaimExpired, Claims
from esper.oona.dead_letters import bury
from esper.oona.ears import CONTROLLER, Rivals
from esper.oona.envelope import Envelope
from esper.oona.schemas import DECISION_SCHEMA, HEARTBEAT_SCHEMA, Decision, Heartbeat, decode_payload
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.steered import OBSERVATION_MAX_AGE_S, Training
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, DECISIONS, HEARTBEATS, OBSERVATIONS
from esper.protocol import ORDER_SCHEMA, Acknowledgement, Command, Observation, Order
from esper.tamiyo import Controller

GROUP = "tamiyo"
ISSUER = "tamiyo"
HEARTBEAT_S = 2.0
DEADLINE_S = 30.0
"""How long an order may take to its training."""
FORGET_S = 3600.0
"""A training that has said nothing for so long is over."""
CLAIM_WAIT_S = 10.0
"""How long the claim store may take for an observation."""
LISTED_S = 600.0
"""A training is listed in the heartbeats for so long after its last observation: some observe rarely."""
MOST_LISTED, MOST_LISTED_BYTES = 2_000, 256 << 10
"""Trainings in one heartbeat, and what their names may take."""
MOST_UNTOLD = 100
"""Decisions that wait for a bus that failed; then the oldest are not told."""
MOST_ATTEMPTS = 5
"""So often a decision is offered to the bus: one that it never takes does not hold up the others."""


class Steering:
    """Serves a bus. For one event loop.

    Parameters
    ----------
    make:
        Makes a training's controller.
    name:
        What the controllers are called, for those who read decisions.
    keyring:
        Signs the orders; observations must be signed by one of its keys then. ``None``: nothing is signed.
    consumer:
        This server's name in the group; each server has its own. Of several the one with the smallest steers.
    settle_s:
        How long it listens for other servers before it steers.
    clock:
        Unix time.
    """

    def __init__(
        self,
        bus: Bus,
        make: Callable[[], Controller],
        *,
        name: str,
        keyring: Keyring | None = None,
        claims: Claims | None = None,
        consumer: str = "server",
        deadline_s: float = DEADLINE_S,
        settle_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self._bus, self._make, self._name, self._keyring, self._claims = bus, make, name, keyring, claims
        self._consumer, self._deadline_s, self._clock = consumer, deadline_s, clock
        self._note = on_note or _silent
        self._settle_s, self._rivals = settle_s, Rivals(bus, keyring, consumer)
        self._sender = Sender(source="esper/tamiyo", keyring=keyring, claims=claims)
        self._issuer = ISSUER if keyring is None else keyring.issuer(None, ISSUER)
        self._trainings: dict[tuple[str, str], Training] = {}
        self._next_listed = 0
        self._untold: deque[Message] = deque(maxlen=MOST_UNTOLD)
        self._attempts = 0
        self.counts: Counter[str] = Counter()
        """What was done: observations, decided, orders, applied, refused, expired, superseded, waited, stale,
        failed, untold, buried."""

    @property
    def num_trainings(self) -> int:
        """Trainings that are steered now."""
        return len(self._trainings)

    async def serve(self, until: asyncio.Event) -> None:
        """Steer until ``until`` is set; a bus that fails is waited for."""
        others = [asyncio.create_task(work) for work in (self._beat(until), self._rivals.run(until))]
        backoff = Backoff()
        try:
            await _pause(until, self._settle_s)
            while not until.is_set():
                await self._stand_by(until)
                try:
                    await self._serve(until, backoff)
                except BusError as error:
                    self._note(f"the bus fails ({error}); trying again")
                    await _pause(until, backoff.next_s())
        finally:
            for task in others:
                task.cancel()
            await asyncio.wait(others)
            for task in others:
                if not task.cancelled():
                    task.result()  # or what it has raised

    async def _stand_by(self, until: asyncio.Event) -> None:
        """Wait while another server steers; what was known of the trainings is of no use afterwards."""
        rival = self._rivals.ahead
        if rival is None:
            return
        self._note(f"the server {rival} steers this bus already; standing by")
        self._trainings.clear()
        while self._rivals.ahead is not None and not until.is_set():
            await _pause(until, HEARTBEAT_S / 4)
        if not until.is_set():
            self._note(f"the server {rival} has been silent; taking over")

    async def _serve(self, until: asyncio.Event, backoff: Backoff) -> None:
        topics = (ACKNOWLEDGEMENTS, OBSERVATIONS)
        subscription = await self._bus.subscribe(topics, group=GROUP, consumer=self._consumer, begin="newest")
        try:
            while not until.is_set() and self._rivals.ahead is None:
                deliveries = await subscription.receive(most=500, wait_s=0.5)
                backoff.reset()
                await self._tell()
                await self._take(subscription, deliveries)
        finally:
            with contextlib.suppress(BusError):  # it is what failed; the group gets what lies there either way
                await subscription.close()

    async def _take(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
        """Answers first, then the newest observation of each training; all of them are done with then."""
        newest: dict[tuple[str, str], tuple[Delivery, Envelope]] = {}
        for delivery in deliveries:
            envelope = await self._open(delivery)
            if envelope is None:
                continue
            if delivery.topic == ACKNOWLEDGEMENTS.name:
                await self._hear(delivery, envelope)
                continue
            self.counts["observations"] += 1
            if delivery.attempts > 1:  # nobody was there for it in time; the next one tells more
                self.counts["late"] += 1
                continue
            if self._is_stale(envelope):
                continue
            job = (envelope.esperrun, envelope.subject)
            known = newest.get(job)
            if known is not None:
                self.counts["superseded"] += 1
            if known is None or wire.seconds(envelope.time) >= wire.seconds(known[1].time):
                newest[job] = (delivery, envelope)
        for job, (delivery, envelope) in newest.items():
            await self._look(job, delivery, envelope)
        self._forget()
        if deliveries:
            await subscription.acknowledge(deliveries)

    async def _open(self, delivery: Delivery) -> Envelope | None:
        """The envelope, if it may be listened to; otherwise it is buried."""
        try:
            envelope = wire.decode(delivery.value)
            wire.seconds(envelope.time)
            if envelope.esperexpires is not None:
                wire.seconds(envelope.esperexpires)
            if self._keyring is not None and not self._keyring.is_signed(envelope):
                raise EnvelopeError("a controller with a key listens to signed trainings only; give them the key")
            return envelope
        except EnvelopeError as error:
            await self._bury(delivery, error)
            return None

    def _is_stale(self, envelope: Envelope) -> bool:
        """Whether an observation is too old to be decided on, as one that somebody sends again is."""
        now = self._clock()
        ago = now - wire.seconds(envelope.time)
        expired = envelope.esperexpires is not None and wire.seconds(envelope.esperexpires) < now
        if abs(ago) <= OBSERVATION_MAX_AGE_S and not expired:
            return False
        self.counts["stale"] += 1
        if self.counts["stale"] == 1:  # once: there may be many
            self._note(
                f"{envelope.esperrun} {envelope.subject}: an observation must be at most {OBSERVATION_MAX_AGE_S:g} s "
                f"old, got one from {ago:,.0f} s ago by this clock; are the clocks right?"
            )
        return True

    async def _hear(self, delivery: Delivery, envelope: Envelope) -> None:
        """An answer to one of the orders."""
        try:
            told = decode_payload(envelope)
        except EnvelopeError as error:
            await self._bury(delivery, error)
            return
        training = self._trainings.get((envelope.esperrun, envelope.subject))
        if not isinstance(told, Acknowledgement) or training is None or training.open.pop(told.id, None) is None:
            return
        training.answered = max(training.answered, wire.seconds(envelope.time))
        self.counts[told.outcome] += 1

    async def _look(self, job: tuple[str, str], delivery: Delivery, envelope: Envelope) -> None:
        """Decide on an observation, unless it is older than what is known or the last orders are under way."""
        training = self._trainings.get(job)
        at, now = wire.seconds(envelope.time), self._clock()
        if training is not None:
            training.mind(at)
        if training is not None and (at <= training.decided or at < training.answered or not training.is_free(now)):
            training.heard = now
            self.counts["waited"] += 1
            return
        if training is not None:
            training.is_steered = False  # unless it can be read and decided on
        try:
            observation = await self._observation(envelope)
        except EnvelopeError as error:
            await self._bury(delivery, error)
            return
        if observation is None:
            self.counts["claims expired"] += 1
            return
        if training is None:
            try:
                controller = self._make()
            except BusError:
                raise
            except (EsperError, *CONTAINED) as error:
                self._failed(job, error)
                return
            training = self._trainings[job] = Training(controller, now)
            self._note(f"{job[0]} {job[1]}: steering from step {observation.step}")
        training.heard = now
        await self._decide(job, training, envelope, observation)

    async def _observation(self, envelope: Envelope) -> Observation | None:
        whole: Envelope | ClaimExpired = envelope
        if self._claims is not None:
            whole = await within(CLAIM_WAIT_S, self._claims.redeem(envelope), "the claim store")
        if isinstance(whole, ClaimExpired):
            return None
        observation = decode_payload(whole)
        if not isinstance(observation, Observation):
            raise EnvelopeError(f"observations are looked at here, got {type(observation).__name__}")
        return observation

    async def _decide(
        self, job: tuple[str, str], training: Training, envelope: Envelope, observation: Observation
    ) -> None:
        """Send the orders and tell of them. Once they may be out they are open, whatever becomes of the bus."""
        training.is_steered = observation.stopped is None
        try:
            commands = () if observation.stopped is not None else tuple(training.controller.decide(observation))
            orders = [self._order(job, envelope, number, command) for number, command in enumerate(commands)]
            messages = [await self._message(job, order) for order in orders]
            told = await self._told(job, envelope, observation, commands)
        except BusError:
            raise
        except (EsperError, *CONTAINED) as error:  # a controller of the user's own; the others go on being steered
            reason = self._failed(job, error)
            orders, messages = [], []
            training.is_steered = False
            told = await self._told(job, envelope, observation, (), reason)
        training.decided = wire.seconds(envelope.time)
        training.open |= {order.id: self._clock() + self._deadline_s for order in orders}
        self._untold.append(told)
        self.counts["decided"] += 1
        self.counts["orders"] += len(orders)
        if messages:
            await self._bus.publish(COMMANDS, messages)
        await self._tell()

    async def _tell(self) -> None:
        """Publish the decisions that nobody knows of yet, oldest first."""
        while self._untold:
            self._attempts += 1
            try:
                await self._bus.publish(DECISIONS, [self._untold[0]])
            except BusError:
                if self._attempts < MOST_ATTEMPTS:
                    raise
                self.counts["untold"] += 1
            self._untold.popleft()
            self._attempts = 0

    async def _told(
        self,
        job: tuple[str, str],
        envelope: Envelope,
        observation: Observation,
        commands: tuple[Command, ...],
        reason: str = "",
    ) -> Message:
        decision = Decision(
            step=observation.step, observation=envelope.id, controller=self._name, commands=commands, reason=reason
        )
        told = self._sender.envelope(DECISION_SCHEMA, wire.write_json(decision), subject=job[1])
        return await self._sender.message(_of_run(told, job[0]))

    def _failed(self, job: tuple[str, str], error: BaseException) -> str:
        """Count and tell what a controller has raised."""
        reason = f"the controller failed: {type(error).__name__}: {error}".encode(errors="replace").decode()[:2000]
        self.counts["failed"] += 1
        self._note(f"{job[0]} {job[1]}: {reason}")
        return reason

    def _order(self, job: tuple[str, str], envelope: Envelope, number: int, command: Command) -> Order:
        """The same observation makes the same id: a decision that is sent again is applied once."""
        name = hashlib.sha256("\0".join((*job, envelope.id, str(number))).encode()).hexdigest()[:32]
        until = wire.timestamp(self._clock() + self._deadline_s)
        return Order(
            id=name, command=command, issuer=self._issuer, run=job[0], job=job[1], issued=wire.now(), deadline=until
        )

    async def _message(self, job: tuple[str, str], order: Order) -> Message:
        envelope = self._sender.envelope(
            ORDER_SCHEMA, wire.write_json(order), kind=order.kind, subject=job[1], id=order.id, expires=order.deadline
        )
        return await self._sender.message(_of_run(envelope, job[0]))

    async def _bury(self, delivery: Delivery, error: EnvelopeError) -> None:
        self.counts["buried"] += 1
        await bury(self._bus, self._sender, delivery, str(error))

    def _forget(self) -> None:
        now = self._clock()
        for job in [job for job, training in self._trainings.items() if now - training.heard > FORGET_S]:
            del self._trainings[job]
            self._note(f"{job[0]} {job[1]}: silent for an hour, forgotten")

    def _listed(self) -> tuple[str, ...]:
        """The trainings for the next heartbeat: as many as fit, going on from where the last one ended."""
        now, listed, size = self._clock(), list[str](), 0
        steered = [job for job, one in self._trainings.items() if one.is_steered and now - one.heard <= LISTED_S]
        if self._next_listed >= len(steered):
            self._next_listed = 0
        for job in steered[self._next_listed :][:MOST_LISTED]:
            size += sum(map(len, job)) * 4
            if size > MOST_LISTED_BYTES and listed:
                break
            listed.append("/".join(job))
        self._next_listed += len(listed)
        return tuple(listed)

    async def _beat(self, until: asyncio.Event) -> None:
        """Tell the trainings that somebody steers them."""
        backoff = Backoff()
        while not until.is_set():
            if self._rivals.ahead is not None:  # the one that steers is heard
                await _pause(until, HEARTBEAT_S / 4)
                continue
            beat = Heartbeat(
                role=CONTROLLER, every_s=HEARTBEAT_S, state=self._name, counts=dict(self.counts), name=self._consumer,
                trainings=self._listed(),
            )  # fmt: skip
            envelope = self._sender.envelope(HEARTBEAT_SCHEMA, wire.write_json(beat))
            try:
                await self._bus.publish(HEARTBEATS, [await self._sender.message(envelope)])
                backoff.reset()
                await _pause(until, HEARTBEAT_S)
            except BusError:  # said by the loop that receives
                await _pause(until, max(HEARTBEAT_S, backoff.next_s()))


def _of_run(envelope: Envelope, run: str) -> Envelope:
    return msgspec.structs.replace(envelope, esperrun=run)


async def _pause(until: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(until.wait(), seconds)


def _silent(note: str) -> None:
    """Nobody asked for notes."""
