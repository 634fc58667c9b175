"""Everything together: a run that grows, its courier, and a bus that is there, hangs, or is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import Pair, assert_same_state
from tests.oona.buses import Broker
from tests.rigs import Rig, attach
from tests.servers import RedisServer

from esper.observe.event_log import EventLog, read_events
from esper.oona import envelope as wire
from esper.oona import health
from esper.oona.address import open_bus
from esper.oona.bus import Bus
from esper.oona.claims import Claims
from esper.oona.courier import Courier
from esper.oona.envelope import Envelope
from esper.oona.follower import Follower
from esper.oona.health import HealthReport
from esper.oona.outbox import Outbox, event
from esper.oona.publisher import PublisherLimits, TelemetryPublisher
from esper.oona.schemas import HEALTH_SCHEMA, decode_payload
from esper.oona.sender import Sender
from esper.oona.spool import Spool
from esper.oona.topics import EPOCHS, HEALTH, LIFECYCLE
from esper.protocol import Record

pytestmark = pytest.mark.integration


class Wired:
    """A rig whose events are logged and whose health is offered at every decision."""

    def __init__(self, folder: Path, bus: Bus, *, claims: Claims | None = None, patience_s: float = 5.0) -> None:
        self.rig = a_rig()
        self.log = EventLog(folder / "events.jsonl")
        sender = Sender(source="esper/kasmina", run="r", subject="grown-seed0", claims=claims)
        self.sender = sender
        self.publisher = TelemetryPublisher(
            bus, sender, make_spool=lambda: Spool(folder / "spool"), limits=PublisherLimits(patience_s=patience_s)
        )
        follower = Follower(folder / "events.jsonl", folder / "outbox" / "events")
        self.outbox = Outbox(bus, sender, follower, event, patience_s=patience_s)
        self.courier = Courier(on_close=bus.close)
        self.courier.add("events", self.outbox.run)
        self.courier.add("telemetry", self.publisher.run)
        self.courier.start()
        self.slowest = 0.0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.rig.train()
            began = time.perf_counter()
            self._tell()
            self.slowest = max(self.slowest, time.perf_counter() - began)

    def _tell(self) -> None:
        for one in self.rig.events:
            self.log.append(one)
        self.rig.events.clear()
        self.outbox.nudge()
        if self.rig.turn % self.rig.grower.config.interval == 0:
            snapshot = health.collect(self.rig.grower.kasmina, self.rig.turn)
            self.publisher.offer(HEALTH, self._packing(snapshot), num_bytes=snapshot.num_bytes)

    def _packing(self, snapshot: health.Snapshot) -> Callable[[Mapping[str, int]], Envelope]:
        return lambda counts: self.sender.envelope(HEALTH_SCHEMA, snapshot.pack(counts))

    def close(self, timeout_s: float = 5.0) -> bool:
        ended = self.courier.stop(timeout_s)
        self.log.close()
        return ended


def a_rig() -> Rig:
    torch.manual_seed(0)
    return attach(Pair())


def grown(wired: Wired, steps: int = 40) -> None:
    wired.rig.germinate()
    wired.rig.turn = 0
    wired.train(steps)


def test_events_and_reports_arrive_and_training_is_as_without_a_bus(tmp_path: Path) -> None:
    broker = Broker()
    wired = Wired(tmp_path, broker)
    grown(wired)
    assert wired.close()
    arrived = [decode_payload(envelope) for envelope in broker.envelopes(LIFECYCLE) + broker.envelopes(EPOCHS)]
    assert all(isinstance(record, Record) for record in arrived)
    told = {record.seq: repr(record) for record in read_events(tmp_path / "events.jsonl")}
    assert {record.seq: repr(record) for record in arrived} == told
    reports = [decode_payload(envelope) for envelope in broker.envelopes(HEALTH)]
    assert [report.head.step for report in reports] == list(range(5, 41, 5))
    assert reports[-1].head.publisher["offered"] == 8
    assert reports[0].seeds["seed_id"].size == len(reports[0].head.sites)
    alone = a_rig()
    alone.germinate()
    alone.turn = 0
    alone.train(40)
    assert_same_state(alone.model.state_dict(), wired.rig.model.state_dict())


def test_a_bus_that_hangs_changes_nothing_and_stops_nothing(tmp_path: Path) -> None:
    broker = Broker()
    broker.hangs = True
    wired = Wired(tmp_path, broker, patience_s=0.1)
    grown(wired)
    while not wired.publisher.counts()["spooled"]:
        time.sleep(0.01)
    assert wired.courier.trouble() is None
    left, _ = wired.outbox.behind()
    assert left == (tmp_path / "events.jsonl").stat().st_size
    assert wired.close(1.0)
    found = wired.publisher.counts()
    assert (found["pending"], found["spooled"], found["dropped"]) == (8, 8, 0)
    broker.hangs = False
    again = Wired(tmp_path, broker)  # the next process sends what this one could not
    assert again.close()
    assert len(broker.ids(HEALTH)) == 8
    assert len(broker.ids(LIFECYCLE)) + len(broker.ids(EPOCHS)) == len(list(read_events(tmp_path / "events.jsonl")))


def test_a_redis_that_is_killed_and_comes_back_gets_everything(tmp_path: Path, redis_server: Any) -> None:
    server = RedisServer(tmp_path / "redis", is_durable=True)
    server.start()
    try:
        wired = Wired(tmp_path, open_bus(f"{server.url}?timeout=1", environ={}), patience_s=2.0)
        grown(wired, 20)
        server.kill()
        wired.train(20)
        server.start()
        wired.train(20)
        end = time.monotonic() + 30
        while wired.publisher.counts()["pending"] or wired.outbox.behind()[0]:
            assert time.monotonic() < end, (wired.publisher.counts(), wired.outbox.counts(), wired.courier.counts())
            time.sleep(0.02)
        assert wired.publisher.counts()["dropped"] == 0
        assert wired.close()
        arrived = asyncio.run(_read_all(open_bus(server.url, environ={})))
    finally:
        server.kill()
    told = {record.seq: repr(record) for record in read_events(tmp_path / "events.jsonl")}
    records = {one.seq: repr(one) for one in arrived if isinstance(one, Record)}
    assert records == told
    steps = [one.head.step for one in arrived if isinstance(one, HealthReport)]
    assert list(dict.fromkeys(steps)) == list(range(5, 61, 5))


async def _read_all(bus: Bus) -> list[Any]:
    subscription = await bus.subscribe([LIFECYCLE, EPOCHS, HEALTH], group="people", consumer="one")
    found: list[Any] = []
    while deliveries := await subscription.receive(1000, 0.2):
        found += [decode_payload(wire.decode(delivery.value)) for delivery in deliveries]
        await subscription.acknowledge(deliveries)
    await bus.close()
    return found


def test_who_grows_needs_no_bus(tmp_path: Path) -> None:
    rig = a_rig()
    rig.train(6)
    snapshot = health.collect(rig.grower.kasmina, 5)
    assert health.decode(snapshot.pack()).head.publisher == {}
