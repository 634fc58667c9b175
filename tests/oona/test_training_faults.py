"""A training over Redis while brokers die, wires break, disks fill and messages lie: it goes on, nothing of events and
orders is lost or done twice, and telemetry is lost only where it is counted."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.oona.test_broker_faults import ON_REDIS, freezing, killing
from tests.oona.wired import BASE, Scene, scene
from tests.servers import RedisServer, need_redis

from esper.errors import BusError
from esper.oona import envelope as wire
from esper.oona.address import open_bus
from esper.oona.bus import Message
from esper.oona.link import LinkLimits
from esper.oona.topics import COMMANDS
from esper.protocol import Order, SetBudget

pytestmark = pytest.mark.integration

Fault = Callable[[Any], Awaitable[None]]


async def give(place: Scene, *messages: Message) -> None:
    bus = open_bus(place.witness.url, {})
    try:
        for _ in range(50):
            try:
                return await bus.publish(COMMANDS, messages)
            except BusError:
                await asyncio.sleep(0.05)
    finally:
        await bus.close()


def an_order(place: Scene, name: str) -> Order:
    return Order(id=f"{name}-{len(place.witness.sent)}", command=SetBudget(params=BASE), run="wired", job="grown-seed0")


async def poison_messages(place: Scene) -> None:
    """What nobody can read, on the topic of orders."""
    garbage = [b"", b"\xff" * 100, b"{}\n", b'{"specversion":"1.0"}\n', b"[" * 3000]
    await give(place, *(Message("wired/grown-seed0", value) for value in garbage))


async def unsigned_orders(place: Scene) -> None:
    envelope = wire.decode((await place.witness.message(an_order(place, "unsigned"))).value)
    bare = msgspec.structs.replace(envelope, espersignature=None, esperkeyid=None)
    await give(place, Message("wired/grown-seed0", wire.encode(bare)))


async def skewed_clock(place: Scene) -> None:
    """An operator whose clock is two minutes behind, and one whose is two minutes ahead."""
    for seconds in (-120, 120):
        order = an_order(place, f"skewed{seconds}")
        await give(place, await place.witness.message(order, time=wire.timestamp(time.time() + seconds)))


async def slow_reader(place: Scene) -> None:
    place.witness.pace_s = 0.3
    await asyncio.sleep(1.0)
    place.witness.pace_s = 0.0


async def flood(place: Scene) -> None:
    """A hundred and fifty orders at once, each twice, the newest first."""
    orders = [an_order(place, f"flood{number}") for number in range(150)]
    place.witness.sent |= {order.id: order for order in orders}
    messages = [await place.witness.message(order) for order in reversed(orders)]
    await give(place, *messages, *messages[::3])


async def full_spool(place: Scene) -> None:
    """The disk takes no telemetry while the broker is away."""
    spool = place.training.link._publisher._spool  # type: ignore[union-attr]
    assert spool is not None
    open_for, spool._open_for = spool._open_for, _full  # type: ignore[method-assign]
    await killing(0.4)(place)  # type: ignore[arg-type]
    await asyncio.sleep(0.2)
    spool._open_for = open_for  # type: ignore[method-assign]


async def full_journal(place: Scene) -> None:
    """The disk takes no orders and no answers."""
    pad = place.training.link._desk._pad  # type: ignore[union-attr]
    for _ in range(3):
        pad._log._handle.write = _full  # type: ignore[union-attr,method-assign]
        await place.until(lambda: pad._refused is not None, "nothing was written")
        await place.until(lambda: pad._refused is None, "the log is not written any more")  # opened anew


def _full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def while_server(*words: str, then: str) -> Fault:
    """The server is told something, and half a second later something else."""

    async def fault(place: Scene) -> None:
        for text in words:
            assert (await asyncio.to_thread(place.server.ask, text)).startswith(b"+OK")
        await asyncio.sleep(0.5)
        assert (await asyncio.to_thread(place.server.ask, then)).startswith(b"+OK")

    return fault


ON_TRAINING: dict[str, Fault] = {
    **ON_REDIS,  # type: ignore[dict-item]
    "messages that nobody can read": poison_messages,
    "unsigned orders": unsigned_orders,
    "clocks that are wrong": skewed_clock,
    "a slow reader": slow_reader,
    "a flood of orders, doubled and in the wrong order": flood,
    "the spool's disk is full": full_spool,
    "the journal's disk is full": full_journal,
    "the server has no memory left": while_server(
        "CONFIG SET maxmemory-policy noeviction", "CONFIG SET maxmemory 1", then="CONFIG SET maxmemory 0"
    ),
    "the server is a copy of another one that is not there": while_server(
        "REPLICAOF 127.0.0.1 1", then="REPLICAOF NO ONE"
    ),
}
BRIEFLY = (
    "the sender is cut off", "the receiver's answers are swallowed", "everything is sent twice",
    "the server is killed and stays away", "messages that nobody can read", "clocks that are wrong", "unsigned orders",
    "a flood of orders, doubled and in the wrong order",
)  # fmt: skip


def check(account: dict[str, Any]) -> None:
    wrong = ("events_", "orders_", "unaccounted", "reports_out", "reports_lost_without")
    assert not {name: count for name, count in account.items() if name.startswith(wrong) and count}, account


async def suffer(folder: Path, faults: dict[str, Fault], rounds: int = 1, **settings: Any) -> dict[str, Any]:
    need_redis()
    server = RedisServer(folder / "redis", is_durable=True)
    server.start()
    try:
        async with scene(server, folder / "run", **settings) as place:
            await place.flow()
            for _ in range(rounds):
                for name, fault in faults.items():
                    steps = place.training.num_steps
                    await fault(place)
                    try:
                        await place.flow()
                    except AssertionError as error:
                        raise AssertionError(f"after {name}: {error}") from error
                    assert place.training.num_steps > steps, f"the training stood still: {name}"
            account = await place.end()
    finally:
        server.kill()
    check(account)
    return account


def test_a_training_over_some_faults(tmp_path: Path) -> None:
    account = asyncio.run(suffer(tmp_path, {name: ON_TRAINING[name] for name in BRIEFLY}))
    assert account["errors_met"] and account["came_again"], "the faults did nothing"
    assert account["orders"] > 150 and account["events"] > 20 and account["reports"] > 20


@pytest.mark.parametrize("how", [freezing, killing])
def test_while_the_broker_is_away_steps_go_on_and_nothing_is_lost(how: Any, tmp_path: Path) -> None:
    account = asyncio.run(suffer(tmp_path, {"away": how(2.0)}))
    assert account["errors_met"] > 0 and account["reports_lost"] == 0, "what waits is sent later, in order"


def test_past_the_spools_bound_the_oldest_reports_go_and_are_counted(tmp_path: Path) -> None:
    async def long_enough(place: Scene) -> None:
        place.server.kill()
        so_far = len(place.training.reported)
        await place.until(lambda: len(place.training.reported) >= so_far + 40, "the training stands still")
        await asyncio.to_thread(place.server.start)

    limits = LinkLimits(spool_bytes=20_000)
    account = asyncio.run(suffer(tmp_path, {"away": long_enough}, limits=limits, pause_s=0.001))
    lost = account["reports_lost"]
    assert 0 < lost < account["reports"] and account["telemetry"]["dropped"] >= lost


@pytest.mark.long
@pytest.mark.timeout(0)
def test_a_training_over_all_faults_again_and_again(tmp_path: Path) -> None:
    """About two hundred faults of more than two dozen kinds."""
    assert len(ON_TRAINING) >= 20
    print(asyncio.run(suffer(tmp_path, ON_TRAINING, rounds=7)))
