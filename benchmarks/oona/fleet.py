"""One controller steers many trainings through Redis: is every order answered, and does none get to another training?

Run from the repository root (ten minutes; needs redis-server)::

    PYTHONPATH=src:. python benchmarks/oona/fleet.py

A controller (``esper controller serve``) and ``--jobs`` small trainings run side by side for ``--seconds``. The
trainings are growers of their own, each with its own link, shared out to ``--processes`` processes. Every training's
host has another name for its sites' sake: an order that got to the wrong one would be refused there, and the log of its
commands would say so.

Counted: orders sent, answered, applied, refused, expired; orders that a training's log holds although they were sent to
another; observations and decisions; steps that were decided on by the local controller because none was heard.
It writes ``benchmarks/results/oona_fleet.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import multiprocessing
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.oona.bus import redis_server
from torch import nn

import esper
from esper.oona import envelope as wire
from esper.oona.address import open_bus
from esper.oona.answers import Intent, read_entry
from esper.oona.link import Link
from esper.oona.operators import passing
from esper.oona.remote import RemoteController
from esper.oona.schemas import decode_payload
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, DECISIONS
from esper.safety.command_log import read_log
from esper.tamiyo import make_controller

RESULT = Path(__file__).parents[1] / "results" / "oona_fleet.json"
RUN = "fleet"


class Training:
    """One small training that never ends by itself: a student too small for its teacher."""

    def __init__(self, number: int, folder: Path, url: str) -> None:
        torch.manual_seed(number)
        self.name = f"job{number:02d}"
        self.teacher = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
        body = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4))
        self.model = nn.Sequential(collections.OrderedDict([(self.name, body)]))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        held_out = [self._batch() for _ in range(32)]
        config = esper.Config(total_steps=1_000_000, seed=number)
        self.controller = RemoteController(make_controller("heuristic", config.tamiyo, seed=number))
        self.grower = esper.Grower(
            self.model, self.optimizer, loss=self._loss, evaluate=held_out, config=config, controller=self.controller
        )
        self.folder = folder / self.name
        self.link = Link(url, run=RUN, job=self.name, folder=self.folder)
        self.controller.line = self.link
        self.serving = self.link.serving(self.grower, self.folder / "commands.jsonl")
        self.serving.__enter__()
        self.alone = 0
        """Decision points without a controller."""

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(32, 8)
        with torch.no_grad():
            return x, self.teacher(x)

    @staticmethod
    def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def step(self) -> None:
        loss = self._loss(self.model, self._batch())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.grower.step(loss)
        if self.grower.clock.steps % self.grower.config.interval == 0:
            self.alone += not self.controller.is_steered

    def end(self) -> dict[str, Any]:
        self.serving.__exit__(None, None, None)
        entries = [read_entry(entry) for entry in read_log(self.folder / "commands.jsonl")[0]]
        orders = [entry.order for entry in entries if isinstance(entry, Intent)]
        sites = {plan.site for o in orders for plan in getattr(o.command, "seeds", ())}
        return {
            "job": self.name,
            "steps": self.grower.clock.steps,
            "ids": [order.id for order in orders],
            "foreign": sum(order.job != self.name for order in orders)
            + sum(not site.startswith(self.name) for site in sites),
            "alone": self.alone,
            "accepted": sum(str(v.state.name) == "FOSSILIZED" for v in self.grower.verdicts),
            "verdicts": len(self.grower.verdicts),
            "counts": self.link.counts(),
        }


def train(numbers: list[int], folder: str, url: str, seconds: float, pipe: Any) -> None:
    """A process with some of the trainings, one step each in turn."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    trainings = [Training(number, Path(folder), url) for number in numbers]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for training in trainings:
            training.step()
    pipe.send([training.end() for training in trainings])


