"""``esper run`` on a bus: all of its events arrive once, a controller elsewhere steers it, a kill loses nothing."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.recorded import write_run
from tests.oona.served import JOB, RUN, Served
from tests.oona.test_link import Operator
from tests.servers import RedisServer, redis_server

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.observe.event_log import read_events
from esper.oona import envelope as wire
from esper.oona.address import open_bus
from esper.oona.link import LinkLimits
from esper.oona.schemas import decode_payload
from esper.oona.signing import Keyring
from esper.oona.steering import Steering
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, DECISIONS, EPOCHS, LIFECYCLE
from esper.protocol import Commanded, Germinated, Order, Stop, Warned
from esper.runs import RunOptions, execute
from esper.runs.bus import _linked, _served, events_followed, name_on_bus
from esper.tamiyo import make_controller

pytestmark = pytest.mark.integration
pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")

KEY = "k" * 40
__all__ = ["redis_server"]


@pytest.fixture
def url(redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ESPER_BUS_KEY", KEY)
    return f"{redis_server.url}?prefix={tmp_path.name[-60:]}"


def options(run_dir: Path, url: str, **changes: Any) -> RunOptions:
    plain: dict[str, Any] = {"steps": 120, "seeds": 1, "lr": (1e-2,), "controls": False, "device": "cpu"}
    return RunOptions(run_dir=run_dir, bus=url, **{**plain, **changes})


class Server(threading.Thread):
    """``esper controller serve`` in a thread."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.steering, self.until = url, None, threading.Event()
        self.ready = threading.Event()

    def run(self) -> None:
        async def work() -> None:
            bus = open_bus(self.url)
            config = TamiyoConfig(last_share=0.6)  # as the runs themselves
            self.steering = Steering(
                bus, lambda: make_controller("heuristic", config), name="heuristic",
                keyring=Keyring({"default": KEY}),
            )  # fmt: skip
            until = asyncio.Event()
            serving = asyncio.create_task(self.steering.serve(until))
            self.ready.set()
            while not self.until.is_set():
                await asyncio.sleep(0.05)
            until.set()
            await serving
            await bus.close()

        asyncio.run(work())


@pytest.fixture
def server(url: str) -> Iterator[Server]:
    server = Server(url)
    server.start()
    assert server.ready.wait(10)
    yield server
    server.until.set()
    server.join(10)
    assert not server.is_alive()


def test_every_event_arrives_once_and_in_order(url: str, tmp_path: Path) -> None:
    notes: list[str] = []
    execute(options(tmp_path / "run", url), lambda event: None, notes.append)
    run = name_on_bus(tmp_path / "run")
    assert any(run in note and "takes commands" in note for note in notes)
    written = list(read_events(tmp_path / "run" / "events.jsonl"))
    operator = Operator(url, KEY)
    found = {topic.name: [wire.decode(d.value) for d in operator.on(topic)] for topic in (LIFECYCLE, EPOCHS)}
    told = [decode_payload(envelope) for part in found.values() for envelope in part]
    assert sorted(record.seq for record in told) == [record.seq for record in written]
    for part in found.values():
        numbers = [int(envelope.extensions["sequence"]) for envelope in part]
        assert numbers == sorted(numbers) and all(envelope.esperrun == run for envelope in part)


@pytest.mark.filterwarnings("ignore:no remote controller was heard yet", "ignore:a remote controller steers")
def test_a_controller_elsewhere_steers_and_is_answered(url: str, server: Server, tmp_path: Path) -> None:
    """Its decisions arrive as orders: each is in the run's log, applied or refused, with its name."""
    end = time.monotonic() + 60
    for number in range(20):
        run_dir = tmp_path / f"run{number}"
        execute(options(run_dir, url, controller="remote", steps=1500, seed=number), lambda event: None)
        events = [record.event for record in read_events(run_dir / "events.jsonl")]
        commanded = [event for event in events if isinstance(event, Commanded)]
        steers = any(isinstance(event, Warned) and "remote controller steers" in event.message for event in events)
        if (commanded and steers) or time.monotonic() > end:  # after a Stop nobody asks whether somebody steers
            break
    assert commanded and {event.issuer for event in commanded} == {"tamiyo"}
    assert any(isinstance(event, Germinated) for event in events) and steers
    operator = Operator(url, KEY)
    orders = {wire.decode(d.value).id for d in operator.on(COMMANDS)}
    answered = [decode_payload(wire.decode(d.value)) for d in operator.on(ACKNOWLEDGEMENTS)]
    assert {told.id for told in answered} == orders and len(answered) == len(orders)
    assert {event.id for event in commanded} <= orders
    assert len(operator.on(DECISIONS)) >= len(orders)


