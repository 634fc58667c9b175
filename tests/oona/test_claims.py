"""What is too large for the bus: put away under its hash, found again, or said to be gone."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import BusError, ConfigError, EnvelopeError
from esper.oona import claim_stores
from esper.oona import envelope as wire
from esper.oona.claim_stores import FolderStore, MemoryStore, ObjectStore, RedisStore, make_store
from esper.oona.claims import MOST_BYTES, ClaimExpired, ClaimReference, Claims, ClaimStore
from esper.oona.envelope import ARRAYS, CLAIM, Envelope
from esper.oona.schemas import HEALTH_SCHEMA
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.safety.disk import LocalDisk
from esper.safety.simulation.faults import Fault, FaultyDisk

pytestmark = pytest.mark.component

LARGE = bytes(range(256)) * 8


def a_message(data: bytes = LARGE) -> Envelope:
    return Envelope(
        id="1", source="s", type="t", dataschema="esper:health:1", time="2026-07-01T00:00:00Z",
        datacontenttype=ARRAYS, data=data,
    )  # fmt: skip


class FakeRedis:
    """The two commands that are used; the real server is further down."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.commands: list[tuple[Any, ...]] = []

    async def call(self, key: str, *command: Any, block_s: float = 0.0) -> Any:
        self.commands.append(command)
        if command[0] == "SET":
            self.keys[key] = command[2]
            return b"OK"
        return self.keys.get(key, b"")[command[2] : command[3] + 1]

    async def close(self) -> None:
        self.keys.clear()


STORES: dict[str, Callable[[Path], ClaimStore]] = {
    "memory": lambda path: MemoryStore(),
    "folder": lambda path: FolderStore(path / "claims"),
    "redis": lambda path: RedisStore(FakeRedis(), address="redis://here"),
    "objects": lambda path: ObjectStore(f"memory://{path.name}"),
    "fsspec": lambda path: ObjectStore(f"local://{path}/claims"),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ClaimStore:
    return STORES[request.param](tmp_path)


def test_content_goes_in_and_comes_out(store: ClaimStore) -> None:
    async def there_and_back() -> None:
        claims = Claims(store, above=1024)
        sent = await claims.check_in(a_message())
        assert sent.datacontenttype == CLAIM
        assert len(wire.encode(sent)) < 1000
        assert store.address.encode() not in sent.data
        assert await claims.redeem(wire.decode(wire.encode(sent))) == a_message()
        assert await claims.check_in(sent) is sent
        again = await claims.check_in(a_message())  # the same content twice is harmless
        assert await claims.redeem(again) == a_message()
        small = a_message(b"small")
        assert await claims.check_in(small) is small
        assert await claims.redeem(small) is small
        assert await store.sweep() == 0
        await store.close()

    asyncio.run(there_and_back())


def test_content_that_is_gone_is_said_to_be(store: ClaimStore) -> None:
    async def too_late() -> None:
        now = [1000.0]
        claims = Claims(store, above=1024, clock=lambda: now[0])
        sent = await claims.check_in(a_message())
        other = a_message(bytes(2000))
        lost = msgspec.structs.replace(sent, data=_reference(other.data, until=1300.0))
        missing = await claims.redeem(lost)
        assert isinstance(missing, ClaimExpired)
        assert missing.why == "missing"
        now[0] = 1301.0
        expired = await claims.redeem(lost)
        assert isinstance(expired, ClaimExpired)
        assert (expired.why, expired.size) == ("expired", 2000)

    asyncio.run(too_late())


def _reference(data: bytes, *, until: float = 2e9, **changes: Any) -> bytes:
    plain = ClaimReference(
        sha256=hashlib.sha256(data).hexdigest(), size=len(data), expires=wire.timestamp(until), media_type=ARRAYS
    )
    return wire.write_json(msgspec.structs.replace(plain, **changes))


@pytest.mark.parametrize("claimed", [100, 3000])
def test_content_of_another_size_is_refused_and_not_loaded(store: ClaimStore, claimed: int) -> None:
    async def wrong_size() -> None:
        await store.put(hashlib.sha256(LARGE).hexdigest(), LARGE)
        got = await store.get(hashlib.sha256(LARGE).hexdigest(), claimed)
        assert got is not None
        assert len(got) <= max(claimed + 1, 0) or claimed > len(LARGE)
        with pytest.raises(EnvelopeError, match="size and hash"):
            await Claims(store).redeem(
                msgspec.structs.replace(a_message(_reference(LARGE, size=claimed)), datacontenttype=CLAIM)
            )

    asyncio.run(wrong_size())


def test_content_that_was_changed_is_refused(store: ClaimStore) -> None:
    async def changed() -> None:
        name = hashlib.sha256(LARGE).hexdigest()
        await store.put(name, LARGE[:-1] + b"x")
        with pytest.raises(EnvelopeError, match="size and hash"):
            await Claims(store).redeem(msgspec.structs.replace(a_message(_reference(LARGE)), datacontenttype=CLAIM))

    asyncio.run(changed())


@pytest.mark.parametrize(
    "wrong",
    [
        {"sha256": "../../etc/passwd"}, {"sha256": "/etc/passwd"}, {"sha256": "A" * 64}, {"sha256": "a" * 63 + "\n"},
        {"sha256": ""}, {"size": 0}, {"size": -1}, {"size": MOST_BYTES + 1}, {"media_type": CLAIM},
        {"media_type": "text/html"}, {"expires": "later"},
    ],
)  # fmt: skip
def test_a_reference_is_checked_before_anything_is_looked_up(wrong: dict[str, Any]) -> None:
    class Untouched(MemoryStore):
        async def get(self, name: str, limit: int) -> bytes | None:
            raise AssertionError("looked up")

    message = msgspec.structs.replace(a_message(_reference(LARGE, **wrong)), datacontenttype=CLAIM)
    with pytest.raises(EnvelopeError):
        asyncio.run(Claims(Untouched()).redeem(message))


@given(st.binary(max_size=200))
def test_rubbish_is_no_claim(data: bytes) -> None:
    with pytest.raises(EnvelopeError):
        asyncio.run(Claims(MemoryStore()).redeem(msgspec.structs.replace(a_message(data), datacontenttype=CLAIM)))


def test_what_no_receiver_takes_is_not_put_away() -> None:
    with pytest.raises(EnvelopeError, match="send less at once"):
        asyncio.run(Claims(MemoryStore()).check_in(a_message(bytes(MOST_BYTES + 1))))


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_private_and_swept(tmp_path: Path) -> None:
    folder, now = tmp_path / "a" / "claims", [2e9]
    store = FolderStore(folder, clock=lambda: now[0])

    async def age() -> None:
        await store.put("a" * 64, b"x")
        (folder / "of somebody else").write_text("stays")
        (folder / f".{'b' * 64}.{'0' * 16}.part").write_text("half")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / ("a" * 64)).stat().st_mode) == 0o600
        for file in folder.iterdir():
            os.utime(file, (now[0] - 299, now[0] - 299))
        assert await store.sweep() == 0
        now[0] += 2
        assert await store.sweep() == 2
        assert [file.name for file in folder.iterdir()] == ["of somebody else"]
        assert await FolderStore(tmp_path / "none").sweep() == 0

    asyncio.run(age())


