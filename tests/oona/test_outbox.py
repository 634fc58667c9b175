"""Nothing of a run's logs is lost on its way to the bus, through crashes of anybody at any point."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.oona.buses import Broker, Clock

from esper.errors import EnvelopeError
from esper.observe.event_log import EventLog
from esper.oona import dead_letters
from esper.oona import envelope as wire
from esper.oona.answers import Answer, Intent, answer_entry, intent_entry
from esper.oona.backoff import Backoff, CircuitBreaker
from esper.oona.bus import Delivery
from esper.oona.follower import Follower
from esper.oona.outbox import Outbox, acknowledgement, event
from esper.oona.schemas import decode_payload
from esper.oona.sender import Sender
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, DEAD_LETTERS, EPOCHS, LIFECYCLE
from esper.protocol import (
    Acknowledgement,
    AnyEvent,
    Germinated,
    HeldOut,
    Order,
    Overhead,
    RunFinished,
    Stop,
    Stopped,
    Telemetry,
    TrainLoss,
)
from esper.runs.record import RunRecord
from esper.safety.command_log import CommandLog
from esper.safety.disk import LocalDisk
from esper.safety.simulation.disk import SimulatedDisk

pytestmark = pytest.mark.component

SENDER = Sender(source="esper/kasmina", run="r")


def events(count: int, first: int = 0) -> Iterator[AnyEvent]:
    for step in range(first, first + count):
        if step % 3 == 0:
            yield TrainLoss(step=step, loss=float("nan"), flops=1.0)
        elif step % 3 == 1:
            yield Stopped(step=step, reason=f"reason {step}", arm="grown" if step % 2 else "fixed")
        else:
            yield HeldOut(step=step, loss=1.0, params=1, flops=1.0)


class Rig:
    def __init__(self, folder: Path, *, disk: Any = None, broker: Broker | None = None, clock: Clock | None = None):
        self.log, self.broker, self.clock = folder / "events.jsonl", broker or Broker(), clock or Clock()
        self.disk = disk or SimulatedDisk()
        self.start()

    def start(self) -> None:
        """A new process: nothing is left of the old one but what is on the disk."""
        follower = Follower(self.log, Path("/simulated/cursor"), disk=self.disk)
        self.outbox = Outbox(
            self.broker, SENDER, follower, event, clock=self.clock,
            breaker=CircuitBreaker(clock=self.clock, rest_s=1.0, most_rest_s=2.0),
            backoff=Backoff(generator=random.Random(0)),
        )  # fmt: skip

    def turns(self, count: int = 20) -> None:
        async def turning() -> None:
            for _ in range(count):
                if await self.outbox.turn() is not None:
                    return

        asyncio.run(turning())

    def write(self, *told: AnyEvent) -> None:
        with EventLog(self.log) as log:
            for one in told:
                log.append(one)


def test_events_go_where_they_belong_in_their_order(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    told = list(events(9))
    rig.write(*told)
    rig.turns()
    curves, life = rig.broker.envelopes(EPOCHS), rig.broker.envelopes(LIFECYCLE)
    assert [repr(decode_payload(e).event) for e in curves] == [repr(e) for e in told if not isinstance(e, Stopped)]
    assert [decode_payload(e).event for e in life] == [e for e in told if isinstance(e, Stopped)]
    assert [e.extensions["sequence"] for e in life] == ["1", "4", "7"]
    assert [e.subject for e in life] == ["grown-seed0", "fixed-seed0", "grown-seed0"]
    assert life[0].type == "esper.event.stopped"
    assert {message.key for _, message in rig.broker.taken} == {"r/grown-seed0", "r/fixed-seed0"}
    assert abs(wire.seconds(life[0].time) - decode_payload(life[0]).time) < 1e-3
    assert rig.outbox.counts()["sent"] == 9


@pytest.mark.parametrize(
    ("one", "topic"),
    [
        (Telemetry(step=1, sites=(), activation_mean=(), activation_var=(), gradient_energy=(), grown=()), EPOCHS),
        (Overhead(step=1, num_steps=1, milliseconds={}), EPOCHS),
        (RunFinished(step=1, summary={}), LIFECYCLE),
        (Germinated(
            step=1, cohort=1, seeds=(), sites=(), blueprints=(), starts=(), widths=(), added_params=0, reason="",
        ), LIFECYCLE),
    ],
)  # fmt: skip
def test_curves_are_told_apart_from_life(tmp_path: Path, one: AnyEvent, topic: Any) -> None:
    rig = Rig(tmp_path)
    rig.write(one)
    rig.turns()
    assert len(rig.broker.envelopes(topic)) == 1


def test_a_crash_between_the_brokers_answer_and_the_cursor_repeats_and_loses_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(*events(10))
    rig.turns()
    first = [e.id for e in rig.broker.envelopes()]
    rig.start()  # killed: the cursor was not written yet
    rig.turns()
    assert [e.id for e in rig.broker.envelopes()] == first * 2
    rig.clock.now += 5
    rig.write(*events(1, first=10))
    rig.turns()  # the cursor is written now
    rig.start()
    rig.turns()
    assert len(rig.broker.envelopes()) == 21
    assert len(rig.broker.ids()) == 11


@pytest.mark.parametrize("seed", range(10))
def test_through_any_failures_every_event_arrives_once_by_its_id(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig(tmp_path, broker=Broker(seed=seed))
    written = 0
    for _ in range(30):
        new = rng.randrange(4)
        rig.write(*events(new, first=written))
        written += new
        rig.broker.failing = rng.choice([0.0, 0.3, 1.0])
        rig.turns(rng.randrange(3))
        rig.clock.now += rng.choice([0.0, 0.5, 40.0])
        if rng.random() < 0.2:
            rig.start()
        if rng.random() < 0.1:
            rig.disk.cut_power(rng)
            rig.start()
    rig.broker.failing = 0.0
    for _ in range(5):
        rig.clock.now += 40
        rig.turns()
    assert sorted(int(e.extensions["sequence"]) for e in _first_of_each(rig.broker)) == list(range(written))
    for topic in (EPOCHS, LIFECYCLE):
        order = [int(e.extensions["sequence"]) for e in _first_of_each(rig.broker) if e in rig.broker.envelopes(topic)]
        assert order == sorted(order)


def _first_of_each(broker: Broker) -> list[wire.Envelope]:
    return list({e.id: e for e in reversed(broker.envelopes())}.values())[::-1]


def test_a_resumed_run_that_tells_it_otherwise_is_sent_anew_from_there(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(*events(6))
    rig.turns()
    rig.log.write_bytes(rig.log.read_bytes()[:-30])  # a power cut took the log's end
    with RunRecord(rig.log, lambda _: None) as record:
        for one in [*list(events(4)), Stopped(step=99, reason="otherwise")]:
            record.emit(one)
    rig.turns()
    found = rig.broker.envelopes(LIFECYCLE)[-1]
    assert decode_payload(found).event == Stopped(step=99, reason="otherwise")
    assert (found.extensions["sequence"], found.extensions["esperrewrites"]) == ("4", "1")
    rig.turns()
    assert rig.outbox.counts()["rewritten"] == 1


def test_what_is_behind_is_known_in_bytes_and_seconds(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.broker.is_away = True
    assert rig.outbox.behind() == (0, 0.0)
    rig.turns()
    rig.write(*events(3))
    rig.clock.now += 7
    rig.turns()
    assert rig.outbox.behind() == (rig.log.stat().st_size, 7.0)
    rig.broker.is_away = False
    rig.clock.now += 60
    rig.turns()
    assert rig.outbox.behind() == (0, 0.0)


def test_a_broker_that_is_away_is_asked_less_and_less(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.broker.is_away = True
    rig.write(*events(3))
    for _ in range(500):
        rig.turns(1)
        rig.clock.now += 0.02
    # waits grow to seconds, then the circuit is open but for a probe every two seconds
    assert 5 <= rig.broker.num_calls == rig.outbox.counts()["failures"] <= 12
    assert rig.outbox.counts()["sent"] == 0


def test_a_backlog_is_sent_in_bounded_batches(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(*events(1700))
    rig.turns()
    assert rig.broker.num_calls == 8  # four batches for two topics
    assert len(rig.broker.ids()) == 1700


def test_a_line_that_nobody_can_read_is_buried_and_not_passed_over(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(*events(1))
    with rig.log.open("ab") as stream:
        stream.write(b'{"v":1,"seq":1}\n{"v":1,"seq":1,"time":1e300,"event":{"type":"stopped"}}\n')
        stream.write(b'{"v":9,"seq":2,"time":1,"event":{"type":"of the future","x":1}}\n')
    rig.turns()
    letters = [
        dead_letters.read_letter(Delivery(topic="", key="", value=m.value, position=""))
        for name, m in rig.broker.taken if name == DEAD_LETTERS.name
    ]  # fmt: skip
    assert [letter.topic for letter in letters] == ["events.jsonl"] * 2
    assert letters[0].original == b'{"v":1,"seq":1}'
    assert "must be an event" in letters[0].reason
    (future,) = rig.broker.envelopes(LIFECYCLE)
    assert (future.dataschema, future.type) == ("esper:event:9", "esper.event.of the future")
    with pytest.raises(EnvelopeError, match="version of 'event', got 9"):
        decode_payload(future)
    assert rig.outbox.counts()["buried"] == 2


def test_a_line_that_is_too_long_for_the_bus_is_buried(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(Stopped(step=1, reason="x" * (3 << 20)), Stopped(step=2, reason="short"))
    rig.turns()
    assert [decode_payload(e).event.step for e in rig.broker.envelopes(LIFECYCLE)] == [2]
    assert rig.outbox.counts()["buried"] == 1


def test_acknowledgements_are_sent_once_they_are_on_the_disk(tmp_path: Path) -> None:
    path, broker = tmp_path / "commands.jsonl", Broker()
    order = Order(command=Stop(reason="enough"), id="7", run="r", job="grown-seed0")
    told = Acknowledgement(id="7", outcome="applied", run="r", job="grown-seed0", step=5)
    with CommandLog(path) as log:
        follower = Follower(path, tmp_path / "cursor", end=lambda: log.num_bytes)
        outbox = Outbox(broker, SENDER, follower, acknowledgement)
        for entry in (intent_entry(Intent(order, 1), 5), answer_entry(Answer(told, "hash"))):
            log.append(entry.id, step=entry.step, payload=entry.payload)
        with path.open("ab") as stream:
            stream.write(path.read_bytes().splitlines(keepends=True)[1])  # written, not synced
        asyncio.run(outbox.turn())
    (sent,) = broker.envelopes(ACKNOWLEDGEMENTS)
    assert decode_payload(sent) == told
    assert (sent.subject, sent.type) == ("grown-seed0", "esper.acknowledgement.applied")
    assert outbox.counts()["skipped"] == 1
    with pytest.raises(EnvelopeError, match="must hold an acknowledgement"):
        acknowledgement(b'{"seal":"","command":{"id":"answer/1","payload":{}}}')
    assert acknowledgement(b'{"seal":"","command":[]}') == []


def test_it_runs_until_it_is_told_to_stop_and_sends_what_is_there(tmp_path: Path) -> None:
    broker, log = Broker(), tmp_path / "events.jsonl"
    follower = Follower(log, tmp_path / "cursor", disk=LocalDisk())
    outbox = Outbox(broker, SENDER, follower, event, poll_s=30.0)

    async def run() -> None:
        stop = asyncio.Event()
        running = asyncio.create_task(outbox.run(stop))
        await asyncio.sleep(0.02)
        with EventLog(log) as writer:
            for one in events(3):
                writer.append(one)
            outbox.nudge()
            for _ in range(200):
                await asyncio.sleep(0.005)
                if len(broker.taken) == 3:
                    break
            assert len(broker.taken) == 3  # long before the next look
            for one in events(2, first=3):
                writer.append(one)
        stop.set()
        await running

    asyncio.run(run())
    outbox.nudge()  # after the end: harmless
    assert len(broker.taken) == 5
    assert Follower(log, tmp_path / "cursor").num_bytes_left == 0


def test_a_cursor_that_cannot_be_written_is_counted(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(*events(1))
    rig.turns()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    rig.disk.create = refuse
    rig.clock.now += 5
    rig.turns()
    assert rig.outbox.counts()["save_failures"] == 1


def test_a_log_that_cannot_be_read_is_a_failure_and_no_end(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.log.mkdir()
    with contextlib.suppress(OSError):
        rig.turns()
    assert rig.outbox.counts()["failures"] == 1


def test_all_answers_of_a_line_are_sent_each_with_an_id_of_its_own(tmp_path: Path) -> None:
    """A step with several orders writes one line."""
    path, broker = tmp_path / "commands.jsonl", Broker()
    told = [Acknowledgement(id=str(n), outcome="applied", run="r", job="grown-seed0", step=5) for n in range(3)]
    poison = Order(command=Stop(reason=""), id="3", run="r", job="grown-seed0")
    given_up = Acknowledgement(id="3", outcome="refused", gate="poison", reason="it kills", run="r", job="grown-seed0")
    with CommandLog(path) as log:
        answers = [*(Answer(one, "hash") for one in told), Answer(given_up, "hash", poison)]
        log.extend([answer_entry(answer) for answer in answers])
    for _ in range(2):  # the second time after a crash that lost the cursor
        outbox = Outbox(broker, SENDER, Follower(path, tmp_path / "none" / "cursor"), acknowledgement)
        asyncio.run(outbox.turn())
    assert len(path.read_bytes().splitlines()) == 1
    assert [decode_payload(sent) for sent in broker.envelopes(ACKNOWLEDGEMENTS)] == [*told, given_up] * 2
    assert len(broker.ids()) == 5, "the same ids again"
    (letter, _) = [decode_payload(sent) for sent in broker.envelopes(DEAD_LETTERS)]
    assert (letter.topic, letter.key, letter.reason) == (COMMANDS.name, "r/grown-seed0", "it kills")
    assert msgspec.json.decode(letter.original, type=Order) == poison
