"""A training on a bus: it is heard, it can be commanded, it never waits, and it is the same training."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.oona.served import Served
from tests.servers import RedisServer, redis_server

from esper.oona import envelope as wire
from esper.oona.address import open_bus
from esper.oona.incoming import nobody
from esper.oona.link import Link, LinkLimits
from esper.oona.operators import ask, held
from esper.oona.remote import RemoteController
from esper.oona.schemas import decode_payload
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, DEAD_LETTERS, HEALTH, HEARTBEATS, OBSERVATIONS, Topic
from esper.protocol import Acknowledgement, Cancel, Command, GrowthPaused, Pause, SetBudget, Stop
from esper.safety.tree import digest

pytestmark = pytest.mark.integration

KEY = "k" * 40
__all__ = ["redis_server"]
"""A fixture, used by its name."""


class Operator:
    """Somebody at another desk: commands from a thread of its own while the training goes on."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.keyring = url, None if key is None else Keyring.of(key)

    def ask(
        self, training: Callable[[], None], command: Command, wait_s: float = 10.0, issuer: str = "ada"
    ) -> Acknowledgement | None:
        told: list[Acknowledgement | None] = []

        async def work() -> None:
            bus = open_bus(self.url, {})
            sender = Sender(source="esper/operator", run="run", subject="job", keyring=self.keyring)
            try:
                told.append(await ask(bus, sender, command, issuer=issuer, wait_s=wait_s))
            finally:
                await bus.close()

        thread = threading.Thread(target=lambda: asyncio.run(work()))
        thread.start()
        while thread.is_alive():
            training()
            time.sleep(0.01)
        thread.join()
        return told[0]

    def on(self, topic: Topic) -> list[Any]:
        async def work() -> list[Any]:
            bus = open_bus(self.url, {})
            try:
                return await held(bus, topic, 1000, wait_s=0.1)
            finally:
                await bus.close()

        return asyncio.run(work())

    def until(self, training: Callable[[], None], topic: Topic, count: int = 1, seconds: float = 20.0) -> list[Any]:
        """What is on a topic once it is so much."""
        end = time.monotonic() + seconds
        while len(found := self.on(topic)) < count:
            assert time.monotonic() < end, f"{topic.name} has {len(found)} of {count}"
            training()
        return found


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{tmp_path.name[-60:]}"
    server: RedisServer = request.getfixturevalue("redis_server")
    return f"{server.url}?prefix={tmp_path.name[-60:]}"


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Served]:
    life = Served(tmp_path, desk=False)
    yield life
    life.grower.detach()


def link_to(url: str, folder: Path, **settings: Any) -> Link:
    settings = {"environ": {"ESPER_BUS_KEY": KEY}, **settings}
    return Link(url, run="run", job="job", folder=folder / "bus", **settings)


def test_commands_are_applied_and_answered(url: str, life: Served) -> None:
    operator = Operator(url, KEY)
    with link_to(url, life.folder).serving(life.grower, life.folder / "commands.jsonl"):
        stopped = operator.ask(life.step, Stop(reason="enough"))
        refused = operator.ask(life.step, Cancel(cohort=7, reason="?"))
    assert stopped is not None and (stopped.outcome, stopped.issuer, stopped.kind) == ("applied", "ada", "stop")
    assert (
        refused is not None and refused.outcome == "refused" and "no active cohort has the number 7" in refused.reason
    )
    assert life.grower.stopped == "enough"
    assert (life.folder / "commands.jsonl").read_bytes().count(b"\n") == 4


@pytest.mark.filterwarnings("ignore:no remote controller was heard yet")
def test_telemetry_observations_and_heartbeats_go_out(url: str, life: Served) -> None:
    operator = Operator(url, KEY)
    link = link_to(url, life.folder)
    remote = RemoteController(life.grower.controller, line=link)
    life.grower.controller = remote
    with link.serving(life.grower, life.folder / "commands.jsonl"):
        health = decode_payload(wire.decode(operator.until(life.step, HEALTH)[0].value))
        seen = decode_payload(wire.decode(operator.until(life.step, OBSERVATIONS)[0].value))
        beat = decode_payload(wire.decode(operator.until(life.step, HEARTBEATS)[0].value))
        assert link.heard is None and not remote.is_steered
    assert health.head.sites == tuple(life.grower.kasmina.sites) and health.mean.shape == (int(health.offsets[-1]),)
    assert seen.site_names == health.head.sites
    assert beat.role == "job" and beat.state == "training"
    counts: Any = link.counts()
    told = counts["telemetry"]
    assert told["offered"] + told["recovered"] == told["delivered"] + told["dropped"] + told["pending"]
    assert told["delivered"] >= 3 and told["dropped"] == 0


