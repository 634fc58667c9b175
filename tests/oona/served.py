"""A small training that takes orders over a desk: killed anywhere, begun again from its folder."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from tests.models import Mlp, mse, rows
from tests.rigs import QUICK, Idle

import esper
from esper.oona import envelope as wire
from esper.oona.desk import Desk
from esper.oona.envelope import Envelope
from esper.oona.incoming import anybody
from esper.protocol import ORDER_SCHEMA, AnyEvent, Command, Order, Overhead
from esper.safety.tree import digest

RUN, JOB = "run-1", "grown-seed0"
HELD_OUT, DATA = rows(16, seed=7), rows(12, size=8)


def an_order(order_id: str, command: Command, **fields: Any) -> Order:
    return Order(**{"id": order_id, "command": command, "issuer": "ada", "run": RUN, "job": JOB, **fields})


def sealed(order: Order, **changes: Any) -> Envelope:
    """An order as it comes from a bus."""
    plain = Envelope(
        id=order.id, source=f"test/{order.issuer}", type="esper.order", dataschema=ORDER_SCHEMA, time=wire.now(),
        subject=order.job, esperrun=order.run, data=msgspec.json.encode(order),
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


class Served:
    """One life of the training."""

    def __init__(
        self, folder: Path, *, checkpoints: bool = True, desk: bool = True, track: Iterable[Any] = (), **settings: Any
    ) -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        self.folder = folder
        self.model = Mlp(dropout=0.1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9)
        self.batches = esper.Batches(DATA)
        self.events: list[AnyEvent] = []
        evidence = esper.EvidenceConfig(accept="always")
        config = dataclasses.replace(esper.Config(**QUICK), evidence=evidence)
        self.grower = esper.Grower(
            self.model, self.optimizer, loss=mse, evaluate=HELD_OUT, track=[self.batches, *track], controller=Idle(),
            config=config, on_event=self.events.append,
        )  # fmt: skip
        self.desk: Any = None
        if desk:
            self.desk = Desk(folder / "commands.jsonl", run=RUN, job=JOB, verify=anybody, **settings)
            self.grower.serve(self.desk, checkpoints=checkpoints)

    def resume(self) -> Served:
        if list((self.folder / "checkpoints").glob("checkpoint-*.json")):
            self.grower.load(self.folder / "checkpoints")
        return self

    @property
    def steps(self) -> int:
        return self.grower.clock.steps

    def send(self, orders: Iterable[Order]) -> None:
        for order in orders:
            self.desk.take(sealed(order))

    def step(self) -> None:
        x, y = next(self.batches)
        loss = (self.model(x) - y).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.grower.step(loss)
        if self.grower.checkpoint_due is not None:
            self.save()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def save(self) -> None:
        self.grower.save(self.folder / "checkpoints")

    def end(self) -> None:
        """As a death would, but for what the page cache keeps."""
        self.grower.detach()
        self.desk._pad.close()

    def hash(self) -> str:
        """Of all that the run is, answers among it; not of how long the log is, where attempts are counted too."""
        state: Any = self.grower.state_dict()
        if self.desk is not None:
            state["esper"]["desk"] = {**state["esper"]["desk"], "position": None}
        return digest(state)

    def told(self) -> list[bytes]:
        """The events, without what a clock says."""
        events = [msgspec.structs.replace(e, milliseconds={}) if isinstance(e, Overhead) else e for e in self.events]
        return [msgspec.json.encode(event) for event in events]


def turns(
    life: Served, script: dict[int, list[Order]], until: int, at: Callable[[int], None] = lambda turn: None
) -> None:
    """Train up to a turn, which unlike a step is never taken back; ``script`` sends orders before a turn's step."""
    while life.desk._turn < until:
        turn = life.desk._turn + 1
        life.send(script.get(turn, ()))
        life.step()
        at(turn)
