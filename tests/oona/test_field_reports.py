"""From a link to a database, over a bus in this process and over real servers, which die on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.karn.made import report
from tests.oona.served import Served
from tests.servers import RedisServer, RedisTrio, Tansu, redis_server, redis_trio, tansu

from esper.karn import Database, FieldReport
from esper.oona.address import open_bus
from esper.oona.link import Link, LinkLimits
from esper.oona.operators import held
from esper.oona.registrar import Registrar
from esper.oona.signing import Keyring
from esper.oona.topics import FIELD_REPORTS

pytestmark = pytest.mark.integration

KEY = "k" * 40
ENVIRON = {"ESPER_BUS_KEY": KEY}
__all__ = ["redis_server", "redis_trio", "tansu"]


@pytest.fixture(params=["memory", "redis", "redis-cluster", "kafka-tansu"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://{tmp_path.name[-60:]}"
    names = {"redis": "redis_server", "redis-cluster": "redis_trio", "kafka-tansu": "tansu"}
    server: RedisServer | RedisTrio | Tansu = request.getfixturevalue(names[request.param])
    return f"{server.url}?prefix={tmp_path.name[-60:]}."


class Listener(threading.Thread):
    """Files reports in a thread of its own until it has seen ``most`` or is told to end."""

    def __init__(self, url: str, db: Path, *, most: int | None = None, group: str = "karn") -> None:
        super().__init__(daemon=True)
        self.url, self.db, self.most, self.group = url, db, most, group
        self.stop, self.notes, self.counts = threading.Event(), list[str](), dict[str, int]()

    def store(self, reports: Sequence[FieldReport]) -> int:
        with Database(self.db) as database:
            return database.file(reports)

    def run(self) -> None:
        async def work() -> None:
            bus = open_bus(self.url, ENVIRON)
            registrar = Registrar(
                bus, self.store, group=self.group, consumer="one", keyring=Keyring({"default": KEY}),
                most=self.most, redeliver_s=1.0, on_note=self.notes.append,
            )  # fmt: skip
            until = asyncio.Event()
            serving = asyncio.create_task(registrar.serve(until))
            while not self.stop.is_set() and not serving.done():
                await asyncio.sleep(0.01)
            until.set()
            await serving
            await bus.close()
            self.counts = dict(registrar.counts)

        asyncio.run(work())

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join(20)
        assert not self.is_alive()


def filed(db: Path) -> list[FieldReport]:
    with Database(db) as database:
        return database.reports()


def wait_for(db: Path, num: int) -> None:
    end = time.monotonic() + 30
    while len(filed(db)) < num:
        assert time.monotonic() < end, len(filed(db))
        time.sleep(0.02)


def link_to(url: str, folder: Path, run: str = "run", **settings: Any) -> Link:
    return Link(url, run=run, folder=folder, environ=ENVIRON, **settings)


def test_many_runs_feed_one_karn(url: str, tmp_path: Path) -> None:
    """Some of them before it listens; each report arrives once however often it is told."""
    db, runs = tmp_path / "karn.db", [f"run-{number}" for number in range(4)]
    told = {run: [report(cohort, run=f"{run}@1") for cohort in range(5)] for run in runs}
    for run in runs[:2]:
        link = link_to(url, tmp_path / run, run)
        assert link.report(told[run][:3]) == 3
        assert link.report(told[run]) == 2
        assert link.stop() and link.bytes_behind == 0
    with Listener(url, db, most=20) as listener:
        for run in runs[2:]:
            link = link_to(url, tmp_path / run, run)
            link.report(told[run])
            assert link.stop()
        for run in runs:  # all of them again, as a run does that is started anew
            link = link_to(url, tmp_path / run, run)
            assert link.report(told[run]) == 0
            link.stop()
        listener.join(30)
    assert listener.counts == {"filed": 20, "new": 20}
    assert filed(db) == sorted((one for part in told.values() for one in part), key=lambda one: one.id)
    with Listener(url, db) as listener:
        time.sleep(0.5)
    assert listener.counts.get("filed", 0) == 0, "all of it is acknowledged"


def test_a_training_reports_at_its_end_and_the_next_life_sends_what_is_left(tmp_path: Path) -> None:
    life, url = Served(tmp_path, desk=False), f"memory://{tmp_path.name[-60:]}"
    away = link_to("redis://127.0.0.1:1?timeout=0.2", tmp_path / "bus", job="job", limits=LinkLimits(stop_s=0.5))
    with away.serving(life.grower, tmp_path / "commands.jsonl"):
        life.train(2)
        assert away.report([report(0), report(1)]) == 2
    assert away.bytes_behind > 0
    back = link_to(url, tmp_path / "bus", job="job")
    with back.serving(life.grower, tmp_path / "commands.jsonl"):
        life.train(1)
    life.grower.detach()
    db = tmp_path / "karn.db"
    with Listener(url, db, most=2) as listener:
        listener.join(20)
    assert filed(db) == [report(0), report(1)]


def test_a_server_that_is_killed_again_and_again_loses_and_doubles_nothing(
    durable_redis: RedisServer, tmp_path: Path
) -> None:
    db, num = tmp_path / "karn.db", 60
    url = f"{durable_redis.url}?prefix=p.&timeout=1"
    link = link_to(url, tmp_path / "bus")
    with Listener(url, db) as listener:
        for cohort in range(num):
            link.report([report(cohort)])
            if cohort % 20 == 10:
                durable_redis.kill()
                time.sleep(0.1)
            if cohort % 20 == 15:
                durable_redis.start()
        wait_for(db, num)
        assert any("the bus fails" in note for note in listener.notes)
    assert link.stop() and link.bytes_behind == 0
    assert [one.cohort for one in filed(db)] == sorted(range(num), key=lambda n: f"run/grown/0/{n}")
    assert listener.counts["new"] == num

    async def left() -> tuple[int, list[Any]]:
        bus = open_bus(url, ENVIRON)
        try:
            return await bus.backlog(FIELD_REPORTS, "karn"), await held(bus, FIELD_REPORTS, 1000, wait_s=0.1)
        finally:
            await bus.close()

    backlog, sent = asyncio.run(left())
    assert backlog == 0 and len(sent) >= num


DIES = """
import os, sys
from esper.cli import main
from esper.karn import Database

keep = Database.file

def keep_and_die(self, reports):
    keep(self, reports)
    os.kill(os.getpid(), 9)

Database.file = keep_and_die
main(["karn", "listen", "--bus", sys.argv[1], "--db", sys.argv[2]])
"""


def test_a_listener_that_is_killed_between_storing_and_acknowledging(
    durable_redis: RedisServer, tmp_path: Path
) -> None:
    db, url = tmp_path / "karn.db", f"{durable_redis.url}?prefix=p."
    link = link_to(url, tmp_path / "bus")
    link.report([report(cohort) for cohort in range(5)])
    assert link.stop()
    words = [sys.executable, "-c", DIES, url, str(db)]
    died = subprocess.run(words, env={**os.environ, **ENVIRON}, timeout=60, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    durable_redis.kill()
    durable_redis.start()
    with Database(db) as database:
        group = f"karn {database.identity}"
    assert len(filed(db)) == 5, "it has stored them"
    with Listener(url, db, group=group, most=5) as second:
        second.join(20)
    assert second.counts == {"filed": 5, "new": 0} and len(filed(db)) == 5