def test_the_training_is_the_same_with_a_bus(url: str, tmp_path: Path) -> None:
    plain = Served(tmp_path / "plain", desk=False)
    plain.train(30)
    linked = Served(tmp_path / "linked", desk=False)  # seeds the global generators as the other one did
    with link_to(url, linked.folder).serving(linked.grower, linked.folder / "commands.jsonl"):
        linked.train(30)
    assert digest(plain.grower.state_dict()) == digest(linked.grower.state_dict())
    assert plain.told() == linked.told()
    for life in (plain, linked):
        life.grower.detach()


def test_without_a_key_others_cannot_command(life: Served, redis_server: RedisServer) -> None:
    url = f"{redis_server.url}?prefix={life.folder.name[-60:]}"
    link = link_to(url, life.folder, environ={})
    assert not link.takes_commands and link._verify() is nobody
    operator = Operator(url)
    with link.serving(life.grower, life.folder / "commands.jsonl"):
        assert operator.ask(life.step, Stop(reason="mine now"), wait_s=0.5) is None
        letters = operator.until(life.step, DEAD_LETTERS)
    assert life.grower.stopped is None
    assert b"signed" in letters[0].value and KEY.encode() not in letters[0].value


def test_a_key_commands_in_the_name_of_its_owner_only(url: str, life: Served) -> None:
    ada, bob = f"ada:{'a' * 32}", f"bob:{'b' * 32}"
    ring = {"ESPER_BUS_KEY": f"run:{KEY} {ada} {bob}"}
    with link_to(url, life.folder, environ=ring).serving(life.grower, life.folder / "commands.jsonl"):
        operator = Operator(url, f"{bob} run:{KEY}")
        before = digest(life.grower.state_dict()["esper"]["desk"])
        assert operator.ask(lambda: None, Stop(reason="not mine"), wait_s=1.0, issuer="ada") is None
        assert digest(life.grower.state_dict()["esper"]["desk"]) == before
        told = operator.ask(life.step, Pause(reason="mine"), issuer="bob")
        letters = operator.until(life.step, DEAD_LETTERS)
    assert told is not None and (told.outcome, told.issuer) == ("applied", "bob")
    assert life.grower.stopped is None
    assert (
        "issuer must be 'bob', whose key 'bob' has signed it, got 'ada'"
        in decode_payload(wire.decode(letters[0].value)).reason
    )


def test_unsigned_commands_are_taken_where_the_user_says_so(life: Served, redis_server: RedisServer) -> None:
    url = f"{redis_server.url}?prefix={life.folder.name[-60:]}"
    link = link_to(url, life.folder, environ={}, allow_unsigned=True)
    with link.serving(life.grower, life.folder / "commands.jsonl"):
        told = Operator(url).ask(life.step, Stop(reason="said so"))
    assert told is not None and told.outcome == "applied"


def test_orders_for_others_change_nothing(url: str, life: Served) -> None:
    operator = Operator(url, KEY)
    link = Link(url, run="run", job="other", folder=life.folder / "bus", environ={"ESPER_BUS_KEY": KEY})
    with link.serving(life.grower, life.folder / "commands.jsonl"):
        assert operator.ask(life.step, Stop(reason="not you"), wait_s=0.5) is None
    assert life.grower.stopped is None
    assert operator.on(ACKNOWLEDGEMENTS) == [] and operator.on(DEAD_LETTERS) == []


def test_a_broker_that_is_not_there_costs_the_training_nothing(tmp_path: Path) -> None:
    life = Served(tmp_path, desk=False)
    limits = LinkLimits(stop_s=0.5)
    link = Link(
        "redis://127.0.0.1:1?timeout=0.2", run="run", job="job", folder=tmp_path / "bus",
        environ={"ESPER_BUS_KEY": KEY},
        limits=limits,
    )  # fmt: skip
    with link.serving(life.grower, tmp_path / "commands.jsonl"):
        life.train(40)
        counts: Any = link.counts()
    assert life.steps == 40
    told = counts["telemetry"]
    assert told["delivered"] == 0 and told["offered"] == told["pending"] + told["dropped"]
    life.grower.detach()


