"""What tests of buses share: a corner of a broker, numbered messages, a loop that must end clean."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from esper.oona.address import open_bus
from esper.oona.bus import Bus, Delivery, Message, Subscription
from esper.oona.topics import Topic

NUMBERS = itertools.count()
TALK = Topic("talk", durable=True, retention=50)
CHATTER = Topic("chatter", durable=False, retention=200)
PATIENCE_S = 20.0
REDELIVER_S = 1.0


@dataclass
class Place:
    """A broker, and a corner of it for one test."""

    kind: str
    server: Any
    prefix: str

    def open(self, *topics: Topic, timeout_s: float = 5.0) -> Bus:
        if self.kind == "kafka-mock":
            for topic in topics or (TALK, CHATTER):
                self.server.prepare(self.prefix + topic.name)
        where = self.server.url if self.server else "memory://contract"
        return open_bus(f"{where}?prefix={self.prefix}&timeout={timeout_s}", environ={})

    @property
    def long_s(self) -> float:
        """A ``redeliver_s`` that does not come up in a test; both Kafka brokers wait for half of it in each join."""
        return 2.0 if self.kind.startswith("kafka") else 60.0

    @asynccontextmanager
    async def bus(self, *topics: Topic, timeout_s: float = 5.0) -> AsyncIterator[Bus]:
        bus = self.open(*topics, timeout_s=timeout_s)
        try:
            yield bus
        finally:
            await bus.close()


def num_sockets() -> int:
    """Open sockets of this process."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return sum(link.startswith("socket:") for link in links)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run the test in a loop of its own; afterwards no task, thread or socket of it may be left."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        async def body() -> None:
            await asyncio.wait_for(test(**fixtures), 90)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

        threads = set(threading.enumerate())
        asyncio.run(body())
        end = time.monotonic() + 5
        while set(threading.enumerate()) - threads and time.monotonic() < end:
            time.sleep(0.01)
        assert not set(threading.enumerate()) - threads

    return run


def numbered(num: int, *, keys: Sequence[str] = ("a",), first: int = 0) -> list[Message]:
    """Message ``i`` says ``i`` and belongs to one of the keys in turn."""
    return [Message(keys[i % len(keys)], b"%d" % i) for i in range(first, first + num)]


def said(deliveries: Sequence[Delivery]) -> list[int]:
    return [int(delivery.value) for delivery in deliveries]


async def gather_up(
    subscription: Subscription, num: int, *, most: int = 100, acknowledge: bool = True
) -> list[Delivery]:
    """Receive until ``num`` have come, or time is up."""
    got: list[Delivery] = []
    end = time.monotonic() + PATIENCE_S
    while len(got) < num and time.monotonic() < end:
        some = await subscription.receive(most, 0.25)
        assert len(some) <= most
        if acknowledge and some:
            await subscription.acknowledge(some)
        got += some
    return got


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not await true():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