async def watch(url: str, until: asyncio.Event) -> dict[str, dict[str, Any]]:
    """Everything that passes, by topic and id."""
    seen: dict[str, dict[str, Any]] = {topic.name: {} for topic in (COMMANDS, ACKNOWLEDGEMENTS, DECISIONS)}
    bus = open_bus(url)
    async for batch in passing(bus, [COMMANDS, ACKNOWLEDGEMENTS, DECISIONS], "oldest"):
        for delivery in batch:
            envelope = wire.decode(delivery.value)
            seen[delivery.topic][envelope.id] = (envelope.subject, decode_payload(envelope), envelope.time)
        if until.is_set() and not batch:
            break
    await bus.close()
    return seen


async def fleet(args: argparse.Namespace, url: str, folder: str) -> tuple[list[dict[str, Any]], Any, dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": "src:."}
    server_json = Path(folder) / "server.json"
    command = [sys.executable, "-m", "esper.cli", "controller", "serve", "--bus", url, "--json", str(server_json)]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    until = asyncio.Event()
    watching = asyncio.create_task(watch(url, until))
    await asyncio.sleep(5)
    context = multiprocessing.get_context("spawn")
    shares = [list(range(args.jobs))[k :: args.processes] for k in range(args.processes)]
    workers: list[Any] = []
    for share in shares:
        mine, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=train, args=(share, folder, url, args.seconds, theirs))
        worker.start()
        workers.append((worker, mine))
    told: list[dict[str, Any]] = []
    for worker, pipe in workers:
        told += await asyncio.to_thread(pipe.recv)
        await asyncio.to_thread(worker.join)
    await asyncio.sleep(2)
    server.send_signal(2)
    await asyncio.to_thread(server.wait, 60)
    until.set()
    return told, await watching, json.loads(server_json.read_text(encoding="utf-8"))


def summary(args: argparse.Namespace, told: list[dict[str, Any]], seen: Any, served: Any) -> dict[str, Any]:
    """What was sent, what became of it, and whether anything crossed."""
    orders, decisions = seen[COMMANDS.name], seen[DECISIONS.name]
    answers = {payload.id: payload for _, payload, _ in seen[ACKNOWLEDGEMENTS.name].values()}
    logged = {order: job["job"] for job in told for order in job["ids"]}
    crossed = sum(orders[order][0] != job for order, job in logged.items() if order in orders)
    return {
        "jobs": args.jobs,
        "seconds": args.seconds,
        "processes": args.processes,
        "orders": len(orders),
        "answered": sum(order in answers for order in orders),
        "outcomes": dict(collections.Counter(answer.outcome for answer in answers.values())),
        "refusals": dict(collections.Counter(a.gate for a in answers.values() if a.outcome == "refused")),
        "answers_to_nobody": sum(order not in orders for order in answers),
        "crossed": crossed + sum(job["foreign"] for job in told),
        "applied_twice": len([o for job in told for o in job["ids"]]) - len(logged),
        "decisions": len(decisions),
        "trainings_steered": len({subject for subject, _, _ in decisions.values()}),
        "steps": sum(job["steps"] for job in told),
        "decision_points_alone": sum(job["alone"] for job in told),
        "cohorts_ended": sum(job["verdicts"] for job in told),
        "cohorts_kept": sum(job["accepted"] for job in told),
        "telemetry": {
            key: sum(job["counts"]["telemetry"][key] for job in told)
            for key in ("offered", "recovered", "delivered", "dropped", "pending")
        },
        "server": served["counts"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    os.environ["ESPER_BUS_KEY"] = secrets.token_hex(32)
    os.environ["OMP_NUM_THREADS"] = "1"
    load = os.getloadavg()
    with redis_server() as url, tempfile.TemporaryDirectory() as folder:
        told, seen, served = asyncio.run(fleet(args, url, folder))
    result = {
        "command": "PYTHONPATH=src:. python benchmarks/oona/fleet.py",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "redis", "msgspec")},
        "load": {"before": load, "after": os.getloadavg()},
        **summary(args, told, seen, served),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
