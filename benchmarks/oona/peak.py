"""Fifty jobs report the health of a million chunks each, all at once: how long until a reader has a report?

Run from the repository root (a minute or two; needs redis-server)::

    PYTHONPATH=src:. python benchmarks/oona/peak.py

Each job has a publisher and a connection of its own, shared out to two processes; a report is 8 MB and goes by claim
check (``SET ... EX``) through one Redis. One reader takes the messages, fetches the content, checks its hash and
decodes it. In each of ``--rounds`` rounds all jobs offer a report at the same moment, and the next round begins when
all have been read, or when nothing has come for ``--patience`` seconds: then the rest of that round counts as missing,
and what comes of it later as late. Reported: milliseconds from the offer to the decoded report, how much a second gets
through, what was lost, how often a broker or a store did not answer in time (``failures``).

A short form, some seconds: ``--jobs 6 --chunks 200000 --rounds 2 --out /tmp/peak.json``.

It writes ``benchmarks/results/oona_peak.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.oona.bus import redis_server

from esper.oona import envelope as wire
from esper.oona.address import open_bus
from esper.oona.claims import ClaimExpired
from esper.oona.health import HealthReport, Snapshot
from esper.oona.publisher import TelemetryPublisher
from esper.oona.schemas import HEALTH_SCHEMA, decode_payload
from esper.oona.sender import Sender
from esper.oona.stores import open_claims
from esper.oona.topics import HEALTH

RESULT = Path(__file__).parents[1] / "results" / "oona_peak.json"
SITES = 100
_FATES = ("offered", "delivered", "dropped", "dropped_superseded", "pending", "failures")
_FIELDS = {
    "seed_id": np.int64, "site": np.int32, "num_chunks": np.int32, "lifecycle": np.int8, "alpha": np.float32,
    "blueprint": np.int16, "epochs_in_state": np.int16,
}  # fmt: skip


def snapshot(chunks: int, step: int) -> Snapshot:
    """A report of that many chunks at a hundred sites, as a grower would make it."""
    per_site = chunks // SITES
    draw = np.random.default_rng(step)
    return Snapshot(
        step=step,
        sites=tuple(f"layer{number}" for number in range(SITES)),
        offsets=np.arange(SITES + 1, dtype=np.int64) * per_site,
        sensed=tuple(draw.standard_normal((3, per_site), dtype=np.float32) for _ in range(SITES)),
        seeds={name: np.zeros(0, dtype=kind) for name, kind in _FIELDS.items()},
    )


async def _send(numbers: list[int], url: str, args: argparse.Namespace, pipe: Any) -> None:
    publishers: dict[int, TelemetryPublisher] = {}
    senders: dict[int, Sender] = {}
    stop = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []
    for number in numbers:
        senders[number] = Sender(source="esper/kasmina", run="peak", subject=f"job{number}", claims=open_claims(url))
        publishers[number] = TelemetryPublisher(open_bus(url), senders[number])
        tasks.append(asyncio.create_task(publishers[number].run(stop)))
    reports = {number: snapshot(args.chunks, number) for number in numbers}
    pipe.send("ready")
    while (given := await asyncio.to_thread(pipe.recv)) != "end":
        for number in numbers:
            more = {"offered": repr(time.time()), "round": str(given)}

            def build(counts: Any, number: int = number, more: Any = more) -> wire.Envelope:
                return senders[number].envelope(HEALTH_SCHEMA, reports[number].pack(counts), extensions=more)

            publishers[number].offer(HEALTH, build, num_bytes=reports[number].num_bytes, supersedes=True)
    stop.set()
    await asyncio.gather(*tasks)
    told = [publisher.counts() for publisher in publishers.values()]
    pipe.send((told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def send(numbers: list[int], url: str, args: argparse.Namespace, pipe: Any) -> None:
    """A process with some of the jobs."""
    asyncio.run(_send(numbers, url, args, pipe))


async def read(url: str, args: argparse.Namespace, pipes: list[Any]) -> dict[str, Any]:
    bus, claims = open_bus(url), open_claims(url)
    assert claims is not None
    subscription = await bus.subscribe([HEALTH], group="reader", consumer="one", begin="newest")
    waits: list[float] = []
    spans: list[float] = []
    expired = missing = late = 0
    for number in range(args.rounds):
        began, read_in_round = time.monotonic(), 0
        for pipe in pipes:
            pipe.send(number)
        while read_in_round < args.jobs:
            deliveries = await subscription.receive(most=10, wait_s=args.patience)
            if not deliveries:
                missing += args.jobs - read_in_round
                break
            for delivery in deliveries:
                envelope = wire.decode(delivery.value)
                whole = await claims.redeem(envelope)
                is_late = int(envelope.extensions["round"]) != number
                late, read_in_round = late + is_late, read_in_round + (not is_late)
                if isinstance(whole, ClaimExpired):
                    expired += 1
                    continue
                report = decode_payload(whole)
                assert isinstance(report, HealthReport) and len(report.mean) == args.chunks
                waits.append(1000 * (time.time() - float(envelope.extensions["offered"])))
            await subscription.acknowledge(deliveries)
        spans.append(time.monotonic() - began)
    await bus.close()
    quantiles = np.quantile(waits or [float("nan")], [0.5, 0.99, 1.0]).tolist()
    return {
        "milliseconds": dict(zip(("p50", "p99", "max"), quantiles, strict=True)),
        "seconds_a_round": {"median": float(np.median(spans)), "max": max(spans)},
        "megabytes_a_second": len(waits) * args.chunks * 8 / 1e6 / sum(spans),
        "read": len(waits),
        "expired": expired,
        "missing": missing,
        "late": late,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    load = os.getloadavg()
    context = multiprocessing.get_context("spawn")
    with redis_server() as url, tempfile.TemporaryDirectory():
        pipes: list[Any] = []
        workers: list[Any] = []
        for share in (list(range(args.jobs))[k :: args.processes] for k in range(args.processes)):
            mine, theirs = context.Pipe()
            workers.append(context.Process(target=send, args=(share, url, args, theirs)))
            workers[-1].start()
            pipes.append(mine)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        measured = asyncio.run(read(url, args, pipes))
        for pipe in pipes:
            pipe.send("end")
        told = [pipe.recv() for pipe in pipes]
        for worker in workers:
            worker.join()
    counts = [each for share, _ in told for each in share]
    result = {
        "command": "PYTHONPATH=src:. python benchmarks/oona/peak.py",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("redis", "hiredis", "msgspec", "numpy")},
        "load": {"before": load, "after": os.getloadavg()},
        "jobs": args.jobs,
        "chunks": args.chunks,
        "rounds": args.rounds,
        "bytes_a_report": args.chunks * 8,
        **measured,
        "publishers": {key: sum(each.get(key, 0) for each in counts) for key in _FATES},
        "megabytes_of_a_sending_process": max(size for _, size in told),
        "megabytes_of_the_reader": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