def test_putting_content_again_begins_its_time_anew(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)

    async def again() -> None:
        await store.put("a" * 64, b"x")
        os.utime(tmp_path / ("a" * 64), (1.0, 1.0))
        await store.put("a" * 64, b"x")
        assert (tmp_path / ("a" * 64)).stat().st_mtime > 1e9

    asyncio.run(again())


def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(LARGE)
    folder = tmp_path / "claims"
    folder.mkdir()
    (folder / hashlib.sha256(LARGE).hexdigest()).symlink_to(secret)
    store = FolderStore(folder)

    async def lured() -> None:
        assert await store.get(hashlib.sha256(LARGE).hexdigest(), len(LARGE)) is None
        await store.put(hashlib.sha256(LARGE).hexdigest(), b"new")
        assert secret.read_bytes() == LARGE  # the link was replaced, not written through

    asyncio.run(lured())


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "short"])
@pytest.mark.parametrize("at", range(3))
def test_a_full_disk_leaves_nothing_half(tmp_path: Path, at: int, fault: Fault) -> None:
    folder = tmp_path / "claims"
    folder.mkdir()
    disk = FaultyDisk(LocalDisk())
    asyncio.run(FolderStore(folder, disk=disk).put("a" * 64, LARGE))
    place = next(n for n, what in enumerate(disk.log) if "create" in what) + at
    (folder / ("a" * 64)).unlink()
    with pytest.raises(BusError, match="must be usable"):
        asyncio.run(FolderStore(folder, disk=FaultyDisk(LocalDisk(), {place: fault})).put("a" * 64, LARGE))
    assert list(folder.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# The others


def test_memory_is_bounded_and_forgets() -> None:
    now = [0.0]
    store = MemoryStore(max_bytes=10, clock=lambda: now[0])

    async def fill() -> None:
        await store.put("a", b"12345")
        await store.put("b", b"12345")
        await store.put("c", b"1")
        assert [await store.get(name, 9) for name in "abc"] == [None, b"12345", b"1"]
        now[0] = 300.0
        assert await store.get("b", 9) is None
        assert await store.sweep() == 2

    asyncio.run(fill())


def test_redis_keys_end_by_themselves_under_the_prefix_of_the_bus() -> None:
    fake = FakeRedis()
    asyncio.run(RedisStore(fake, address="redis://here", prefix="me.").put("a", b"x"))
    assert fake.commands == [("SET", "me.esper:claim:a", b"x", "EX", 300)]


def test_a_real_redis_keeps_claims_for_their_time(redis_server: Any) -> None:
    store = make_store(f"{redis_server.url}?prefix=claims.", ttl_s=1, environ={})

    async def there_and_gone() -> None:
        claims = Claims(store, above=1024)
        sent = await claims.check_in(a_message(LARGE * 1024))
        assert await claims.redeem(sent) == a_message(LARGE * 1024)
        assert await store.get("b" * 64, 10) is None
        await asyncio.sleep(1.1)
        gone = await claims.redeem(sent)
        assert isinstance(gone, ClaimExpired)
        assert gone.why == "expired"
        await store.close()

    asyncio.run(there_and_gone())


def test_objects_are_swept_when_they_are_old(tmp_path: Path) -> None:
    store = ObjectStore(f"local://{tmp_path}/claims", ttl_s=-1)

    async def age() -> None:
        assert await store.sweep() == 0
        await store.put("a" * 64, b"x")
        (tmp_path / "claims" / "other").write_text("stays")
        assert await store.sweep() == 1
        assert [file.name for file in (tmp_path / "claims").iterdir()] == ["other"]

    asyncio.run(age())


def test_a_setting_names_a_store(tmp_path: Path) -> None:
    assert isinstance(make_store("memory://"), MemoryStore)
    assert make_store(str(tmp_path)).address == f"file://{tmp_path}"
    assert make_store(f"file://{tmp_path}", ttl_s=7).ttl_s == 7
    assert isinstance(make_store("local:///x"), ObjectStore)
    assert make_store("redis://x:1/2?prefix=p", environ={}).address == "redis://x:1/2?prefix=p"
    for wrong in ("", "file://host/x", "memory://x", "kafka://x"):
        with pytest.raises(ConfigError, match="a claim store is"):
            make_store(wrong)
    with pytest.raises(ConfigError) as caught:
        make_store("redis://:password@x", environ={})
    assert "password@" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"must know .*nobody://\.\.\.") as caught:
        make_store("nobody://user:password@x")
    assert "password" not in str(caught.value)


