"""Which URLs are understood, what is said about the others, and that no secret is ever shown."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.buses import TALK, in_loop, numbered, said
from tests.servers import RedisServer, Tansu, certificates, free_port, need_redis

from esper.errors import BusError, ConfigError
from esper.oona.address import Credentials, open_bus, parse, shown

pytestmark = pytest.mark.unit

SECRET = "s3cr3t/@: +ü"


@pytest.mark.parametrize(
    ("url", "hosts", "rest"),
    [
        ("redis://h", (("h", 6379),), {}),
        ("redis://h:1/3", (("h", 1),), {"database": 3}),
        ("rediss://[::1]:7", (("[::1]", 7),), {"has_tls": True}),
        ("redis+cluster://a:1,b,c:3", (("a", 1), ("b", 6379), ("c", 3)), {"is_cluster": True}),
        ("rediss+cluster://a", (("a", 6379),), {"is_cluster": True, "has_tls": True}),
        ("kafka://a,b:1?prefix=team.&timeout=0.5", (("a", 9092), ("b", 1)), {"prefix": "team.", "timeout_s": 0.5}),
        ("kafka+tls://a?sasl=plain", (("a", 9092),), {"has_tls": True, "sasl": "PLAIN"}),
        ("memory://", (), {"name": ""}),
        ("memory://a?prefix=b", (), {"name": "a", "prefix": "b"}),
    ],
)
def test_a_url_is_understood_and_is_one_again_as_a_string(url: str, hosts: Any, rest: dict[str, Any]) -> None:
    address = parse(url, {})
    assert address.hosts == hosts
    for name, value in rest.items():
        assert getattr(address, name) == value
    again = parse(str(address), {})
    assert (again.hosts, again.prefix, again.database, again.scheme) == (
        address.hosts, address.prefix, address.database, address.scheme,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "begins with one of memory://, redis://.*, got ''"),
        ("localhost:6379", "begins with one of"),
        ("amqp://h", "got 'amqp://h'"),
        ("redis://", "followed by HOST:PORT, got ''"),
        ("redis://h:0", "got 'h:0'"),
        ("redis://h:99999", "got 'h:99999'"),
        ("redis://h:1x", "got 'h:1x'"),
        ("redis://a,b", r"is one server, got 2 in .*; redis\+cluster:// takes several"),
        ("redis://h/x", "got /x"),
        ("kafka://h/1", "got /1"),
        ("redis+cluster://h/1", "got /1"),
        ("kafka://a,,b", "got ''"),
        ("kafka://h?prefix=a/b", "letters, digits"),
        ("kafka://h?timeout=soon", "seconds, got 'soon'"),
        ("kafka://h?timeout=nan", "seconds, got 'nan'"),
        ("kafka://h?sasl=GSSAPI", "sasl is one of .*, got 'GSSAPI'"),
        ("kafka://h?sasl=PLAIN", r"needs kafka\+tls://"),
        ("memory://a/b", "followed by a name"),
    ],
)
def test_each_refusal_states_the_rule_and_the_value(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(url, {})


@pytest.mark.parametrize(
    "url",
    [
        f"redis://me:{SECRET}@h", f"redis://:{SECRET}@h:1/2", f"kafka://me:{SECRET}@h,g", f"amqp://me:{SECRET}@h",
        f"me:{SECRET}@h", f"redis://{SECRET}@", f"redis://h?password={SECRET}", f"amqp://h?password={SECRET}",
        f"redis://me:{SECRET}@h?password={SECRET}", f"memory://x?token={SECRET}",
    ],
)  # fmt: skip
def test_a_secret_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_bus(url, {})
    assert "s3cr3t" not in str(caught.value) and ", got " in str(caught.value)
    assert "s3cr3t" not in shown(url)


@given(st.text(min_size=1).filter(lambda text: "*" not in text), st.text(), st.text())
def test_what_stands_before_the_at_is_never_shown(secret: str, before: str, after: str) -> None:
    assert f"{secret}\0@" not in shown(f"redis://{before}{secret}\0@{after}")


def test_credentials_come_from_the_environment_and_are_not_shown(tmp_path: Path) -> None:
    files = {name: str(tmp_path / name) for name in ("CA", "CERT", "KEYFILE")}
    for path in files.values():
        Path(path).touch()
    environ = {"ESPER_BUS_USERNAME": "me", "ESPER_BUS_PASSWORD": SECRET}
    environ |= {f"ESPER_BUS_{name}": path for name, path in files.items()}
    address = parse("rediss://h", environ)
    assert address.credentials == Credentials("me", SECRET, files["CA"], files["CERT"], files["KEYFILE"])
    for text in (repr(address), str(address), repr(address.credentials)):
        assert "s3cr3t" not in text
    assert address.credentials.hide(f"no: {SECRET} s3cr3t%2F%40%3A%20%2B%C3%BC") == "no: *** ***"
    with pytest.raises(ConfigError, match="ESPER_BUS_CA must name a file, got '/none'"):
        parse("rediss://h", {"ESPER_BUS_CA": "/none"})
    with pytest.raises(ConfigError, match="belong together"):
        parse("rediss://h", {"ESPER_BUS_CERT": files["CERT"]})
    with pytest.raises(ConfigError, match="set ESPER_BUS_PASSWORD"):
        parse("rediss://h", {"ESPER_BUS_USERNAME": "me"})


@pytest.mark.parametrize(
    ("url", "module", "extra"), [("redis://h", "redis", "redis"), ("kafka://h", "confluent_kafka", "kafka")]
)
def test_a_missing_package_is_named_with_what_brings_it(url: str, module: str, extra: str, monkeypatch: Any) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == module or n.startswith("esper.oona.")]:
        if name != "esper.oona.address":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'esper-morph\[{extra}\]'"):
        open_bus(url, {})


def everything_said(error: BaseException, *objects: object) -> str:
    """What a log, a traceback or a debugger's ``repr`` would show."""
    text = "".join(traceback.format_exception(error, chain=True))
    return text + "".join(f"{thing!r}{thing}" for thing in objects)


