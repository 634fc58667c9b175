"""What does a training step cost more when its health goes over a bus?

Run from the repository root, on two cores that nothing else uses (minutes)::

    PYTHONPATH=src python benchmarks/oona/cost.py

A host with 10 spans of 10,000 output features, one chunk a feature, is trained with a grower in blocks of steps that
alternate: events go to a log; or they go to a log and over the bus, and so does the health of 100,000 chunks at every
decision, at the default interval of 10 steps. It is the same model and grower all the time; the courier waits in its
thread in both. Where the bus is a server, it runs on the same cores.

For each pair of blocks next to one another the ratio is taken; reported are the median of the ratios and the upper end
of its 95% interval (bootstrap over the pairs), by the wall and by the process's CPU time. ``training_thread`` counts
only the thread that trains: what it does itself for the bus. On a machine that others use too, the wall says little;
``load`` is the machine's load average before and after.
``attributed`` needs no pairs and no quiet machine: CPU time that is the bus's for certain, for each decision, in the
training thread (collecting, offering, waking the courier) and in the courier's, and both as shares of the CPU time of
an interval without a bus. What it leaves out is what one thread does to the other (caches, the interpreter's lock).

It writes ``benchmarks/results/oona_cost.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.bench.idle import Idle
from esper.observe.event_log import EventLog
from esper.oona import health
from esper.oona.address import open_bus
from esper.oona.courier import Courier
from esper.oona.envelope import Envelope
from esper.oona.follower import Follower
from esper.oona.health import Snapshot
from esper.oona.outbox import Outbox, event
from esper.oona.publisher import TelemetryPublisher
from esper.oona.schemas import HEALTH_SCHEMA
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.spool import Spool
from esper.oona.topics import HEALTH

RESULT = Path(__file__).parents[1] / "results" / "oona_cost.json"
BARS = {"median": 0.005, "upper": 0.01}


class WideSpans(nn.Module):
    """Parallel spans with many outputs: many chunks, a step of some tens of milliseconds."""

    def __init__(self, num_sites: int, features: int, hidden: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_sites))
        self.tails = nn.ModuleList(nn.Linear(hidden, features) for _ in range(num_sites))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.heads, self.tails, strict=True)
        return torch.stack([tail(F.gelu(head(x))).square().mean() for head, tail in pairs]).sum()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


class Training:
    """A loop with a grower, and with a bus while ``is_wired``."""

    def __init__(self, shape: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(0)
        self.is_wired = False
        self.model = WideSpans(shape.sites, shape.chunks, shape.hidden)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4)
        self.batch = torch.randn(shape.rows, shape.hidden)
        self.logs = {wired: EventLog(folder / str(wired) / "events.jsonl") for wired in (False, True)}
        keys = Keyring({"a": "k" * 32})
        self.sender = Sender(source="esper/kasmina", run="cost", subject="grown-seed0", keyring=keys)
        bus = open_bus(shape.bus)
        self.publisher = TelemetryPublisher(bus, self.sender, make_spool=lambda: Spool(folder / "spool"))
        self.outbox = Outbox(bus, self.sender, Follower(self.logs[True].path, folder / "outbox" / "events"), event)
        self.courier = Courier(on_close=bus.close)
        self.courier.add("events", self.outbox.run)
        self.courier.add("telemetry", self.publisher.run)
        self.courier.start()
        self.num_steps = 0
        self.telling_s = 0.0
        config = esper.Config(sites=esper.SitesConfig(chunks=shape.chunks), held_out_every=1 << 20)
        self.grower = esper.Grower(
            self.model, self.optimizer, loss=loss, evaluate=[torch.randn(4, shape.hidden) for _ in range(16)],
            config=config, controller=Idle(), on_event=self._on_event,
        )  # fmt: skip

    def _on_event(self, one: Any) -> None:
        self.logs[self.is_wired].append(one)
        if self.is_wired:
            began = time.thread_time()
            self.outbox.nudge()
            self.telling_s += time.thread_time() - began

    def step(self) -> None:
        value = loss(self.model, self.batch)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.grower.step(value)
        self.num_steps += 1
        if self.is_wired and self.num_steps % self.grower.config.interval == 0:
            began = time.thread_time()
            snapshot = health.collect(self.grower.kasmina, self.num_steps)
            self.publisher.offer(HEALTH, self._packing(snapshot), num_bytes=snapshot.num_bytes)
            self.telling_s += time.thread_time() - began

    def _packing(self, snapshot: Snapshot) -> Callable[[Mapping[str, int]], Envelope]:
        return lambda counts: self.sender.envelope(HEALTH_SCHEMA, snapshot.pack(counts))

    def block(self, steps: int, *, wired: bool) -> dict[str, float]:
        """Milliseconds a step."""
        self.is_wired = wired
        clocks = {"wall": time.perf_counter, "cpu": time.process_time, "training_thread": time.thread_time}
        begun = {name: clock() for name, clock in clocks.items()}
        for _ in range(steps):
            self.step()
        return {name: 1e3 * (clock() - begun[name]) / steps for name, clock in clocks.items()}

    def spent(self) -> dict[str, float]:
        """Seconds of CPU that the bus has taken so far, by thread."""
        (courier,) = (thread for thread in threading.enumerate() if thread.name == "esper-courier")
        assert courier.ident is not None
        clock = time.pthread_getcpuclockid(courier.ident)
        return {"training_thread": self.telling_s, "courier": time.clock_gettime(clock)}

    def close(self) -> dict[str, Any]:
        assert self.courier.stop()
        counts = {"publisher": self.publisher.counts(), "outbox": self.outbox.counts()}
        assert counts["publisher"]["delivered"] == counts["publisher"]["offered"] > 0, counts
        assert self.outbox.behind()[0] == 0, counts
        return counts


def interval(ratios: list[float]) -> tuple[float, float]:
    """Median of the ratios less 1, and the upper end of its 95% interval."""
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(np.array(ratios), (4000, len(ratios))), axis=1)
    return statistics.median(ratios) - 1, float(np.quantile(draws, 0.975)) - 1


def measure(shape: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        training = Training(shape, Path(folder))
        for wired in (False, True):
            training.block(2 * shape.steps, wired=wired)
        pairs: list[tuple[dict[str, float], dict[str, float]]] = []
        before = training.spent()
        for turn in range(shape.blocks):
            order = (False, True) if turn % 2 else (True, False)
            times = {wired: training.block(shape.steps, wired=wired) for wired in order}
            pairs.append((times[False], times[True]))
        time.sleep(1.0)  # the courier has sent the last of it
        after = training.spent()
        counts = training.close()
    result: dict[str, Any] = {"chunks": shape.sites * shape.chunks, "counts": counts}
    for clock in ("wall", "cpu", "training_thread"):
        median, upper = interval([with_bus[clock] / without[clock] for without, with_bus in pairs])
        result[clock] = {
            "step_ms": round(statistics.median(without[clock] for without, _ in pairs), 4),
            "added_share": round(median, 5), "added_share_upper": round(upper, 5),
        }  # fmt: skip
    num_decisions = shape.blocks * shape.steps / training.grower.config.interval
    interval_ms = training.grower.config.interval * result["cpu"]["step_ms"]
    result["attributed"] = {
        thread: {"ms_a_decision": round(spent, 4), "share": round(spent / interval_ms, 5)}
        for thread, spent in ((name, 1e3 * (after[name] - before[name]) / num_decisions) for name in before)
    }
    added = {"median": result["wall"]["added_share"], "upper": result["wall"]["added_share_upper"]}
    return result | {"met": {name: share <= BARS[name] for name, share in added.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bus", default="memory://cost")
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--chunks", type=int, default=10_000, help="of each site")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of a block")
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of torch; the other core is the courier's")
    parser.add_argument("--out", type=Path, default=RESULT)
    shape = parser.parse_args()
    torch.set_num_threads(shape.threads)
    before = os.getloadavg()[0]
    told = vars(shape).items()
    result = {
        "command": "PYTHONPATH=src python benchmarks/oona/cost.py "
        + " ".join(f"--{name} {value}" for name, value in told if name != "out"),
        "device": f"cpu, {shape.threads} threads on {os.cpu_count()} cores ({platform.machine()})",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "bars": BARS,
        **measure(shape),
        "load": {"before": round(before, 2), "after": round(os.getloadavg()[0], 2)},
    }
    shape.out.parent.mkdir(parents=True, exist_ok=True)
    shape.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