def test_what_is_shared_outlives_one_of_its_users() -> None:
    async def two_users() -> None:
        for shared in (True, False):
            store = MemoryStore(shared=shared)
            await store.put("a", b"x")
            await store.close()
            assert await store.get("a", 9) == (b"x" if shared else None)

    asyncio.run(two_users())


@pytest.mark.parametrize(("error", "raised"), [(OSError(111, "sftp://me:secret"), BusError), (ValueError, ConfigError)])
def test_an_object_store_is_reached_when_it_is_used(
    error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    core = importlib.import_module("fsspec.core")

    def refuse(url: str) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(core, "url_to_fs", refuse)
        store = ObjectStore(f"local://{tmp_path}/secret")
        with pytest.raises(raised, match=r"claim store.* local://\.\.\.") as caught:
            asyncio.run(store.put("a" * 64, b"x"))
        assert "secret" not in str(caught.value)
    asyncio.run(store.put("a" * 64, b"x"))


def test_what_fsspec_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(claim_stores.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"pip install 'esper-morph\[claims\]'"):
        ObjectStore("s3://bucket")


@pytest.mark.parametrize("keyring", [None, Keyring({"a-long-name-of-a-key": "k" * 32})])
def test_what_goes_by_claim_is_judged_by_the_whole_message(keyring: Keyring | None) -> None:
    """Not by its data alone: attributes and signature are on the wire as well."""

    async def body() -> None:
        plain = Sender(source="esper/kasmina", run="r", subject="j", keyring=keyring)
        sender = dataclasses.replace(plain, claims=Claims(MemoryStore(), above=4096))
        for extra in range(-3, 4):
            envelope = sender.envelope(HEALTH_SCHEMA, bytes(4096), extensions={"what": "ä" * 20})
            spare = 4096 - len((await plain.message(envelope)).value)  # below 0: what is beside the data
            envelope = msgspec.structs.replace(envelope, data=bytes(4096 + spare + extra))
            whole, sent = await plain.message(envelope), await sender.message(envelope)
            assert len(whole.value) == 4096 + extra
            if keyring is None:
                assert wire.num_bytes(envelope) == 4096 + extra
            is_claim = wire.decode(sent.value).datacontenttype == CLAIM
            assert is_claim == (extra > 0) and (is_claim or sent == whole)

    asyncio.run(body())