@in_loop
async def test_a_wrong_password_is_refused_without_showing_it(tmp_path: Path) -> None:
    need_redis()
    server = RedisServer(tmp_path, "--requirepass", "right")
    try:
        server.start()
        for environ, says in (
            ({}, "Authentication required"),
            ({"ESPER_BUS_PASSWORD": SECRET}, "invalid|WRONGPASS"),
            ({"ESPER_BUS_USERNAME": "me", "ESPER_BUS_PASSWORD": SECRET}, "invalid|WRONGPASS"),
        ):
            bus = open_bus(server.url, environ)
            with pytest.raises(BusError, match=says) as caught:
                await bus.publish(TALK, numbered(1))
            assert "s3cr3t" not in everything_said(caught.value, bus, bus.address)
            await bus.close()
        bus = open_bus(server.url, {"ESPER_BUS_PASSWORD": "right"})
        await bus.publish(TALK, numbered(1))
        await bus.close()
    finally:
        server.kill()


@in_loop
async def test_kafka_refuses_without_showing_the_password(tansu: Tansu, caplog: Any, capfd: Any) -> None:
    with caplog.at_level(logging.DEBUG):
        bus = open_bus(f"{tansu.url}?timeout=1", {"ESPER_BUS_USERNAME": "me", "ESPER_BUS_PASSWORD": SECRET})
        with pytest.raises(BusError) as caught:
            await bus.publish(TALK, numbered(1))
        await bus.close()
    printed = "".join(capfd.readouterr())
    assert "s3cr3t" not in everything_said(caught.value, bus, bus.address) + caplog.text + printed


@in_loop
async def test_tls_with_our_own_authority(tmp_path: Path) -> None:
    need_redis()
    ca, cert, key = certificates(tmp_path)
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", ca)
    server = RedisServer(tmp_path / "redis", *options)
    ours = {"ESPER_BUS_CA": ca, "ESPER_BUS_CERT": cert, "ESPER_BUS_KEYFILE": key}
    try:
        server.start()
        bus = open_bus(f"rediss://127.0.0.1:{port}", ours)
        subscription = await bus.subscribe([TALK], group="g", consumer="c")
        await bus.publish(TALK, numbered(3))
        assert said(await subscription.receive(3)) == [0, 1, 2]
        await bus.close()
        for environ in ({}, {"ESPER_BUS_CA": ca}):
            # An unknown authority; and a server that wants to know who we are.
            stranger = open_bus(f"rediss://127.0.0.1:{port}?timeout=2", environ)
            with pytest.raises(BusError, match="must answer"):
                await stranger.publish(TALK, numbered(1))
            await stranger.close()
    finally:
        server.kill()
