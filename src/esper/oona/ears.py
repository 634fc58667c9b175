"""Listens for controllers: when was one heard last that steers this training?"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from esper.errors import BusError, EnvelopeError
from esper.oona import envelope as wire
from esper.oona.backoff import Backoff
from esper.oona.bus import Bus, Delivery
from esper.oona.remote import PATIENCE_S
from esper.oona.schemas import Heartbeat, decode_payload
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.topics import HEARTBEATS

CONTROLLER = "controller"
"""Role in the heartbeats of those who steer."""
JOB = "job"
BEAT_MAX_AGE_S = 60.0
"""A heartbeat that is older, or as far ahead, by the receiver's clock is not heard: somebody may send it again."""
MOST_NAMES = 100
MISSED_BEATS = 3
"""Heartbeats after which a server that is silent steers no longer."""


class Ears:
    """Hears the heartbeats of controllers; with a key only those that are signed.

    A controller counts while it lists this training among those that it steers. One that is new counts for
    ``patience_s`` without it: it has not seen an observation yet.

    Parameters
    ----------
    clock:
        Seconds that only go forward.
    wall:
        Unix time.
    """

    def __init__(
        self,
        bus: Bus,
        sender: Sender,
        *,
        group: str,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._bus, self._sender, self._group = bus, sender, group
        self._patience_s, self._clock, self._wall = patience_s, clock, wall
        self._first: dict[str, float] = {}
        """When each controller was heard for the first time, by its name."""
        self.heard: float | None = None
        """When the last one came that steers this training, by ``clock``."""
        self.heard_any: float | None = None
        """When the last one came, whomever it steers."""

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until ``stop`` is set.

        Raises
        ------
        BusError
            The bus fails; call again later.
        """
        await listen(self._bus, self._sender.keyring, self._group, stop, self._hear, self._wall)

    def _hear(self, beat: Heartbeat) -> None:
        now = self.heard_any = self._clock()
        if beat.name not in self._first and len(self._first) >= MOST_NAMES:
            del self._first[next(iter(self._first))]
        first = self._first.setdefault(beat.name, now)
        if f"{self._sender.run}/{self._sender.subject}" in beat.trainings or now - first <= self._patience_s:
            self.heard = now


class Rivals:
    """Listens for other servers of the same bus: of several the one with the smallest name steers."""

    def __init__(
        self, bus: Bus, keyring: Keyring | None, name: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bus, self._keyring, self._name, self._clock = bus, keyring, name, clock
        self._rival, self._until = "", float("-inf")

    @property
    def ahead(self) -> str | None:
        """Who steers in this server's place; ``None``: nobody."""
        return self._rival if self._clock() < self._until else None

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until ``stop`` is set; a bus that fails is waited for."""
        backoff = Backoff()
        while not stop.is_set():
            try:
                await listen(self._bus, self._keyring, f"servers {self._name}", stop, self._hear)
            except BusError:  # said by the loop that steers
                await asyncio.sleep(backoff.next_s())

    def _hear(self, beat: Heartbeat) -> None:
        if "" < beat.name < self._name:
            self._rival, self._until = beat.name, self._clock() + MISSED_BEATS * min(max(beat.every_s, 0.0), 60.0)


async def listen(
    bus: Bus,
    keyring: Keyring | None,
    group: str,
    stop: asyncio.Event,
    take: Callable[[Heartbeat], None],
    wall: Callable[[], float] = time.time,
) -> None:
    """Give the controllers' heartbeats to ``take`` until ``stop`` is set.

    Raises
    ------
    BusError
        The bus fails; call again later.
    """
    subscription = await bus.subscribe([HEARTBEATS], group=group, consumer="ears", begin="newest")
    try:
        while not stop.is_set():
            deliveries = await subscription.receive(wait_s=0.5)
            for delivery in deliveries:
                beat = _beat(delivery, keyring, wall())
                if beat is not None:
                    take(beat)
            await subscription.acknowledge(deliveries)
    finally:
        with contextlib.suppress(BusError):  # it is what failed
            await subscription.close()
            await bus.forget([HEARTBEATS], group)


def _beat(delivery: Delivery, keyring: Keyring | None, now: float) -> Heartbeat | None:
    """A controller's heartbeat of now, ``None``: something else."""
    try:
        envelope = wire.decode(delivery.value)
        if keyring is not None and not keyring.is_signed(envelope):
            return None
        if abs(now - wire.seconds(envelope.time)) > BEAT_MAX_AGE_S:
            return None
        beat = decode_payload(envelope)
    except EnvelopeError:  # rubbish is no controller; nobody acts on heartbeats
        return None
    return beat if isinstance(beat, Heartbeat) and beat.role == CONTROLLER else None
