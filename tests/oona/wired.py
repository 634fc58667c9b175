"""A training on a bus while things go wrong there, somebody who commands it, somebody who reads all that it says, and
the account of it in the end.

The training runs in a thread of its own and is told nothing of the faults. What it says goes over one wire, orders and
the reader's part over another, so that each side can be cut off by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper
from esper.errors import BusError, EnvelopeError
from esper.observe.event_log import EventLog
from esper.oona import envelope as wire
from esper.oona.address import open_bus
from esper.oona.answers import Intent, read_entry
from esper.oona.bus import Bus, Message, Subscription
from esper.oona.link import Link, LinkLimits
from esper.oona.schemas import decode_payload
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS, DEAD_LETTERS, EPOCHS, HEALTH, LIFECYCLE
from esper.protocol import ORDER_SCHEMA, Commanded, Order, SetBudget
from esper.safety.command_log import read_log

RUN, JOB, KEY = "wired", "grown-seed0", "k" * 40
BASE = 1_000_000
REDELIVER_S = 2.0
_KEEP = (LIFECYCLE, EPOCHS, ACKNOWLEDGEMENTS)


class WiredTraining:
    """A student that is too small for its teacher, with a link; growing, and heard.

    ``pause_s`` is slept after each step, outside of what is measured.
    """

    def __init__(self, url: str, folder: Path, *, pause_s: float = 0.004, limits: LinkLimits | None = None) -> None:
        torch.manual_seed(0)
        self.teacher = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
        self.model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        self.log = EventLog(folder / "events.jsonl")
        self.commanded: list[Commanded] = []
        held_out = [self._batch() for _ in range(16)]
        config = esper.Config(total_steps=1_000_000)
        self.grower = esper.Grower(
            self.model, self.optimizer, loss=self._loss, evaluate=held_out, config=config, on_event=self._on_event
        )
        self.folder, self._pause_s = folder, pause_s
        environ = {"ESPER_BUS_KEY": KEY}
        self.link = Link(url, run=RUN, job=JOB, folder=folder / "bus", environ=environ, limits=limits)
        self.times: list[tuple[float, float]] = []
        """When each step began (``time.monotonic``), and how long it took."""
        self.reported: list[int] = []
        """Steps whose health was offered."""
        self.failure: BaseException | None = None
        self.end: dict[str, Any] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="training")

    def _on_event(self, event: Any) -> None:
        self.log.append(event)
        if isinstance(event, Commanded):
            self.commanded.append(event)

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(32, 8)
        with torch.no_grad():
            return x, self.teacher(x)

    @staticmethod
    def _loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def start(self) -> None:
        self._thread.start()

    @property
    def num_steps(self) -> int:
        return len(self.times)

    def over(self) -> None:
        """End, in an orderly way; raises what the training has raised."""
        self._is_over.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the training does not end"
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._train()
        except BaseException as error:  # noqa: BLE001 - raised again in over()
            self.failure = error

    def _train(self) -> None:
        self.link.follow(self.log.path)
        with self.link.serving(self.grower, self.folder / "commands.jsonl"):
            self.grower.watcher = self._look
            while not self._is_over.is_set():
                batch, began = self._batch(), time.monotonic()
                loss = self._loss(self.model, batch)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.grower.step(loss)
                self.times.append((began, time.monotonic() - began))
                time.sleep(self._pause_s)
        self.end = self.link.counts()
        self.log.close()

    def _look(self, observation: Any) -> None:
        self.reported.append(observation.step)
        self.link.look(observation)

    @property
    def num_spooled(self) -> int:
        telemetry: Any = self.link.counts()["telemetry"]
        return int(telemetry["spooled"])


class Witness:
    """Reads all that the training says, through every fault, and sends orders again until they are answered."""

    def __init__(self, url: str, *, order_every_s: float = 0.1) -> None:
        self.url, self._order_every_s = url, order_every_s
        self.seen: dict[str, dict[str, Any]] = {topic.name: {} for topic in (*_KEEP, HEALTH, DEAD_LETTERS)}
        """Envelopes by topic and id, as they came for the first time."""
        self.sent: dict[str, Order] = {}
        self.answers: dict[str, set[tuple[str, str, int]]] = {}
        self.num_errors = self.num_again = 0
        self.is_giving = True
        self.pace_s = 0.0
        """How long the reader takes for each batch."""
        self._must_rejoin = False
        self._keys = Keyring({"default": KEY})
        self.sender = Sender(source="esper/operator", run=RUN, subject=JOB, keyring=self._keys)

    async def read(self) -> None:
        bus = open_bus(self.url, {})
        try:
            while True:
                try:
                    await self._read(bus)
                except BusError:
                    self.num_errors += 1
                    await asyncio.sleep(0.02)
        finally:
            await bus.close()

    async def _read(self, bus: Bus) -> None:
        topics = (*_KEEP, HEALTH, DEAD_LETTERS)
        reader: Subscription = await bus.subscribe(topics, group="witness", consumer="w", redeliver_s=REDELIVER_S)
        try:
            while not self._must_rejoin:
                deliveries = await reader.receive(200, 0.05)
                for delivery in deliveries:
                    self._hear(delivery.topic, delivery.value)
                await asyncio.sleep(self.pace_s)
                await reader.acknowledge(deliveries)
            self._must_rejoin = False
        finally:
            with contextlib.suppress(BusError):
                await reader.close()

    def _hear(self, topic: str, value: bytes) -> None:
        envelope = wire.decode(value)
        self.num_again += envelope.id in self.seen[topic]
        self.seen[topic].setdefault(envelope.id, envelope)
        if topic == ACKNOWLEDGEMENTS.name:
            told = decode_payload(envelope)
            self.answers.setdefault(told.id, set()).add((told.outcome, told.gate, told.step))

    async def command(self) -> None:
        """An order every now and then, each again and again until it is answered, in no order."""
        bus = open_bus(self.url, {})
        try:
            for number in itertools.count():
                if self.is_giving:
                    name = f"o{number}"
                    order = Order(id=name, command=SetBudget(params=BASE + number), run=RUN, job=JOB, issuer="ada")
                    self.sent[name] = order
                for name in reversed(self.unanswered[-20:]):
                    await self._send(bus, self.sent[name], again=number % 3 == 0)
                await asyncio.sleep(self._order_every_s)
        finally:
            await bus.close()

    async def _send(self, bus: Bus, order: Order, *, again: bool) -> None:
        message = await self.message(order)
        try:
            await bus.publish(COMMANDS, [message] * (1 + again))
        except BusError:
            self.num_errors += 1

    async def message(self, order: Order, **changes: Any) -> Message:
        envelope = self.sender.envelope(ORDER_SCHEMA, wire.write_json(order), kind=order.kind, id=order.id, **changes)
        return await self.sender.message(envelope)

    @property
    def unanswered(self) -> list[str]:
        return [name for name in self.sent if name not in self.answers]

    def rejoin(self) -> None:
        self._must_rejoin = True


class Scene:
    """Training, witness, server and wires; what faults act upon."""

    def __init__(self, server: Any, training: WiredTraining, witness: Witness, sending: Any, receiving: Any) -> None:
        self.server, self.training, self.witness = server, training, witness
        self.sending, self.receiving = sending, receiving

    def rejoin(self) -> None:
        self.witness.rejoin()

    async def until(self, what: Callable[[], bool], text: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, text
            assert self.training.failure is None, self.training.failure
            await asyncio.sleep(0.02)

    async def flow(self, seconds: float = 60.0) -> None:
        """Until an order that is given now was answered: everything works again."""
        number = len(self.witness.sent)
        await self.until(
            lambda: any(name in self.witness.answers for name in list(self.witness.sent)[number:]), "nothing flows",
            seconds,
        )  # fmt: skip

    async def end(self) -> dict[str, Any]:
        """No more orders; when all were answered and all was told, the account of it."""
        self.witness.is_giving = False
        await self.until(lambda: not self.witness.unanswered, f"{self.witness.unanswered[:5]} are not answered")
        await self.until(lambda: not self.training.num_spooled, "the spool is not sent")
        await asyncio.to_thread(self.training.over)
        lines = [json.loads(line) for line in self.training.log.path.read_bytes().splitlines()]
        seen = self.witness.seen
        await self.until(lambda: len(seen[LIFECYCLE.name]) + len(seen[EPOCHS.name]) >= len(lines), "events are missing")
        await asyncio.sleep(0.3)
        return account(self.training, self.witness, lines)


def account(training: WiredTraining, witness: Witness, lines: list[Any]) -> dict[str, Any]:
    """What was lost, doubled or out of order; what there is of each."""
    heard = {name: list(found.values()) for name, found in witness.seen.items()}
    numbers = {t.name: [int(e.extensions["sequence"]) for e in heard[t.name]] for t in (LIFECYCLE, EPOCHS)}
    entries = [read_entry(entry) for entry in read_log(training.folder / "commands.jsonl")[0]]
    intents = [entry.order.id for entry in entries if isinstance(entry, Intent)]
    applied = [event.id for event in training.commanded if event.id in witness.sent and not event.again]
    reports = [decode_payload(envelope).head.step for envelope in heard[HEALTH.name]]
    telemetry: Any = training.end["telemetry"]
    return {
        "events": len(lines),
        "events_lost": len({line["seq"] for line in lines} - {n for found in numbers.values() for n in found}),
        "events_out_of_order": sum(found != sorted(found) for found in numbers.values()),
        "orders": len(witness.sent),
        "orders_without_an_answer": len(witness.unanswered),
        "orders_with_two_outcomes": sum(len(found) > 1 for found in witness.answers.values()),
        "orders_applied_twice": len(applied) - len(set(applied)) + len(intents) - len(set(intents)),
        "orders_told_and_not_in_the_log": len({n for n, said in witness.answers.items() if "applied" in str(said)}
                                              - set(intents)),
        "reports": len(training.reported),
        "reports_lost": len(set(training.reported) - set(reports)),
        "reports_lost_without_a_word": max(0, len(set(training.reported) - set(reports)) - telemetry["dropped"]
                                           - telemetry["pending"]),
        "reports_out_of_order": sum(b <= a for a, b in itertools.pairwise(reports)),
        "telemetry": {name: count for name, count in telemetry.items() if isinstance(count, int)},
        "unaccounted": telemetry["offered"] + telemetry["recovered"]
        - telemetry["delivered"] - telemetry["dropped"] - telemetry["pending"],
        "errors_met": witness.num_errors,
        "came_again": witness.num_again,
    }  # fmt: skip


@contextlib.asynccontextmanager
async def scene(server: Any, folder: Path, **settings: Any) -> Any:
    """A training over ``server`` (Redis, running), with wires, until the block ends."""
    from tests.wire import Wire

    async with contextlib.AsyncExitStack() as stack:
        sending, receiving = [await stack.enter_async_context(Wire(server.port)) for _ in range(2)]
        urls = [f"redis://127.0.0.1:{one.port}?timeout=0.5" for one in (sending, receiving)]
        training, witness = WiredTraining(urls[0], folder, **settings), Witness(urls[1])
        tasks = [asyncio.create_task(work()) for work in (witness.read, witness.command)]
        training.start()
        try:
            yield Scene(server, training, witness, sending, receiving)
        finally:
            for task in tasks:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            training._is_over.set()
            await asyncio.to_thread(training._thread.join, 60)
            for one in found:
                if isinstance(one, Exception) and not isinstance(one, EnvelopeError):
                    raise one
