"""Whoever files field reports: each is stored once, whatever fails between storing and acknowledging."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.karn.made import report
from tests.oona.buses import Broker

from esper.errors import BusError, StateError
from esper.karn import Database, FieldReport
from esper.oona import envelope as wire
from esper.oona.bus import Message
from esper.oona.claim_stores import MemoryStore
from esper.oona.claims import Claims
from esper.oona.dead_letters import read_letter
from esper.oona.memory import Hub, MemoryBus
from esper.oona.operators import held
from esper.oona.registrar import Registrar
from esper.oona.schemas import FIELD_REPORT_SCHEMA, HEARTBEAT_SCHEMA, Heartbeat
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.topics import DEAD_LETTERS, FIELD_REPORTS

pytestmark = pytest.mark.component

KEYRING = Keyring({"a": "k" * 32})


class Archive:
    """A database that refuses now and then."""

    def __init__(self, path: Path, refusals: int = 0) -> None:
        self.path, self.refusals, self.calls = path, refusals, 0

    def __call__(self, reports: Sequence[FieldReport]) -> int:
        self.calls += 1
        if self.refusals:
            self.refusals -= 1
            raise StateError("the disk is full")
        with Database(self.path) as database:
            return database.file(reports)

    def cohorts(self) -> list[int]:
        with Database(self.path) as database:
            return [one.cohort for one in database.reports()]


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path / "karn.db")


def sender(keyring: Keyring | None = None, claims: Claims | None = None) -> Sender:
    return Sender(source="esper/kasmina", run="run", subject="grown-seed0", keyring=keyring, claims=claims)


async def tell(bus: MemoryBus, *reports: FieldReport, by: Sender | None = None) -> None:
    by = by or sender()
    messages = [await by.message(by.envelope(FIELD_REPORT_SCHEMA, wire.write_json(one))) for one in reports]
    await bus.publish(FIELD_REPORTS, messages)


async def serve(
    bus: MemoryBus, archive: Archive, *, most: int | None = None, seconds: float = 0.1, **settings: Any
) -> Registrar:
    """For so long, or until there were ``most``."""
    registrar = Registrar(bus, archive, **{"group": "karn", "most": most, **settings})
    until = asyncio.Event()
    serving = asyncio.create_task(registrar.serve(until))
    await asyncio.wait({serving}, timeout=20 if most is not None else seconds)
    until.set()
    await asyncio.wait_for(serving, 5)
    return registrar


async def letters(bus: MemoryBus) -> list[str]:
    return [read_letter(delivery).reason for delivery in await held(bus, DEAD_LETTERS, 100, wait_s=0.0)]


def test_each_report_is_filed_once_and_what_is_known_is_counted_apart(archive: Archive) -> None:
    async def work() -> None:
        bus = MemoryBus(hub=Hub())
        await tell(bus, report(0), report(1), report(0))
        assert (await serve(bus, archive, most=3)).counts == {"filed": 3, "new": 2}
        await tell(bus, report(1), report(2))
        assert (await serve(bus, archive, most=2)).counts == {"filed": 2, "new": 1}
        assert await bus.backlog(FIELD_REPORTS, "karn") == 0

    asyncio.run(work())
    assert archive.cohorts() == [0, 1, 2]


def test_it_takes_no_more_than_it_was_asked_for(archive: Archive, tmp_path: Path) -> None:
    async def work() -> None:
        bus = MemoryBus(hub=Hub())
        await tell(bus, *(report(cohort) for cohort in range(250)))
        assert (await serve(bus, archive, most=3)).counts["filed"] == 3
        assert archive.cohorts() == [0, 1, 2]
        assert (await serve(bus, archive, most=247)).counts["new"] == 247
        other = await serve(bus, Archive(tmp_path / "other.db"), most=250, group="karn of somebody else")
        assert other.counts["new"] == 250, "every group gets all of them"

    asyncio.run(work())
    assert len(archive.cohorts()) == 250


def test_what_nobody_can_use_goes_to_the_dead_letters_and_holds_up_nothing(archive: Archive) -> None:
    async def work() -> None:
        bus, by = MemoryBus(hub=Hub()), sender(KEYRING)
        good = by.envelope(FIELD_REPORT_SCHEMA, wire.write_json(report(0)))
        beat = by.envelope(HEARTBEAT_SCHEMA, wire.write_json(Heartbeat(role="job", every_s=1.0)))
        poison = [
            msgspec.structs.replace(good, dataschema="esper:field-report:9"),
            by.envelope(FIELD_REPORT_SCHEMA, wire.write_json(report(1, v=9))),
            by.envelope(FIELD_REPORT_SCHEMA, wire.write_json(report(2, held_out=float("nan")))),
            by.envelope(FIELD_REPORT_SCHEMA, b'{"run":"x"}'),
            beat,
        ]
        signed = [await by.message(envelope) for envelope in (*poison, good)]
        unsigned = Message("run/grown-seed0", wire.encode(good))
        await bus.publish(FIELD_REPORTS, [Message("?", b"rubbish"), unsigned, *signed])
        registrar = await serve(bus, archive, most=1, keyring=KEYRING)
        assert registrar.counts == {"filed": 1, "new": 1, "buried": 7}
        told = await letters(bus)
        expected = (
            "no newline", "files signed reports only", "version of 'field-report', got 9", "up to version 1, got 9",
            "held_out of a report must be finite", "missing required field", "filed here, got Heartbeat",
        )  # fmt: skip
        assert len(told) == 7 and all(words in reason for words, reason in zip(expected, told, strict=True))
        assert await bus.backlog(FIELD_REPORTS, "karn") == 0

    asyncio.run(work())
    assert archive.cohorts() == [0]


def test_a_store_that_refuses_is_asked_again(archive: Archive) -> None:
    notes: list[str] = []
    archive.refusals = 3

    async def work() -> None:
        bus = MemoryBus(hub=Hub())
        await tell(bus, report(0), report(1))
        await serve(bus, archive, most=2, on_note=notes.append)

    asyncio.run(work())
    assert archive.cohorts() == [0, 1] and archive.calls == 4
    assert notes == ["2 reports wait: the disk is full"], "said once"


def test_what_could_not_be_stored_comes_again(archive: Archive) -> None:
    archive.refusals = 1000

    async def work() -> None:
        bus = MemoryBus(hub=Hub())
        await tell(bus, report(0), report(1))
        registrar = await serve(bus, archive, seconds=0.2)
        assert registrar.counts["filed"] == 0 and await bus.backlog(FIELD_REPORTS, "karn") == 2
        archive.refusals = 0
        assert (await serve(bus, archive, most=2)).counts["new"] == 2

    asyncio.run(work())
    assert archive.cohorts() == [0, 1]


def test_one_that_dies_before_it_acknowledges_has_filed_once(archive: Archive) -> None:
    """The report is in the database, the bus does not know: it hands it to the next member."""

    class Deaf(MemoryBus):
        async def subscribe(self, *topics: Any, **settings: Any) -> Any:
            subscription = await super().subscribe(*topics, **settings)

            async def refuse(deliveries: Any) -> None:
                raise asyncio.CancelledError

            subscription.acknowledge = refuse  # type: ignore[method-assign]
            return subscription

    async def work() -> None:
        hub = Hub()
        bus = MemoryBus(hub=hub)
        await tell(bus, report(0))
        registrar = Registrar(Deaf(hub=hub), archive, group="karn", consumer="first", redeliver_s=0.05)
        with pytest.raises(asyncio.CancelledError):
            await registrar.serve(asyncio.Event())
        assert archive.cohorts() == [0] and await bus.backlog(FIELD_REPORTS, "karn") == 1
        second = await serve(bus, archive, most=1, consumer="second", redeliver_s=0.05)
        assert second.counts == {"filed": 1, "new": 0} and await bus.backlog(FIELD_REPORTS, "karn") == 0

    asyncio.run(work())
    assert archive.cohorts() == [0]


def test_a_bus_that_fails_is_waited_for(archive: Archive) -> None:
    notes: list[str] = []

    class Shy(Broker):
        refusals = 2

        async def subscribe(self, *topics: Any, **settings: Any) -> Any:
            if self.refusals:
                self.refusals -= 1
                raise BusError("nobody is there")
            return await super().subscribe(*topics, **settings)

    async def work() -> None:
        bus = Shy()
        await tell(bus, report(0))
        await serve(bus, archive, most=1, on_note=notes.append)

    asyncio.run(work())
    assert archive.cohorts() == [0] and notes == ["the bus fails (nobody is there); trying again"] * 2


def test_one_that_cannot_bury_acknowledges_nothing(archive: Archive) -> None:
    async def work() -> None:
        bus = Broker()
        await bus.publish(FIELD_REPORTS, [Message("?", b"rubbish")])
        await tell(bus, report(0))
        bus.is_away = True  # it takes nothing, and still hands out what it has
        assert (await serve(bus, archive, seconds=0.3)).counts["filed"] == 0
        bus.is_away = False
        registrar = await serve(bus, archive, most=1)
        assert registrar.counts["new"] == 1 and len(set(await letters(bus))) == 1
        assert await bus.backlog(FIELD_REPORTS, "karn") == 0

    asyncio.run(work())


def test_large_reports_come_by_claim(archive: Archive) -> None:
    store = MemoryStore()

    async def work() -> None:
        bus, by = MemoryBus(hub=Hub()), sender(claims=Claims(store))
        large = report(0, reason="x" * (3 << 19))
        await tell(bus, large, by=by)
        assert (await serve(bus, archive, most=1, claims=Claims(store))).counts["new"] == 1
        await tell(bus, msgspec.structs.replace(large, cohort=1), report(2), by=by)
        await serve(bus, archive, most=1)  # without a store of claims
        await tell(bus, msgspec.structs.replace(large, cohort=3), report(4), by=by)
        await serve(bus, archive, most=1, claims=Claims(MemoryStore()))  # it is not there any more
        told = await letters(bus)
        assert "got ClaimReference" in told[0] and "got missing; import the run" in told[1] and len(told) == 2

    asyncio.run(work())
    assert archive.cohorts() == [0, 2, 4]
