"""Orders over a bus to a training that is killed (SIGKILL) again and again, until every order was answered.

This process holds the bus and the children's leash; each child is a life of the training. What a child says is noted;
so a second outcome, or one that the training knows nothing of in the end, cannot hide.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import select
import signal
import socket
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.oona.served import JOB, Served, an_order, sealed
from tests.servers import RedisServer

from esper.errors import BusError
from esper.oona import envelope as wire
from esper.oona.address import open_bus
from esper.oona.answers import Answer, Intent, read_entry
from esper.oona.bus import Bus, Delivery, Message, Subscription
from esper.oona.topics import COMMANDS
from esper.protocol import Cancel, Command, Germinate, Pause, Resume, RollBack, SeedPlan, SetBudget
from esper.safety.command_log import read_log

BASE = 1_000_000
REDELIVER_S = 1.0
AT_ONCE = 40


class Ledger:
    """Budgets that were set, as a part of the training: it is saved and taken back with it."""

    def __init__(self) -> None:
        self.applied: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"applied": list(self.applied)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.applied = list(state["applied"])


def orders_of(count: int, rng: random.Random) -> list[Any]:
    """Mostly budgets, each with its own number; now and then something that grows or goes back."""

    def command(number: int) -> Command:
        kind = rng.random()
        if kind < 0.03:
            return Germinate(seeds=(SeedPlan(site=rng.choice(["fc1-fc2", "fc2-fc3", "nowhere"]), width=2),))
        if kind < 0.05:
            return RollBack(cohort=rng.randrange(1, 20), reason="any", exact=True)
        if kind < 0.09:
            return rng.choice([Pause(), Resume(), Cancel(cohort=rng.randrange(1, 20), reason="any")])
        return SetBudget(params=BASE + number if kind < 0.95 else 1)

    return [an_order(f"o{number}", command(number)) for number in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# A life


def life(folder: Path, pipe: socket.socket) -> None:
    """Train and take orders until the other side says that it is over."""
    ledger = Ledger()
    served = Served(folder, track=[ledger])
    original = served.grower.set_budget

    def set_budget(params: int | None, flops: float | None) -> None:
        original(params, flops)
        assert params is not None
        ledger.applied.append(params)

    served.grower.set_budget = set_budget  # type: ignore[method-assign]
    served.resume()
    cursor, over = served.desk._pad.position, threading.Event()
    said_so_far: queue.SimpleQueue[Any] = queue.SimpleQueue()
    say = said_so_far.put

    def speak() -> None:
        """From a thread of its own: whoever listens must never wait for the other side to do so."""
        while (what := said_so_far.get()) is not None:
            pipe.sendall(json.dumps(what).encode() + b"\n")

    def listen() -> None:
        for line in pipe.makefile("rb"):
            if line == b"over\n":
                break
            told = served.desk.take(wire.decode(bytes.fromhex(line.decode())))
            if told is not None:
                say([told.id, told.outcome, told.gate, told.step])
        over.set()

    threading.Thread(target=listen, daemon=True).start()
    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    while not (over.is_set() and not served.desk.is_replaying):
        served.step()
        for entry in served.desk._pad.after(cursor):
            said = read_entry(entry)
            if isinstance(said, Answer):
                told = said.acknowledgement
                say([told.id, told.outcome, told.gate, told.step])
        cursor = served.desk._pad.position
        if served.steps % 25 == 0:
            served.save()
    served.train(2)  # what was taken back is given again
    known = {name: answer.acknowledgement for name, answer in served.desk._register.answers.items()}
    say({"applied": ledger.applied, "answers": {n: [a.outcome, a.gate, a.step] for n, a in known.items()}})
    say(None)
    speaker.join()


def begin(folder: Path) -> tuple[int, socket.socket]:
    """A child with a life of the training, and the pipe to it."""
    mine, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            mine.close()
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            life(folder, its)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    its.close()
    return pid, mine


# ----------------------------------------------------------------------------------------------------------------------
# The other side


@dataclass
class Result:
    """What was told, and what the last life knows."""

    told: dict[str, set[tuple[Any, ...]]] = field(default_factory=dict[str, set[tuple[Any, ...]]])
    kills: int = 0
    broker_kills: int = 0
    received: int = 0
    end: dict[str, Any] = field(default_factory=dict[str, Any])


class Leash:
    """Carries deliveries into a life and what it says out, and kills it."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.result = folder, rng, Result()
        self.in_hand: dict[str, list[Delivery]] = {}
        self.rest = b""
        self.pid, self.pipe = begin(folder)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pipe.close()
        self.in_hand, self.rest = {}, b""
        self.result.kills += 1
        self.pid, self.pipe = begin(self.folder)

    def give(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.in_hand.setdefault(wire.decode(delivery.value).id, []).append(delivery)
            self.pipe.sendall(delivery.value.hex().encode() + b"\n")
            self.result.received += 1

    def hear(self, wait_s: float) -> list[Delivery]:
        """Deliveries that are done with."""
        done: list[Delivery] = []
        while select.select([self.pipe], [], [], wait_s)[0]:
            data = self.pipe.recv(1 << 16)
            if not data:
                raise RuntimeError("the training has ended by itself")
            *lines, self.rest = (self.rest + data).split(b"\n")
            for said in map(json.loads, lines):
                if isinstance(said, dict):
                    self.result.end = said
                    return done
                self.result.told.setdefault(said[0], set()).add(tuple(said[1:]))
                done += self.in_hand.pop(said[0], [])
            wait_s = 0.0
        return done

    def end(self) -> Result:
        self.pipe.sendall(b"over\n")
        end = time.monotonic() + 120
        while not self.result.end and time.monotonic() < end:
            self.hear(0.5)
        os.waitpid(self.pid, 0)
        return self.result


async def patiently(action: Callable[[], Any]) -> Any:
    """Again and again, while the broker is away."""
    for _ in range(600):
        try:
            return await action()
        except BusError:
            await asyncio.sleep(0.1)
    raise TimeoutError("the broker did not come back")


async def steer(
    folder: Path, bus: Bus, count: int, kills: int, *, seed: int = 0, broker_kills: int = 0,
    kill_broker: Callable[[], None] = lambda: None,
) -> tuple[list[Any], Result]:  # fmt: skip
    """Send ``count`` orders, 30% of them again and in another order; kill the training, and the broker, on the way."""
    rng = random.Random(seed)
    orders = orders_of(count, rng)
    queue = [(number + rng.random() * rng.choice((0, 0, 0, 30)), order) for number, order in enumerate(orders)]
    queue += [(number + rng.random() * 60, order) for number, order in enumerate(orders) if rng.random() < 0.3]
    queue.sort(key=lambda item: item[0])
    messages = [Message(JOB, wire.encode(sealed(order))) for _, order in queue]
    deaths = sorted(rng.sample(range(10, count), kills))
    outages = sorted(rng.sample(range(10, count), broker_kills))
    subscription: Subscription = await patiently(
        lambda: bus.subscribe([COMMANDS], group="training", consumer="life", redeliver_s=REDELIVER_S)
    )
    leash, sent, quiet_since = Leash(folder, rng), 0, time.monotonic()
    while len(leash.result.told) < count or any(leash.in_hand.values()) or deaths or outages:
        if sent < len(messages):
            batch = messages[sent : sent + 20]
            await patiently(lambda batch=batch: bus.publish(COMMANDS, batch))
            sent += len(batch)
        leash.give(await patiently(lambda: subscription.receive(AT_ONCE, 0.005)))
        done = leash.hear(0.01)
        if done:
            quiet_since = time.monotonic()
            await patiently(lambda done=done: subscription.acknowledge(done))
        heard = len(leash.result.told)
        if deaths and heard >= deaths[0]:
            deaths.pop(0)
            await asyncio.sleep(rng.random() * 0.02)
            leash.kill()
        if outages and heard >= outages[0]:
            outages.pop(0)
            leash.result.broker_kills += 1
            kill_broker()
        if time.monotonic() - quiet_since > 120:
            missing = [order.id for order in orders if order.id not in leash.result.told]
            raise TimeoutError(f"{len(missing)} orders are not answered: {missing[:9]}")
    await subscription.close()
    return orders, leash.end()


def with_redis(folder: Path, count: int, kills: int, outages: int) -> tuple[list[Any], Result]:
    """:func:`steer` over a Redis that keeps what it has acknowledged."""
    server = RedisServer(folder / "redis", is_durable=True)
    server.start()

    def kill_broker() -> None:
        server.kill()
        server.start()

    async def run() -> tuple[list[Any], Result]:
        bus = open_bus(server.url)
        try:
            return await steer(folder, bus, count, kills, broker_kills=outages, kill_broker=kill_broker)
        finally:
            await bus.close()

    try:
        return asyncio.run(run())
    finally:
        server.kill()


def check(folder: Path, orders: Sequence[Any], result: Result) -> Counter[str]:
    """Each order has one outcome, which is what the training and its log hold. Returns how often there was which."""
    two = {name: said for name, said in result.told.items() if len(said) != 1}
    assert not two, f"more than one outcome: {two}"
    assert set(result.told) == {order.id for order in orders}
    for name, (said,) in result.told.items():
        assert result.end["answers"][name] == list(said), name
    applied = result.end["applied"]
    wanted = {
        order.command.params
        for order in orders
        if isinstance(order.command, SetBudget) and next(iter(result.told[order.id]))[0] == "applied"
    }
    assert len(applied) == len(set(applied)), "an order was applied twice"
    assert set(applied) == wanted, "what was acknowledged is not what is there"
    entries = [read_entry(entry) for entry in read_log(folder / "commands.jsonl")[0]]
    intents = Counter(entry.order.id for entry in entries if isinstance(entry, Intent))
    # Where steps are slow more orders wait than there is room for; those are refused without a step.
    turned_away = {name for name, (said,) in result.told.items() if said[1] == "room"}
    assert intents == Counter(set(result.told) - turned_away)
    assert [e.acknowledgement.first for e in entries if isinstance(e, Answer)] == [True] * len(orders)
    return Counter(next(iter(said))[0] for said in result.told.values()) + Counter(turned_away=len(turned_away))
