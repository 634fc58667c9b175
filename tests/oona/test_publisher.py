"""Telemetry goes out when it can, waits where it may, and every message is accounted for at any moment."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oona.buses import Broker, Clock

from esper.errors import BusError, ConfigError, EnvelopeError, StateError
from esper.oona import envelope as wire
from esper.oona.backoff import Backoff, CircuitBreaker
from esper.oona.bus import Message
from esper.oona.claim_stores import MemoryStore
from esper.oona.claims import MOST_IN_FLIGHT, Claims
from esper.oona.envelope import CLAIM, Envelope
from esper.oona.memory import MOST_LOSSY_BYTES, Hub
from esper.oona.publisher import PublisherLimits, TelemetryPublisher
from esper.oona.rate import TokenBucket
from esper.oona.schemas import HEALTH_SCHEMA, HEARTBEAT_SCHEMA
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.spool import Spool
from esper.oona.topics import COMMANDS, HEALTH, HEARTBEATS, OBSERVATIONS, Topic
from esper.oona.waiting import Waiting
from esper.safety.disk import Disk
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk

pytestmark = pytest.mark.component

SENDER = Sender(source="esper/kasmina", run="r", subject="j")


class Rig:
    """A publisher in a world where nothing moves by itself."""

    def __init__(self, *, disk: Disk | None = None, sender: Sender = SENDER, seed: int = 0, **limits: Any) -> None:
        self.clock, self.broker = Clock(), Broker(seed=seed)
        self.disk = disk
        self.spool: Spool | None = None
        self.publisher = TelemetryPublisher(
            self.broker,
            sender,
            make_spool=None if disk is None else self._make_spool,
            limits=PublisherLimits(**limits),
            breaker=CircuitBreaker(clock=self.clock, most_failures=3, rest_s=1.0, most_rest_s=4.0),
            backoff=Backoff(most_s=2.0, generator=random.Random(seed)),
            clock=self.clock,
            monotonic=self.clock,
        )
        self.numbers = itertools.count()

    def _make_spool(self) -> Spool:
        self.spool = Spool(Path("/simulated/spool"), max_bytes=4000, segment_bytes=1000, disk=self.disk)
        return self.spool

    def offer(
        self, topic: Topic = HEALTH, *, size: int = 20, valid_s: float | None = None, pad: int = 0, newest: bool = False
    ) -> bool:
        build = builder(next(self.numbers), topic, pad)
        return self.publisher.offer(topic, build, num_bytes=size, valid_s=valid_s, supersedes=newest)

    async def settle(self, turns: int = 50) -> None:
        """Turns until nothing moves, without time going on."""
        for _ in range(turns):
            if not (await self.publisher.turn()).more:
                return

    def counts(self) -> dict[str, int]:
        found = self.publisher.counts()
        left = found["delivered"] + found["dropped"] + found["pending"]
        assert found["offered"] + found["recovered"] == left, found
        if self.spool is not None and "closed" not in str(found):
            assert found["spooled"] == self.spool.num_records
        return found


def builder(number: int, topic: Topic, pad: int = 0) -> Callable[[Mapping[str, int]], Envelope]:
    schema = HEALTH_SCHEMA if topic is HEALTH else HEARTBEAT_SCHEMA
    return lambda counts: SENDER.envelope(schema, str(number).encode().rjust(pad, b"."), id=f"{topic.name}-{number}")


def test_what_is_offered_is_delivered_in_order() -> None:
    rig = Rig()
    for _ in range(1200):
        assert rig.offer()
    asyncio.run(rig.settle())
    assert [envelope.data for envelope in rig.broker.envelopes()] == [str(n).encode() for n in range(1200)]
    assert rig.broker.num_calls == 3  # in batches
    assert rig.counts()["delivered"] == 1200


def test_the_urgent_goes_first_and_stays_when_there_is_no_room() -> None:
    rig = Rig(queue_offers=4)
    rig.offer(HEALTH)
    rig.offer(OBSERVATIONS)
    rig.offer(HEARTBEATS)
    for _ in range(3):
        rig.offer(HEALTH)  # 3, 4, 5: the oldest reports go
    assert rig.offer(HEARTBEATS)
    assert rig.offer(HEARTBEATS)
    assert rig.offer(HEARTBEATS)
    assert not rig.offer(HEALTH)
    asyncio.run(rig.settle())
    assert [envelope.id for envelope in rig.broker.envelopes()] == [
        *(f"oona.heartbeats-{n}" for n in (2, 6, 7, 8)),
    ]
    assert rig.counts()["dropped_queue_full"] == 6


def test_the_queue_is_bounded_in_bytes_too() -> None:
    rig = Rig(queue_bytes=100)
    assert not rig.offer(size=101)
    for _ in range(10):
        assert rig.offer(size=30)
    found = rig.counts()
    assert (found["dropped_too_large"], found["dropped_queue_full"], found["queued"]) == (1, 7, 3)


def test_only_what_may_be_lost_is_taken() -> None:
    with pytest.raises(BusError, match=r"may be dropped, got kasmina\.control\.commands"):
        Rig().offer(COMMANDS)


def test_what_nobody_wants_any_more_is_not_sent() -> None:
    rig = Rig()
    rig.offer(HEARTBEATS, valid_s=5)
    rig.offer(HEARTBEATS, valid_s=50)
    rig.clock.now += 6
    asyncio.run(rig.settle())
    assert rig.broker.ids() == ["oona.heartbeats-1"]
    assert rig.counts()["dropped_expired"] == 1


def test_what_cannot_be_built_or_sent_costs_only_itself() -> None:
    rig = Rig()

    def broken(counts: Mapping[str, int]) -> Envelope:
        raise EnvelopeError("no")

    rig.offer()
    rig.publisher.offer(HEALTH, broken, num_bytes=1)
    rig.publisher.offer(HEALTH, builder(7, HEALTH, 3 << 20), num_bytes=1)  # no claim store: too large for the bus
    rig.publisher.offer(HEALTH, builder(8, HEALTH, 65 << 20), num_bytes=1)
    rig.offer()
    asyncio.run(rig.settle())
    assert rig.broker.ids() == ["kasmina.health.layer-0", "kasmina.health.layer-1"]
    assert rig.counts()["dropped_unsendable"] == 3


def test_reports_carry_the_account() -> None:
    rig = Rig(queue_offers=1)
    seen: list[Mapping[str, int]] = []

    def telling(counts: Mapping[str, int]) -> Envelope:
        seen.append(counts)
        return SENDER.envelope(HEALTH_SCHEMA, b"")

    rig.offer()
    rig.publisher.offer(HEALTH, telling, num_bytes=1)
    asyncio.run(rig.settle())
    assert (seen[0]["offered"], seen[0]["dropped"], seen[0]["in_flight"]) == (2, 1, 1)


def test_large_reports_go_by_claim_also_after_an_outage() -> None:
    claims = Claims(MemoryStore(), above=100)
    keys = Keyring({"a": "k" * 32})
    rig = Rig(disk=SimulatedDisk(), sender=Sender(source="s", run="r", claims=claims, keyring=keys))
    rig.broker.is_away = True
    rig.offer(pad=500)

    async def outage() -> None:
        await rig.settle()
        assert rig.counts()["spooled"] == 1
        rig.broker.is_away = False
        rig.clock.now += 10
        rig.offer(pad=500)
        await rig.settle()
        for number, envelope in enumerate(rig.broker.envelopes()):
            assert envelope.datacontenttype == CLAIM
            assert keys.is_signed(envelope)
            redeemed = await claims.redeem(envelope)
            assert isinstance(redeemed, Envelope)
            assert redeemed.data == str(number).encode().rjust(500, b".")

    asyncio.run(outage())
    assert rig.counts()["delivered"] == 2


def test_an_outage_fills_the_spool_and_is_caught_up_in_order() -> None:
    rig = Rig(disk=SimulatedDisk(), batch_messages=3)
    rig.broker.is_away = True

    async def outage() -> None:
        for _ in range(5):
            rig.offer()
            rig.offer(HEARTBEATS, valid_s=100)
            await rig.settle()
            rig.clock.now += 0.1
        found = rig.counts()
        assert (found["spooled"], found["queued"]) == (5, 5)
        calls = rig.broker.num_calls
        await rig.settle()
        assert rig.broker.num_calls == calls  # the circuit is open: the broker is left alone
        rig.broker.is_away = False
        rig.clock.now += 10
        rig.offer()
        await rig.settle()

    asyncio.run(outage())
    assert rig.broker.ids(HEALTH) == [f"kasmina.health.layer-{n}" for n in (0, 2, 4, 6, 8, 10)]
    assert len(rig.broker.ids(HEARTBEATS)) == 5
    assert rig.counts()["pending"] == 0


def test_past_the_spools_bound_the_oldest_reports_are_dropped_and_counted() -> None:
    rig = Rig(disk=SimulatedDisk())
    rig.broker.is_away = True

    async def outage() -> None:
        for _ in range(30):
            rig.offer(pad=200)
            await rig.settle()
            rig.clock.now += 0.1
        found = rig.counts()
        assert found["dropped_spool_full"] > 0
        rig.broker.is_away = False
        rig.clock.now += 10
        await rig.settle()

    asyncio.run(outage())
    found = rig.counts()
    numbers = [int(envelope.data.strip(b".")) for envelope in rig.broker.envelopes(HEALTH)]
    assert numbers == list(range(30 - len(numbers), 30))
    assert found["delivered"] == len(numbers)


def test_without_a_spool_reports_wait_in_memory() -> None:
    rig = Rig(queue_offers=3)
    rig.broker.is_away = True

    async def outage() -> None:
        for _ in range(5):
            rig.offer()
            await rig.settle()
            rig.clock.now += 5
        rig.broker.is_away = False
        rig.clock.now += 10
        await rig.settle()

    asyncio.run(outage())
    assert rig.broker.ids() == [f"kasmina.health.layer-{n}" for n in (2, 3, 4)]
    assert rig.counts()["dropped_queue_full"] == 2


def test_what_an_earlier_process_has_left_is_recovered() -> None:
    disk = SimulatedDisk()
    first = Rig(disk=disk)
    first.broker.is_away = True
    for _ in range(3):
        first.offer()
    asyncio.run(first.settle())
    first.offer()
    first.publisher.close()
    first.publisher.close()
    found = first.publisher.counts()
    assert (found["spooled"], found["pending"], found["dropped"]) == (4, 4, 0)
    second = Rig(disk=disk)
    second.numbers = itertools.count(4)
    second.offer()
    asyncio.run(second.settle())
    assert second.broker.ids() == [f"kasmina.health.layer-{n}" for n in range(5)]
    found = second.counts()
    assert (found["recovered"], found["delivered"]) == (4, 5)


def test_what_is_left_at_the_end_without_a_spool_is_counted_as_dropped() -> None:
    rig = Rig()
    rig.broker.is_away = True
    rig.offer()
    rig.publisher.close()
    assert rig.counts()["dropped_closed"] == 1


def test_a_spool_that_cannot_be_used_is_said_and_done_without() -> None:
    def refuse() -> Spool:
        raise StateError("no disk")

    broker = Broker()
    publisher = TelemetryPublisher(broker, SENDER, make_spool=refuse)
    publisher.offer(HEALTH, builder(0, HEALTH), num_bytes=1)
    asyncio.run(publisher.turn())
    assert publisher.counts()["spool_unusable"] == 1
    assert len(broker.taken) == 1


def test_telemetry_is_limited_in_messages_and_bytes() -> None:
    rig = Rig(messages_per_s=10.0, batch_messages=5)

    async def measured() -> None:
        for _ in range(60):
            rig.offer()
        await rig.settle()
        assert len(rig.broker.taken) == 20  # the burst
        turn = await rig.publisher.turn()
        assert 0 < turn.wait_s < 1
        for _ in range(10):
            rig.clock.now += 0.1
            await rig.settle()
        assert 25 <= len(rig.broker.taken) <= 35

    asyncio.run(measured())
    rig = Rig(bytes_per_s=1000.0, batch_messages=1)
    for _ in range(60):
        rig.offer(pad=500)
    asyncio.run(rig.settle())
    assert 2 <= len(rig.broker.taken) <= 4


def test_a_bucket_fills_and_may_be_overdrawn() -> None:
    clock = Clock()
    bucket = TokenBucket(10.0, 20.0, clock=clock)
    bucket.spend(50.0)
    assert bucket.wait_s == pytest.approx(3.0, abs=1e-3)
    clock.now += 3.01
    assert bucket.wait_s == 0
    clock.now -= 100  # a clock that goes back gives nothing
    assert bucket.wait_s == 0
    with pytest.raises(ConfigError):
        TokenBucket(0.0, 1.0)


@pytest.mark.parametrize("wrong", [{"queue_offers": 0}, {"messages_per_s": float("inf")}, {"patience_s": -1}])
def test_bounds_are_above_zero(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        PublisherLimits(**wrong)
    with pytest.raises(ConfigError, match="needs room"):
        Waiting(max_offers=0, max_bytes=1)


@settings(max_examples=80)
@given(st.integers(0, 2**32))
def test_at_any_moment_everything_offered_is_delivered_dropped_or_pending(seed: int) -> None:
    """Bus and disk fail at random, time jumps; the account is checked after every action, and against what arrived."""
    rng = random.Random(seed)
    disk = FaultyDisk(SimulatedDisk())
    rig = Rig(
        disk=disk if rng.random() < 0.8 else None, seed=seed, queue_offers=rng.choice([3, 50]), queue_bytes=2000,
        batch_messages=rng.choice([1, 4, 100]),
    )  # fmt: skip

    async def live() -> None:
        for _ in range(80):
            action = rng.random()
            if action < 0.5:
                topic = rng.choice([HEALTH, HEALTH, HEARTBEATS, OBSERVATIONS])
                rig.offer(topic, pad=rng.choice([0, 200]), valid_s=rng.choice([None, 1.0]))
            elif action < 0.8:
                await rig.publisher.turn()
            elif action < 0.9:
                rig.clock.now += rng.choice([0.01, 1.0, 10.0])
            else:
                rig.broker.failing = rng.choice([0.0, 0.0, 0.5, 1.0])
                if rng.random() < 0.3:
                    disk.faults[disk.num_operations + rng.randrange(3)] = rng.choice(["ENOSPC", "EIO", "short"])
            rig.counts()
        rig.broker.failing = 0.0
        disk.faults.clear()
        for _ in range(30):
            rig.clock.now += 10
            await rig.settle()
            rig.counts()

    asyncio.run(live())
    found = rig.counts()
    assert found["pending"] == 0
    # A failed call may have left messages behind that were dropped later, never the other way round.
    assert found["delivered"] <= len(rig.broker.ids()) <= found["offered"]
    reports = [int(name.rpartition("-")[2]) for name in rig.broker.ids(HEALTH)]
    assert reports == sorted(reports)


# ----------------------------------------------------------------------------------------------------------------------
# Threads


def test_a_bus_that_never_answers_never_blocks_who_offers() -> None:
    broker = Broker()
    broker.hangs = True
    publisher = TelemetryPublisher(broker, SENDER, limits=PublisherLimits(queue_offers=1000, patience_s=0.05))
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def courier() -> None:
        stop.append((asyncio.get_running_loop(), asyncio.Event()))
        await publisher.run(stop[0][1])

    thread = threading.Thread(target=lambda: asyncio.run(courier()), daemon=True)
    thread.start()
    took: list[float] = []
    build = builder(0, HEALTH)
    for number in range(5000):
        began = time.perf_counter()
        publisher.offer(HEALTH, build, num_bytes=1000)
        took.append(time.perf_counter() - began)
        if number % 100 == 0:
            time.sleep(0.002)
    assert sorted(took)[int(0.99 * len(took))] < 1e-3
    found = publisher.counts()
    assert found["offered"] == found["dropped"] + found["pending"] == 5000
    assert found["queued"] + found["in_flight"] <= 1000
    stop[0][0].call_soon_threadsafe(stop[0][1].set)
    thread.join(5)
    assert not thread.is_alive()
    assert publisher.counts()["failures"] >= 1


def test_offers_of_several_threads_all_arrive() -> None:
    broker = Broker()
    publisher = TelemetryPublisher(broker, SENDER)

    async def all_of_them() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(publisher.run(stop))
        await asyncio.sleep(0.01)
        threads = [threading.Thread(target=many, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.001)
        stop.set()
        await running

    def many(first: int) -> None:
        for number in range(250):
            publisher.offer(HEALTH, builder(1000 * first + number, HEALTH), num_bytes=10)

    asyncio.run(all_of_them())
    assert len(broker.ids()) == 1000
    for first in range(4):
        mine = [n for name in broker.ids() if (n := int(name.rpartition("-")[2])) // 1000 == first]
        assert mine == sorted(mine)
    assert publisher.counts()["delivered"] == 1000
    publisher.offer(HEALTH, builder(0, HEALTH), num_bytes=1)  # after the end: harmless


def test_after_a_contained_failure_it_goes_on_with_what_waits_in_memory_and_on_the_disk() -> None:
    disk = SimulatedDisk()
    rig = Rig(disk=disk)
    rig.broker.is_away = True

    def fail(counts: Mapping[str, int]) -> Envelope:
        raise RuntimeError("nobody foresaw this")

    async def failed_and_run_again() -> None:
        stop = asyncio.Event()
        rig.offer()
        await rig.settle()
        assert rig.counts()["spooled"] == 1
        rig.publisher.offer(HEARTBEATS, fail, num_bytes=1)
        rig.clock.now += 60
        with pytest.raises(RuntimeError, match="foresaw"):
            await rig.publisher.run(stop)
        assert rig.offer()
        rig.broker.is_away = False
        running = asyncio.create_task(rig.publisher.run(stop))
        for _ in range(500):
            if len(rig.broker.ids()) == 2:
                break
            rig.clock.now += 10
            rig.publisher._bell.ring()
            await asyncio.sleep(0.001)
        rig.broker.is_away = True
        rig.offer()
        await asyncio.sleep(0.01)
        stop.set()
        await running

    asyncio.run(failed_and_run_again())
    assert rig.broker.ids() == ["kasmina.health.layer-0", "kasmina.health.layer-1"]
    found = rig.publisher.counts()
    assert (found["spooled"], found["delivered"]) == (1, 2) and "dropped_closed" not in found
    assert Spool(Path("/simulated/spool"), disk=disk).num_records == 1, "it has let go of the folder"


@pytest.mark.parametrize("error", [AssertionError, RuntimeError])
def test_at_the_end_and_after_what_nobody_contains_the_spool_is_let_go_of(error: type[Exception]) -> None:
    disk = SimulatedDisk()
    rig = Rig(disk=disk)

    def fail(counts: Mapping[str, int]) -> Envelope:
        raise error

    async def over() -> None:
        stop = asyncio.Event()
        if error is RuntimeError:
            stop.set()
        rig.publisher.offer(HEALTH, fail, num_bytes=1)
        with pytest.raises(error):
            await rig.publisher.run(stop)

    asyncio.run(over())
    Spool(Path("/simulated/spool"), disk=disk).close()


def test_a_cancelled_batch_is_pending_again() -> None:
    rig = Rig()
    rig.broker.hangs = True
    rig.offer()

    async def cancelled() -> None:
        turn = asyncio.create_task(rig.publisher.turn())
        await asyncio.sleep(0.01)
        assert rig.counts()["in_flight"] == 1
        turn.cancel()
        await asyncio.gather(turn, return_exceptions=True)
        assert rig.counts()["queued"] == 1

    asyncio.run(cancelled())


def test_reports_that_nobody_reads_take_bounded_memory() -> None:
    hub = Hub()
    for number in range(20):
        hub.put(HEALTH, [Message("k", bytes([number]) * (8 << 20))])
    assert hub._streams[HEALTH.name].num_bytes <= MOST_LOSSY_BYTES
    hub.join([HEALTH], "late", "oldest")
    assert hub.take([HEALTH], "late", "one", 1, 30.0)[0].value[:1] == bytes([12])


def test_expiry_is_written_as_times_are() -> None:
    assert wire.seconds(wire.timestamp(1.5e9)) == 1.5e9


# ----------------------------------------------------------------------------------------------------------------------
# A bus that is slower than what comes


def test_the_newest_large_report_takes_the_place_of_those_that_wait() -> None:
    rig = Rig()
    rig.offer()  # 0
    for _ in range(5):
        rig.offer(newest=True)  # 1 to 5
    rig.offer()  # 6
    assert rig.counts()["dropped_superseded"] == 4 and rig.counts()["queued"] == 3
    asyncio.run(rig.settle())
    assert rig.broker.ids() == [f"kasmina.health.layer-{n}" for n in (0, 5, 6)], "small ones all stay, in order"
    assert rig.counts()["delivered"] == 3


def test_what_is_under_way_is_not_superseded_but_is_not_tried_again_either() -> None:
    rig = Rig()
    rig.offer(newest=True)
    rig.broker.is_away = True
    publish = rig.broker.publish

    async def slow(topic: Topic, messages: Any) -> None:
        rig.offer(newest=True)
        await publish(topic, messages)

    rig.broker.publish = slow  # type: ignore[method-assign]
    asyncio.run(rig.settle(1))
    found = rig.counts()
    assert (found["queued"], found["in_flight"], found["dropped_superseded"]) == (1, 0, 1)
    rig.broker.is_away, rig.broker.publish = False, publish  # type: ignore[method-assign]
    rig.clock.now += 10
    asyncio.run(rig.settle())
    assert rig.broker.ids() == ["kasmina.health.layer-1"]


class Shelf(MemoryStore):
    """As slow as it is told, and counts how many are under way in the whole process."""

    under_way = most = 0

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    async def put(self, name: str, data: bytes) -> None:
        Shelf.under_way += 1
        Shelf.most = max(Shelf.most, Shelf.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            Shelf.under_way -= 1
        await super().put(name, data)


def test_few_claims_are_under_way_at_once_whoever_sends_them() -> None:
    async def job(number: int) -> dict[str, int]:
        claims = Claims(Shelf(0.02), above=100, patience_s=0.2)  # less than all of them take together
        rig = Rig(sender=Sender(source="s", run="r", claims=claims))
        rig.offer(pad=500 + number)
        await rig.settle()
        return rig.counts()

    async def jobs() -> list[dict[str, int]]:
        return await asyncio.gather(*(job(number) for number in range(60)))

    Shelf.most = 0
    told = asyncio.run(jobs())
    assert Shelf.most == MOST_IN_FLIGHT and Shelf.under_way == 0
    assert all(counts["delivered"] == 1 and "failures" not in counts for counts in told)


def test_what_is_large_has_more_time() -> None:
    async def sent(size: int) -> bool:
        claims = Claims(Shelf(0.2), above=100, patience_s=0.05)
        rig = Rig(sender=Sender(source="s", run="r", claims=claims))
        rig.offer(pad=size)
        await rig.settle(3)
        return rig.counts()["delivered"] == 1

    assert not asyncio.run(sent(1000))
    assert asyncio.run(sent(1 << 20)), "a second more for each MiB"


def test_claims_count_against_the_rate_with_what_they_stand_for() -> None:
    claims = Claims(MemoryStore(), above=100)
    rig = Rig(sender=Sender(source="s", run="r", claims=claims), bytes_per_s=1000.0)
    for _ in range(3):
        rig.offer(pad=10_000)
    asyncio.run(rig.settle())
    assert rig.counts()["delivered"] == 3, "in one batch"
    rig.offer(pad=10_000)
    asyncio.run(rig.settle())
    assert rig.counts()["queued"] == 1
