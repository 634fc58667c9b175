"""Listens for controllers: when was one heard last?"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from esper.errors import BusError, EnvelopeError
from esper.oona import envelope as wire
from esper.oona.bus import Bus, Delivery
from esper.oona.schemas import Heartbeat, decode_payload
from esper.oona.sender import Sender
from esper.oona.topics import HEARTBEATS

CONTROLLER = "controller"
"""Role in the heartbeats of those who steer."""
JOB = "job"


class Ears:
    """Hears the heartbeats of controllers; with a key only those that are signed."""

    def __init__(self, bus: Bus, sender: Sender, *, group: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus, self._sender, self._group, self._clock = bus, sender, group, clock
        self.heard: float | None = None
        """When the last one came, by ``clock``."""

    async def run(self, stop: asyncio.Event) -> None:
        """Listen until ``stop`` is set.

        Raises
        ------
        BusError
            The bus fails; call again later.
        """
        subscription = await self._bus.subscribe([HEARTBEATS], group=self._group, consumer="ears", begin="newest")
        try:
            while not stop.is_set():
                deliveries = await subscription.receive(wait_s=0.5)
                if any(map(self._is_controller, deliveries)):
                    self.heard = self._clock()
                await subscription.acknowledge(deliveries)
        finally:
            with contextlib.suppress(BusError):  # it is what failed
                await subscription.close()
                await self._bus.forget([HEARTBEATS], self._group)

    def _is_controller(self, delivery: Delivery) -> bool:
        try:
            envelope = wire.decode(delivery.value)
            if self._sender.keyring is not None and not self._sender.keyring.is_signed(envelope):
                return False
            beat = decode_payload(envelope)
        except EnvelopeError:  # rubbish is no controller; nobody acts on heartbeats
            return False
        return isinstance(beat, Heartbeat) and beat.role == CONTROLLER
