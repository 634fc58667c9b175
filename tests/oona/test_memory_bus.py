"""What is the memory bus's own: its bound, what lossy topics take from a slow group, one hub for many loops."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.buses import TALK, in_loop, numbered, said

from esper.errors import BusError
from esper.oona.bus import Delivery, Message
from esper.oona.memory import Hub, MemoryBus
from esper.oona.topics import Topic

pytestmark = pytest.mark.unit


@in_loop
async def test_a_durable_topic_refuses_more_than_it_may_hold_and_takes_none_of_it() -> None:
    bus = MemoryBus(hub=Hub(max_bytes=1000))
    subscription = await bus.subscribe([TALK], group="g", consumer="c")
    await bus.publish(TALK, [Message("a", bytes(400))] * 2)
    with pytest.raises(BusError, match="may hold 1000 bytes that were not acknowledged, got 1200"):
        await bus.publish(TALK, [Message("a", bytes(200))] * 2)
    held = await subscription.receive()
    assert len(held) == 2
    await subscription.acknowledge(held)
    await bus.publish(TALK, [Message("a", bytes(400))] * 2)
    await bus.close()


@in_loop
async def test_what_a_bounded_topic_has_let_go_of_is_not_waited_for() -> None:
    short = Topic("short", durable=False, retention=10)
    bus = MemoryBus(hub=Hub())
    subscription = await bus.subscribe([short], group="g", consumer="c", redeliver_s=0.05)
    await bus.publish(short, numbered(8))
    held = await subscription.receive(4)
    await bus.publish(short, numbered(12, first=8))
    assert await bus.backlog(short, "g") == 10
    await subscription.acknowledge(held)
    assert said(await subscription.receive(100, 0)) == list(range(10, 20))
    await bus.close()


def test_threads_with_loops_of_their_own_meet_under_one_name() -> None:
    got: list[Delivery] = []
    is_ready = threading.Event()

    async def listen() -> None:
        bus = MemoryBus("meeting")
        subscription = await bus.subscribe([TALK], group="g", consumer="c")
        is_ready.set()
        while len(got) < 50:
            some = await subscription.receive(10, 5)
            await subscription.acknowledge(some)
            got.extend(some)
        await bus.close()

    listener = threading.Thread(target=asyncio.run, args=(listen(),))
    listener.start()
    assert is_ready.wait(10)

    async def speak() -> None:
        bus = MemoryBus("meeting")
        for first in range(0, 50, 10):
            await bus.publish(TALK, numbered(10, first=first))
        await bus.close()

    asyncio.run(speak())
    listener.join(20)
    assert said(got) == list(range(50))
