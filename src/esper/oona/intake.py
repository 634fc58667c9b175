"""Orders on their way from the bus to the desk of one training.

A delivery is done with when the desk has its answer on the disk, or wants nothing of it. Until then the bus keeps it,
so a training that dies finds it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence

from esper.errors import BusError, EnvelopeError
from esper.oona import envelope as wire
from esper.oona.aside import aside
from esper.oona.bus import Bus, Delivery, Message, Subscription
from esper.oona.dead_letters import bury
from esper.oona.desk import Desk
from esper.oona.envelope import Envelope
from esper.oona.sender import Sender
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS
from esper.protocol import ACKNOWLEDGEMENT_SCHEMA, Acknowledgement

_LOOK_S = 0.25
_LOOK_CLOSELY_S = 0.02
"""How often to ask the desk for answers while some are open."""


class Intake:
    """One training's reader of the commands.

    Parameters
    ----------
    sender:
        The training; its address is whose orders are taken.
    """

    def __init__(self, bus: Bus, sender: Sender, desk: Desk) -> None:
        self._bus, self._sender, self._desk = bus, sender, desk
        self._address = f"{sender.run}/{sender.subject}"
        self.group = f"training {self._address}"
        self._open: dict[str, Delivery] = {}
        """Deliveries by order, whose answers are still to come."""
        self.last_call = False
        """Set when the training is over: what is there is taken once more (and refused), the group is forgotten."""
        self.done = threading.Event()
        """Set when the last call is over."""

    async def run(self, stop: asyncio.Event) -> None:
        """Take orders until ``stop`` is set.

        Raises
        ------
        BusError
            The bus fails; call again later.
        """
        self._open.clear()  # they come again
        subscription = await self._bus.subscribe([COMMANDS], group=self.group, consumer="desk", begin="oldest")
        try:
            while not stop.is_set() and not self.last_call:
                wait_s = _LOOK_CLOSELY_S if self._open else _LOOK_S
                deliveries = await subscription.receive(most=200, wait_s=wait_s)
                await self._take(subscription, deliveries)
            while self.last_call and (deliveries := await subscription.receive(most=200, wait_s=0.0)):
                await self._take(subscription, deliveries)
            await self._take(subscription, [])
        finally:
            with contextlib.suppress(BusError):  # it is what failed
                await subscription.close()
        if self.last_call:
            with contextlib.suppress(BusError):
                await self._bus.forget([COMMANDS], self.group)
            self.done.set()

    async def _take(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> None:
        done: list[Delivery] = []
        told: list[Acknowledgement] = []
        for delivery in deliveries:
            envelope = await self._mine(delivery)
            answer = None if envelope is None else await self._hand_in(delivery, envelope)
            if answer is not None:
                told.append(answer)
            if envelope is not None and self._desk.is_open(envelope.id):
                self._open[envelope.id] = delivery
            else:
                done.append(delivery)
        if self._desk.has_unwritten:  # refusals; the disk may take its time
            await aside(self._desk.write)
        told += self._desk.unlogged()
        if told:
            await self._bus.publish(ACKNOWLEDGEMENTS, [await self._message(one) for one in told])
        answered = [order for order in self._open if not self._desk.is_open(order)]
        done += [self._open[order] for order in answered]
        if done:
            await subscription.acknowledge(done)
        for order in answered:
            del self._open[order]

    async def _mine(self, delivery: Delivery) -> Envelope | None:
        """The envelope, if it is addressed to this training; what nobody could read is buried."""
        try:
            envelope = wire.decode(delivery.value)
        except EnvelopeError as error:
            # Whoever it was for buries it; what has no address at all is buried under one name by all.
            if delivery.key == self._address or "/" not in delivery.key:
                await bury(self._bus, self._sender, delivery, str(error))
            return None
        is_mine = envelope.esperrun == self._sender.run and envelope.subject == self._sender.subject
        return envelope if is_mine else None

    async def _hand_in(self, delivery: Delivery, envelope: Envelope) -> Acknowledgement | None:
        try:
            return self._desk.take(envelope)
        except EnvelopeError as error:
            await bury(self._bus, self._sender, delivery, str(error))
            return None

    async def _message(self, told: Acknowledgement) -> Message:
        """An answer that does not come by the log."""
        data = wire.write_json(told)
        return await self._sender.message(self._sender.envelope(ACKNOWLEDGEMENT_SCHEMA, data, kind=told.outcome))