def test_far_behind_growth_pauses_and_only_endings_are_taken(life: Served) -> None:
    """The run's own log counts, which another link sends: here nobody does."""
    url = f"memory://{life.folder.name[-60:]}"
    operator = Operator(url, KEY)
    events = life.folder / "events.jsonl"
    logs = [(events, life.folder / "events.cursor")]
    link = link_to(url, life.folder, limits=LinkLimits(behind_bytes=1000), run_logs=logs)
    with link.serving(life.grower, life.folder / "commands.jsonl"):
        events.write_bytes(b"x" * 4999 + b"\n")
        until(life.step, lambda: life.grower.loop.paused is not None)
        assert "5,000 bytes behind" in str(life.grower.loop.paused)
        told = operator.ask(life.step, SetBudget(params=10_000))
        assert told is not None and told.outcome == "refused" and "too far ahead" in told.reason
        told = operator.ask(life.step, Stop(reason="enough"))
        assert told is not None and told.outcome == "applied"
        events.unlink()
        until(life.step, lambda: life.grower.loop.paused is None)
    paused = [event.paused for event in life.events if isinstance(event, GrowthPaused)]
    assert paused == [True, False]


def test_what_a_person_has_paused_stays_paused(life: Served) -> None:
    url = f"memory://{life.folder.name[-60:]}"
    operator = Operator(url, KEY)
    events = life.folder / "events.jsonl"
    logs = [(events, life.folder / "events.cursor")]
    link = link_to(url, life.folder, limits=LinkLimits(behind_bytes=1000), run_logs=logs)
    with link.serving(life.grower, life.folder / "commands.jsonl"):
        events.write_bytes(b"x" * 4999 + b"\n")
        until(life.step, lambda: life.grower.loop.paused is not None)
        told = operator.ask(life.step, Pause(reason="I am looking at it"))
        assert told is not None and told.outcome == "applied"
        events.unlink()
        end = time.monotonic() + 1.5
        until(life.step, lambda: time.monotonic() > end)
        assert life.grower.loop.paused == "I am looking at it"


def test_a_pause_of_the_bus_ends_in_the_next_life(life: Served) -> None:
    """It stands in the checkpoint; whose it is too."""
    url = f"memory://{life.folder.name[-60:]}"
    life.grower.loop.paused = "the bus is 9 bytes behind the run's logs, more than 8"
    with link_to(url, life.folder).serving(life.grower, life.folder / "commands.jsonl"):
        until(life.step, lambda: life.grower.loop.paused is None)


def test_what_comes_at_the_end_is_answered(url: str, life: Served) -> None:
    """Between the last step and the end of the link somebody commands: it is refused, and that is told."""
    operator = Operator(url, KEY)
    told: list[Acknowledgement | None] = []
    link = link_to(url, life.folder)
    with link.serving(life.grower, life.folder / "commands.jsonl"):
        operator.until(life.step, HEALTH)
        late = threading.Thread(
            target=lambda: told.append(operator.ask(lambda: None, Stop(reason="too late"), wait_s=5.0))
        )
        late.start()
        time.sleep(0.3)
    late.join()
    assert told[0] is None or told[0].gate == "ended"
    assert told[0] is not None


def test_a_controller_outside_of_serving_costs_nothing(life: Served) -> None:
    life.grower.controller = RemoteController(life.grower.controller, line=link_to("memory://idle", life.folder))
    with pytest.warns(RuntimeWarning, match="no remote controller"):
        life.train(10)


def until(training: Callable[[], None], holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        training()
        time.sleep(0.005)


def test_events_are_followed_and_nothing_is_sent_twice_after_a_second_life(url: str, life: Served) -> None:
    from esper.observe.event_log import EventLog

    operator = Operator(url)
    path = life.folder / "events.jsonl"
    for steps in (15, 15):
        life.train(steps)
        with EventLog(path) as log:
            for event in life.events[log.next_seq :]:
                log.append(event)
        link = Link(url, run="run", folder=life.folder / "bus", environ={})
        link.follow(path)
        end = time.monotonic() + 20
        while link.bytes_behind:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert link.stop()
    from esper.oona.topics import EPOCHS, LIFECYCLE

    found = [wire.decode(d.value) for topic in (LIFECYCLE, EPOCHS) for d in operator.on(topic)]
    assert len(found) == len(life.events) and len({e.id for e in found}) == len(found)
    assert sorted(int(e.extensions["sequence"]) for e in found) == list(range(len(life.events)))


def test_when_the_training_is_over_nobody_waits_for_it(life: Served, redis_server: RedisServer) -> None:
    url = f"{redis_server.url}?prefix={life.folder.name[-60:]}"
    with link_to(url, life.folder).serving(life.grower, life.folder / "commands.jsonl"):
        assert Operator(url, KEY).ask(life.step, Stop(reason="enough")) is not None

    async def groups() -> int:
        bus = open_bus(url, {})
        try:
            return await bus.backlog(COMMANDS, "training run/job")
        finally:
            await bus.close()

    with pytest.raises(Exception, match="no group"):
        asyncio.run(groups())
