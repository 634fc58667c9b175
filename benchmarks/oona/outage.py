"""A broker is away for a minute while a training goes on: what does a step cost, and what is lost?

Run from the repository root, on two cores that nothing else uses (about seven minutes; needs redis-server)::

    PYTHONPATH=src:. python benchmarks/oona/outage.py

A small training with a grower reports to a real Redis (``appendfsync always``) and takes orders from it, while another
thread gives orders, sends each again until it is answered, and reads everything that is said. After ``--before``
seconds the server is stopped for ``--seconds`` (SIGSTOP: connections stay, nothing answers), goes on for ``--before``
seconds, and is then killed (SIGKILL) and started again after as long. Between two steps the training sleeps for
``--pause``, so that it is not the machine's two cores that are measured.

Reported, for each kind of outage: milliseconds a step (median, p99, longest) in the seconds before and during it, and
their ratio; what was lost of events and orders, what of telemetry, and whether it came in order. The bar: p99 at most
1% above the one before, nothing of events and orders lost, every report accounted for. A ratio over a minute of steps
is itself uncertain by some percent: ``noise`` is the ratio of the two halves of the time before.

A short form, half a minute: ``--seconds 5 --before 5 --out /tmp/outage.json``. It writes
``benchmarks/results/oona_outage.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.oona.wired import Scene, scene
from tests.servers import RedisServer

RESULT = Path(__file__).parents[1] / "results" / "oona_outage.json"
MOST_RATIO = 1.01


def milliseconds(times: list[tuple[float, float]], begin: float, end: float) -> dict[str, float]:
    """Of the steps that began in a span of time."""
    taken = [1e3 * seconds for began, seconds in times if begin <= began < end]
    median, p99 = np.quantile(taken, [0.5, 0.99]).tolist()
    return {"steps": len(taken), "median": median, "p99": p99, "longest": max(taken)}


async def outage(place: Scene, kind: str, before_s: float, seconds: float) -> dict[str, Any]:
    """Let it run, take the broker away, give it back, and wait until all flows again."""
    began = time.monotonic()
    await asyncio.sleep(before_s)
    gone = time.monotonic()
    if kind == "stopped":
        place.server.freeze()
    else:
        place.server.kill()
    await asyncio.sleep(seconds)
    back = time.monotonic()
    if kind == "stopped":
        place.server.thaw()
    else:
        await asyncio.to_thread(place.server.start)
    await place.flow(120.0)
    level = time.monotonic()
    times = list(place.training.times)
    then, during = milliseconds(times, began, gone), milliseconds(times, gone, back)
    halves = [milliseconds(times, *span)["p99"] for span in ((began, (began + gone) / 2), ((began + gone) / 2, gone))]
    return {
        "before": then, "during": during, "ratio_of_p99": during["p99"] / then["p99"],
        "ratio_of_medians": during["median"] / then["median"], "noise": halves[1] / halves[0],
        "seconds_until_an_order_was_answered_again": level - back,
    }  # fmt: skip


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    server = RedisServer(folder / "redis", is_durable=True)
    server.start()
    try:
        async with scene(server, folder / "run", pause_s=args.pause) as place:
            await place.flow()
            found = {kind: await outage(place, kind, args.before, args.seconds) for kind in ("stopped", "killed")}
            return {**found, "account": await place.end()}
    finally:
        server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the broker is away, twice")
    parser.add_argument("--before", type=float, default=120.0, help="how long it is there before each")
    parser.add_argument("--pause", type=float, default=0.004, help="seconds between two steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        measured = asyncio.run(measure(args, Path(folder)))
    account = measured["account"]
    must_be_zero = [name for name in account if name.startswith(("events_", "orders_", "unaccounted", "reports_"))]
    result = {
        "command": f"PYTHONPATH=src:. python benchmarks/oona/outage.py --seconds {args.seconds:g} "
        f"--before {args.before:g} --pause {args.pause:g}",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), the server on the same ones",
        "versions": {name: version(name) for name in ("torch", "redis", "msgspec")},
        "load": {"before": load, "after": os.getloadavg()},
        **measured,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "bars": {
            **{f"p99 while {kind} at most 1% more": measured[kind]["ratio_of_p99"] <= MOST_RATIO
               for kind in ("stopped", "killed")},
            "nothing lost, doubled, out of order or unaccounted for": not any(account[name] for name in must_be_zero),
        },
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
