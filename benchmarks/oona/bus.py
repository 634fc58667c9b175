"""How many messages a second can one process publish, and how long is a command under way?

Run from the repository root (a minute; needs redis-server)::

    PYTHONPATH=src python benchmarks/oona/bus.py

``publish``
    messages of 1,024 bytes in batches, one publisher in one process, telemetry (a topic that may lose) and lifecycle (a
    durable one with a group that lags). A second of wall time and a second of this process's CPU time; on a machine
    that others use too the second is the steadier one.
``round_trip``
    a command is published, received by another connection, answered on the topic of acknowledgements, and the answer
    received: milliseconds.

Bars: 50,000 messages a second in this process, 30,000 over Redis, a round trip under 50 ms at the 99th percentile.
It writes ``benchmarks/results/oona_bus.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import platform
import pstats
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esper.oona.address import open_bus
from esper.oona.bus import Message
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, HEALTH, LIFECYCLE, Topic

RESULT = Path(__file__).parents[1] / "results" / "oona_bus.json"
BARS = {"memory": 50_000, "redis": 30_000}
MOST_MS = 50.0


@contextmanager
def redis_server() -> Iterator[str]:
    """One without a log on disk, on a free port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            for _ in range(500):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


async def publishing(url: str, topic: Topic, num: int, batch: int) -> dict[str, float]:
    """Messages a second of wall and of CPU time."""
    bus = open_bus(url, {})
    lagging = await bus.subscribe([topic], group="lagging", consumer="c", begin="newest")
    messages = [Message(f"job-{i % 50}", os.urandom(1024)) for i in range(batch)]
    await bus.publish(topic, messages)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num // batch):
        await bus.publish(topic, messages)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    await lagging.close()
    await bus.forget([topic], "lagging")
    await bus.close()
    return {"a_second": round(num / wall), "a_cpu_second": round(num / cpu)}


async def round_trips(url: str, num: int) -> list[float]:
    """Milliseconds from a command to its answer."""
    operator, trainer = open_bus(url, {}), open_bus(url, {})
    commands = await trainer.subscribe([COMMANDS], group="trainer", consumer="c")
    answers = await operator.subscribe([ACKNOWLEDGEMENTS], group="operator", consumer="c")

    async def answer() -> None:
        while True:
            some = await commands.receive(100, 1.0)
            if some:
                await trainer.publish(ACKNOWLEDGEMENTS, [Message(d.key, d.value) for d in some])
                await commands.acknowledge(some)

    answering = asyncio.create_task(answer())
    times: list[float] = []
    for number in range(num):
        start = time.perf_counter()
        await operator.publish(COMMANDS, [Message("job", b"%d" % number + bytes(500))])
        got = await answers.receive(1, 5.0)
        times.append(1000 * (time.perf_counter() - start))
        assert got and got[0].value.startswith(b"%d" % number)
        await answers.acknowledge(got)
        await asyncio.sleep(0)
    answering.cancel()
    await asyncio.gather(answering, return_exceptions=True)
    await operator.close()
    await trainer.close()
    return times


def measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    publish: dict[str, Any] = {}
    for name, topic in (("telemetry", HEALTH), ("lifecycle", LIFECYCLE)):
        runs = [
            asyncio.run(publishing(url, topic, arguments.messages, arguments.batch)) for _ in range(arguments.repeats)
        ]
        publish[name] = {
            kind: {"median": statistics.median(run[kind] for run in runs), "most": max(run[kind] for run in runs)}
            for kind in runs[0]
        }
    times = sorted(asyncio.run(round_trips(url, arguments.commands)))
    trip = {f"p{p}": round(times[min(len(times) - 1, p * len(times) // 100)], 3) for p in (50, 90, 99)}
    return {"publish": publish, "round_trip_ms": trip | {"most": round(times[-1], 3)}}


def profile(url: str, arguments: argparse.Namespace) -> None:
    """Where this process spends its time while it publishes telemetry."""
    profiler = cProfile.Profile()
    profiler.enable()
    asyncio.run(publishing(url, HEALTH, arguments.messages, arguments.batch))
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--commands", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--note", default="", help="how the machine was shared; goes into the result")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with redis_server() as url:
        if arguments.profile:
            profile(url, arguments)
            return
        measured = {"memory": measure("memory://bench", arguments), "redis": measure(url, arguments)}
    rates = {name: measured[name]["publish"]["telemetry"]["a_second"]["median"] for name in BARS}
    server = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout.split()[2]
    result = {
        "command": f"PYTHONPATH=src python benchmarks/oona/bus.py --messages {arguments.messages} "
        f"--batch {arguments.batch} --commands {arguments.commands} --repeats {arguments.repeats}",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), the server on the same ones",
        "niceness": os.nice(0),
        **({"note": arguments.note} if arguments.note else {}),
        "load_average_at_start_and_end": [round(load, 2), round(os.getloadavg()[0], 2)],
        "versions": {
            "python": platform.python_version(), "redis-py": version("redis"), "hiredis": version("hiredis"),
            "redis-server": server.removeprefix("v="),
        },
        **measured,
        "bars": {
            **{f"{name} publishes {bar} a second": bool(rates[name] >= bar) for name, bar in BARS.items()},
            **{f"{name} round trip p99 under {MOST_MS:.0f} ms": measured[name]["round_trip_ms"]["p99"] < MOST_MS
               for name in BARS},
        },
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
