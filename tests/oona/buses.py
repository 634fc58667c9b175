"""Buses that misbehave, and time that stands still until it is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from esper.errors import BusError
from esper.oona import envelope as wire
from esper.oona.bus import Message
from esper.oona.envelope import Envelope
from esper.oona.memory import Hub, MemoryBus
from esper.oona.topics import Topic


class Clock:
    """Seconds, moved by hand."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Broker(MemoryBus):
    """Keeps what it takes; fails as it is told.

    ``is_away``: refuses everything. ``failing``: share of calls that fail, half of them after some of the messages were
    taken. ``hangs``: never answers.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(hub=Hub())
        self.is_away = self.hangs = False
        self.failing = 0.0
        self.taken: list[tuple[str, Message]] = []
        self.num_calls = 0
        self._rng = random.Random(seed)

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        self.num_calls += 1
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_away:
            raise BusError("nobody is there")
        fails = self._rng.random() < self.failing
        num = self._rng.randrange(len(messages) + 1) if fails and self._rng.random() < 0.5 else 0
        kept = messages[:num] if fails else messages
        self.taken += [(topic.name, message) for message in kept]
        await super().publish(topic, kept)
        if fails:
            raise BusError("it broke in the middle")

    def envelopes(self, topic: Topic | None = None) -> list[Envelope]:
        """What was taken, in order."""
        return [wire.decode(m.value) for name, m in self.taken if topic is None or name == topic.name]

    def ids(self, topic: Topic | None = None) -> list[str]:
        """Ids of what was taken, each where it came first."""
        return list(dict.fromkeys(envelope.id for envelope in self.envelopes(topic)))
