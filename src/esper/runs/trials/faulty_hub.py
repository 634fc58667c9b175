"""A bus inside one process that treats messages as its :class:`~esper.safety.faults.Traffic` says."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from esper.errors import BusError
from esper.oona.bus import Begin, Delivery, Message
from esper.oona.memory import Hub
from esper.oona.topics import COMMANDS, Topic
from esper.safety.faults import Traffic
from esper.safety.faults.traffic import Trouble

HASTE = 100.0
"""Its time goes faster, so that what was lost on its way to a reader comes again within a trial."""
_LATE = 4
"""Messages that one may come after."""


class FaultyHub(Hub):
    """Calls fail, messages are lost, doubled or late while there is trouble; what was kept back comes when it is over.

    A strike is one at an order. What it has taken it keeps: a broker's promise is not what is tried here.
    """

    def __init__(self, traffic: Traffic) -> None:
        super().__init__(clock=lambda: HASTE * time.monotonic())
        self._traffic = traffic
        self._calls = itertools.count()
        self._late: list[tuple[Topic, Message]] = []
        self._late_lock = threading.Lock()

    def put(self, topic: Topic, messages: Sequence[Message]) -> None:
        trouble = self._meets(topic if messages else None)
        if trouble == "doubles":
            messages = [message for message in messages for _ in range(2)]
        elif trouble == "loses":
            call = next(self._calls)
            if call % 3 < 2:  # before all of them, or behind the first half
                super().put(topic, messages[: len(messages) // 2] if call % 3 else [])
                raise BusError("the connection broke while messages were sent")
        elif trouble == "disorders":
            self._release(_LATE, [(topic, message) for message in messages])
            return
        super().put(topic, messages)

    def take(self, topics: Sequence[Topic], group: str, consumer: str, most: int, redeliver_s: float) -> list[Delivery]:
        if self._traffic.trouble != "disorders":
            self._release(0)
        trouble = self._meets()
        taken = super().take(topics, group, consumer, most, redeliver_s)
        if taken and trouble == "loses" and next(self._calls) % 2:
            raise BusError("the connection broke while messages were fetched")
        return taken

    def done(self, group: str, deliveries: Sequence[Delivery]) -> None:
        trouble = self._meets()
        if trouble == "loses" and next(self._calls) % 2:
            raise BusError("the connection broke while messages were acknowledged")
        super().done(group, deliveries)

    def join(self, topics: Sequence[Topic], group: str, begin: Begin) -> None:
        self._meets()
        super().join(topics, group, begin)

    def _meets(self, sent: Topic | None = None) -> Trouble | None:
        """The trouble that a call meets; ``sent`` is the topic of what is sent in it."""
        trouble = self._traffic.trouble
        if trouble is not None and sent == COMMANDS:
            self._traffic.strikes.num += 1
        if trouble == "gone":
            raise BusError("the bus is away")
        return trouble

    def _release(self, keep: int, more: Sequence[tuple[Topic, Message]] = ()) -> None:
        """Keep ``more`` back as well, and let all go but ``keep`` of them, the newest first."""
        with self._late_lock:
            self._late += more
            going = [self._late.pop() for _ in range(len(self._late) - keep)]
        for topic, message in going:
            super().put(topic, [message])