@pytest.mark.filterwarnings("ignore:no remote controller was heard yet")
def test_without_a_server_the_local_controller_decides(url: str, tmp_path: Path) -> None:
    execute(options(tmp_path / "run", url, controller="remote", steps=300), lambda event: None)
    events = [record.event for record in read_events(tmp_path / "run" / "events.jsonl")]
    assert any(isinstance(event, Germinated) for event in events)
    assert not any(isinstance(event, Commanded) for event in events)


def test_a_remote_controller_needs_a_bus() -> None:
    with pytest.raises(ConfigError, match="reached over a bus"):
        RunOptions(controller="remote")


def test_a_run_keeps_its_name(tmp_path: Path) -> None:
    one, two = name_on_bus(tmp_path), name_on_bus(tmp_path)
    assert one == two
    (tmp_path / "bus" / "name.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="name on the bus"):
        name_on_bus(tmp_path)


class Store:
    """Where a training's log is."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.commands_path = folder / "commands.jsonl"


def test_what_could_not_be_told_is_told_by_the_next_start(url: str, tmp_path: Path) -> None:
    """The training ends while the broker is away, and its checkpoints and logs go with it."""
    life = Served(tmp_path / "life", desk=False)
    run_dir = tmp_path / "run"
    (run_dir / "bus").mkdir(parents=True)
    away = options(run_dir, "redis://127.0.0.1:1?timeout=0.2")
    store: Any = Store(run_dir / "progress")
    limits = LinkLimits(stop_s=0.5)
    with _linked(away, Keyring({"default": KEY}), life.grower, store, run_dir, "job", limits=limits):
        life.grower._desk.submit(Order(id="one", command=Stop(reason="enough"), issuer="ada"))
        life.train(2)
    life.grower.detach()
    assert life.grower.stopped == "enough"
    shutil.rmtree(run_dir / "progress")
    (run_dir / "events.jsonl").touch()
    notes: list[str] = []
    with events_followed(options(run_dir, url), run_dir, notes.append):
        told = Operator(url, KEY).until(lambda: None, ACKNOWLEDGEMENTS)
    assert [decode_payload(wire.decode(d.value)).id for d in told] == ["one"]
    assert not list((run_dir / "bus").glob("*/answers-left*")) and len(notes) == 1
    with events_followed(away, run_dir, notes.append):
        pass
    assert len(notes) == 2


def test_reports_that_cannot_be_written_down_cost_the_run_nothing(tmp_path: Path) -> None:
    run_dir, notes = write_run(tmp_path / "run"), list[str]()
    with events_followed(options(run_dir, "memory://reports"), run_dir, notes.append) as report:
        report()
        (run_dir / "bus" / "reports.jsonl").write_text("damaged\n" * 2, encoding="utf-8")
        report()
    assert "Karn's reports have not gone to the bus: field reports are written down" in notes[-1]
    with events_followed(RunOptions(), run_dir, notes.append) as report:
        report()
    assert len(notes) == 2


def test_a_training_that_took_orders_is_resumed_without_a_bus(tmp_path: Path) -> None:
    life = Served(tmp_path, desk=True)
    life.desk.submit(Order(id="one", command=Stop(reason="enough"), issuer="ada"))
    life.train(3)
    life.save()
    life.end()
    again = Served(tmp_path, desk=False)
    store: Any = Store(tmp_path / "progress")
    shutil.move(tmp_path / "commands.jsonl", store.commands_path)
    (tmp_path / "bus").mkdir()
    (tmp_path / "bus" / "name.json").write_text(f'{{"run": "{RUN}"}}', encoding="utf-8")
    with _served(again.grower, store, tmp_path, JOB):
        again.resume()
        again.train(1)
    assert again.grower.stopped == "enough" and again.steps == 4
    again.grower.detach()
