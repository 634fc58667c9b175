"""Redis that is reached over TLS alone, by a user who may do what the bus needs and nothing else (an ACL)."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.buses import TALK, in_loop, numbered, said
from tests.models import Pair
from tests.rigs import Rig, attach
from tests.servers import RedisServer, certificates, need, need_redis

from esper.errors import BusError
from esper.oona.address import open_bus
from esper.oona.link import Link
from esper.oona.operators import ask
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.stores import open_claims
from esper.protocol import Pause

pytestmark = pytest.mark.integration

SECRET, KEY = "s3cr3t-Pass,word;=x", "k" * 40
MAY = ("~esper.*", "-@all", "+@stream", "+eval", "+exists", "+memory|usage", "+getrange", "+set")
"""What docs/bus.md says that a user of the bus needs."""


class GuardedRedis(RedisServer):
    """No port without TLS; the default user is off; ``esper`` has a password and few rights, ``reader`` fewer."""

    def __init__(self, folder: Path) -> None:
        self.ca, self.cert, self.key = certificates(folder)
        super().__init__(folder / "redis")
        self._options = (
            "--tls-port", str(self.port), "--tls-cert-file", self.cert, "--tls-key-file", self.key,
            "--tls-ca-cert-file", self.ca, "--tls-auth-clients", "no", "--user", "default", "off",
            "--user", "esper", "on", f">{SECRET}", *MAY,
            "--user", "reader", "on", f">{SECRET}", "~*", "-@all", "+@read",
        )  # fmt: skip

    @property
    def url(self) -> str:
        return f"rediss://127.0.0.1:{self.port}?prefix=esper.&timeout=2"

    def command(self) -> list[str]:
        words = super().command()
        words[words.index("--port") + 1] = "0"
        return words

    def answers(self) -> bool:
        return super(RedisServer, self).answers()

    def environ(self, **changes: str) -> dict[str, str]:
        ours = {"ESPER_BUS_CA": self.ca, "ESPER_BUS_USERNAME": "esper", "ESPER_BUS_PASSWORD": SECRET}
        return {**ours, "ESPER_BUS_KEY": KEY, **changes}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    need_redis()
    need("redis")
    server = GuardedRedis(tmp_path_factory.mktemp("guarded"))
    server.start()
    yield server
    server.kill()


def everything_said(error: BaseException, *objects: object) -> str:
    text = "".join(traceback.format_exception(error, chain=True))
    return text + "".join(f"{thing!r}{thing}" for thing in objects)


@in_loop
async def test_a_user_with_few_rights_can_do_all_that_a_bus_does(guarded: GuardedRedis) -> None:
    bus, claims = open_bus(guarded.url, guarded.environ()), open_claims(guarded.url, guarded.environ())
    assert claims is not None
    subscription = await bus.subscribe([TALK], group="g", consumer="one", redeliver_s=0.2)
    await bus.publish(TALK, numbered(40))
    got = await subscription.receive(30)
    await subscription.acknowledge(got[:10])
    await subscription.close()  # what it holds goes to the heir
    other = await bus.subscribe([TALK], group="g", consumer="two", redeliver_s=0.2)
    again: list[Any] = []
    while len(again) < 30:
        some = await other.receive(40, 0.5)
        again += some
        await other.acknowledge(some)
    assert sorted(said(again)) == list(range(10, 40)) and await bus.backlog(TALK, "g") == 0
    await bus.forget([TALK], "g")
    await bus.close()
    await claims.store.put("large", b"x" * 1000)
    assert await claims.store.get("large", 2000) == b"x" * 1000
    await claims.store.close()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ESPER_BUS_PASSWORD": SECRET + "x"}, "WRONGPASS|invalid"),
        ({"ESPER_BUS_USERNAME": "nobody"}, "WRONGPASS|invalid"),
        ({"ESPER_BUS_USERNAME": "", "ESPER_BUS_PASSWORD": ""}, "Authentication required"),
        ({"ESPER_BUS_USERNAME": "reader"}, "permissions|NOPERM"),
        ({"ESPER_BUS_CA": ""}, "must answer"),
    ],
)
@in_loop
async def test_nobody_else_gets_in_and_no_secret_is_shown(
    changes: dict[str, str], says: str, guarded: GuardedRedis, caplog: Any, capfd: Any
) -> None:
    with caplog.at_level(logging.DEBUG):
        bus = open_bus(guarded.url, guarded.environ(**changes))
        with pytest.raises(BusError, match=says) as caught:
            await bus.publish(TALK, numbered(1))
        await bus.close()
    assert SECRET not in everything_said(caught.value, bus, bus.address) + caplog.text + "".join(capfd.readouterr())


@in_loop
async def test_other_keys_of_the_server_are_not_ours(guarded: GuardedRedis) -> None:
    bus = open_bus(guarded.url.replace("prefix=esper.", "prefix=theirs."), guarded.environ())
    with pytest.raises(BusError, match=r"permissions|NOPERM|keys"):
        await bus.publish(TALK, numbered(1))
    await bus.close()
    plain = open_bus(guarded.url.replace("rediss", "redis"), guarded.environ())
    with pytest.raises(BusError, match="must answer"):
        await plain.publish(TALK, numbered(1))
    await plain.close()


def test_a_training_is_commanded_over_tls(guarded: GuardedRedis, tmp_path: Path, caplog: Any) -> None:
    rig: Rig = attach(Pair())
    link = Link(guarded.url, run="r", job="j", folder=tmp_path / "bus", environ=guarded.environ())

    async def command() -> Any:
        bus = open_bus(guarded.url, guarded.environ())
        sender = Sender(source="esper/operator", run="r", subject="j", keyring=Keyring.of(KEY))
        try:
            return await ask(bus, sender, Pause(reason="by hand"), issuer="ada", wait_s=30.0)
        finally:
            await bus.close()
            await asyncio.sleep(0.1)  # TLS takes leave a moment later

    async def train_meanwhile() -> Any:
        asked = asyncio.create_task(command())
        while not asked.done():
            rig.train(1)
            await asyncio.sleep(0.02)
        return await asked

    with caplog.at_level(logging.DEBUG), link.serving(rig.grower, tmp_path / "commands.jsonl"):
        told = asyncio.run(train_meanwhile())
    assert told is not None and told.outcome == "applied" and rig.grower.loop.paused == "by hand"
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (SECRET, KEY):
        assert secret.encode() not in written and secret not in caplog.text + repr(link.counts())
