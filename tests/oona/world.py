"""One seed drives a training, its desk, its disk and the bus that orders come over.

The desk, the queue of commands, their application, the log, the checkpoints and the hub of the memory bus are the real
ones; the training is integer arithmetic, and what lies between is as bad as can be: messages are lost, doubled, late
and in any order, the disk fails, the process dies, the power goes. Issuers send an order again until they hear of it.
An observer holds all that was ever told against all that is there. The same seed gives the same trace.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tests.oona.served import JOB, RUN, an_order, sealed

from esper.commands import obey
from esper.errors import StateError
from esper.kasmina.gates import Gate
from esper.oona import envelope as wire
from esper.oona.answers import Answer, read_entry
from esper.oona.bus import Delivery, Message
from esper.oona.desk import Desk
from esper.oona.memory import Hub
from esper.oona.signing import Keyring, Verifier
from esper.oona.topics import COMMANDS
from esper.orders import Keeping, Orders
from esper.protocol import (
    Acknowledgement,
    Command,
    Lifecycle,
    Order,
    Pause,
    Resume,
    RollBack,
    SetBudget,
    Snapshot,
    Stop,
)
from esper.safety.checkpoint import Checkpoints
from esper.safety.command_log import Position
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk, ProcessDeath
from esper.safety.tree import copy_of, digest

CHECKPOINTS, LOG = Path("/simulated/run/checkpoints"), Path("/simulated/run/commands.jsonl")
SNAPSHOT_EVERY, SNAPSHOTS = 6, 2
HOST = 1000
"""Budgets below are refused."""
GROUP = "training"
KEYS = Keyring({"world": "w" * 40})
WINDOW_S = 15.0
"""Messages that are older, or as far ahead, are stale."""


class Training:
    """The part that dies: what a grower is to commands, with a line of arithmetic for a step."""

    def __init__(self, disk: Any, clock: Callable[[], float]) -> None:
        cohort = SimpleNamespace(number=1, state=Lifecycle.GRAFTING)
        self.kasmina = SimpleNamespace(host_params=HOST, cohorts={1: cohort})
        self.clock, self.loop = SimpleNamespace(steps=0), SimpleNamespace(paused=None)
        self.journal, self.guard = SimpleNamespace(emit=lambda event: None), self
        self.stages = SimpleNamespace(expel=lambda cohort, step, reason: None)
        self.stopped: str | None = None
        self.weights, self.applied = torch.arange(4, dtype=torch.int64), list[int]()
        self.snapshots: dict[int, Any] = {}
        self.keeping = Keeping()
        self.keeping.on_demand = True
        self.orders = Orders(self.keeping)
        self.checkpoints = Checkpoints(CHECKPOINTS, kind="simulated", disk=disk)
        verify = Verifier(KEYS, window_s=WINDOW_S, clock=clock).check
        self.desk = Desk(LOG, run=RUN, job=JOB, verify=verify, clock=clock, room=12, disk=disk)
        loaded = self.checkpoints.load()
        self.has_lost_a_checkpoint = loaded is not None and bool(loaded.passed_over)
        self.kept_turn = self.desk.state()["turn"] if loaded is None else loaded.tree["desk"]["turn"]
        """Of the newest checkpoint that it knows of."""
        if loaded is not None:
            self._put(loaded.tree)
            self.orders.restore(loaded.tree["orders"])
            self.desk.restore(loaded.tree["desk"])
            self.keeping.kept(self.clock.steps)
            self._snap()

    # ------------------------------------------------------------------------------------------ as commands see it

    def set_budget(self, params: int | None, flops: float | None) -> None:
        assert params is not None
        self.weights = self.weights * 31 + params
        self.applied = [*self.applied, params]

    def stop(self, reason: str) -> None:
        self.weights = self.weights * 7 + 1

    def take_back(self, cohort: Any, step: int, reason: str) -> Gate:
        earlier = [at for at in self.snapshots if at < step]
        if not earlier:
            return Gate("snapshot", False, "no snapshot is kept")
        to = max(earlier)
        self._put(copy_of(self.snapshots[to]))
        self.snapshots = {at: state for at, state in self.snapshots.items() if at <= to}
        self.orders.undone(to)
        return Gate("command", True, "")

    # ------------------------------------------------------------------------------------------ the loop

    def step(self) -> None:
        self.clock.steps += 1
        step = self.clock.steps
        self.weights = self.weights * 6364136223846793005 + step + (self.loop.paused is not None)
        obey(self, self.orders, self.desk, step)  # type: ignore[arg-type]
        if self.clock.steps == step:
            self._snap()
        if self.keeping.due is not None:
            self.save()

    def _snap(self) -> None:
        step = self.clock.steps
        if step % SNAPSHOT_EVERY == 0:
            self.snapshots[step] = copy_of(self.state())
            self.snapshots = dict(sorted(self.snapshots.items())[-SNAPSHOTS:])
            self.orders.forget(min(self.snapshots))

    def save(self) -> None:
        if self.desk.is_replaying:
            return
        tree = {**self.state(), "orders": self.orders.state(), "desk": self.desk.state()}
        try:
            self.checkpoints.save(tree, step=self.clock.steps)
        except StateError as error:
            self.keeping.due = None
            self.desk.kept(str(error))
        else:
            self.kept_turn = self.desk.state()["turn"]
            self.keeping.kept(self.clock.steps)
            self.desk.kept()

    def state(self) -> Any:
        return {"step": self.clock.steps, "weights": self.weights, "applied": self.applied, "paused": self.loop.paused}

    def _put(self, state: Any) -> None:
        self.clock.steps, self.weights = state["step"], state["weights"]
        self.applied, self.loop.paused = list(state["applied"]), state["paused"]


@dataclass
class Outcome:
    """What a world did. ``violations`` are broken promises; there must be none."""

    trace: list[str] = field(default_factory=list[str])
    violations: list[str] = field(default_factory=list[str])
    counts: dict[str, int] = field(default_factory=dict[str, int])

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def simulate(seed: int, *, steps: int = 40, lives: int = 4) -> Outcome:
    """One world, to the end: until every issuer has heard of every order."""
    world = World(seed)
    for _ in range(lives):
        world.live(steps)
    world.finish()
    return world.outcome


class World:
    """The disk, the bus, the issuers, the clock and the observer."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now = random.Random(seed), 1_000_000.0
        self.disk, self.outcome = SimulatedDisk(), Outcome()
        self.hub = Hub(clock=lambda: self.now)
        self.hub.join([COMMANDS], GROUP, "oldest")
        self.sent: dict[str, Order] = {}
        self.under_way: list[tuple[float, str, float]] = []
        """When a copy of an order arrives, and the time that it bears."""
        self.unanswered: dict[str, float] = {}
        """When an issuer sends an order again."""
        self.told: dict[str, Acknowledgement] = {}
        self.in_hand: list[Delivery] = []
        self.course: dict[int, str] = {}
        """Digest of the training by turn, as long as it has to come again after a death."""
        self.faults: dict[int, str] = {}
        self.training: Any = None
        self.is_calm = self.has_lost_a_checkpoint = False

    # ------------------------------------------------------------------------------------------ lives

    def live(self, steps: int) -> None:
        self.faults = self._plan()
        try:
            self._start()
            for _ in range(self.rng.randrange(steps) if self.rng.random() < 0.7 else 3):
                self._tick()
                if self.outcome.violations:
                    break
        except ProcessDeath:
            self._note("death")
        except StateError as error:
            self._note(f"gave up: {error}")
            if not self.faults:
                self._violate(f"a start was refused: {error}")
        self._end()

    def finish(self) -> None:
        """Nothing fails any more: everybody hears of everything."""
        self.is_calm, self.faults = True, {}
        try:
            self._start()
        except StateError as error:
            self._violate(f"a start was refused: {error}")
            return
        for _ in range(150):
            is_done = not self.unanswered and not self.training.desk._replay
            if is_done or self.outcome.violations:
                break
            self._tick()
        self.training.step()
        self.training.step()
        if self.unanswered:
            self._violate(f"{sorted(self.unanswered)} were never answered")
        self._check_state()
        self._end()

    def _plan(self) -> dict[int, str]:
        faults: dict[int, str] = {}
        for _ in range(2):
            if self.rng.random() < 0.4:
                start = self.rng.randrange(150)
                error = self.rng.choice(("ENOSPC", "EIO", "short"))
                faults |= dict.fromkeys(range(start, start + self.rng.choice((1, 1, 9))), error)
        if self.rng.random() < 0.6:
            faults[self.rng.randrange(200)] = self.rng.choice(("death", "half"))
        return faults

    def _start(self) -> None:
        before = self.training
        self.training = Training(FaultyDisk(self.disk, self.faults), lambda: self.now)
        self.cursor = Position()
        # An exact rollback that only a damaged checkpoint knew cannot be done again from an older one; it is told.
        self.has_lost_a_checkpoint |= self.training.has_lost_a_checkpoint
        # Nor from one that was written although its writer was told that it was not: these worlds' checkpoints hold no
        # snapshots, and what was told after it counted on those of the one before.
        self.has_lost_a_checkpoint |= before is not None and self.training.kept_turn > before.kept_turn
        self.horizon = max((intent.turn for intent in self.training.desk._replay.intents), default=0)
        # What no log holds to its course may go another way.
        self.course = {turn: what for turn, what in self.course.items() if turn <= self.horizon}
        self._note(f"start at {self.training.clock.steps}, turn {self.training.desk._turn}")
        for order_id, told in self.told.items():
            known = self.training.desk.answer_to(order_id)
            if told.gate != "journal" and (known is None or _said(known) != _said(told)):
                self._violate(f"{order_id} was {_said(told)}, after a start it is {known and _said(known)}")
        self.outcome.count("starts")

    def _end(self) -> None:
        if self.training is not None:
            with contextlib.suppress(ProcessDeath):
                self.training.desk._pad.close()
                self.training.checkpoints.close()
        if self.rng.random() < 0.5:
            self.disk.cut_power(self.rng)
        else:
            self.disk.kill()
        self.in_hand.clear()
        self.hub.release([COMMANDS], GROUP, "life")

    # ------------------------------------------------------------------------------------------ one step of all

    def _tick(self) -> None:
        self.now += self.rng.expovariate(2.0)
        self._issue()
        self._carry()
        self._receive()
        overtaking = [o for o in self.training.desk._waiting.values() if isinstance(o.command, Stop)]
        is_overtaken = bool(self.training.desk._replay and overtaking)
        if is_overtaken:  # nothing can be said of the course any more, whether this step is lived through or not
            self.course, self.horizon = {}, 10**9
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.training.step()
        if is_overtaken:
            self._hurry(overtaking)
        texts = [str(one.message) for one in said]
        if any("given up" in text for text in texts):  # the disk took neither its answer nor that it was lived through
            self.outcome.count("given up")
            self.course, self.horizon = {}, 10**9
        texts = [text for text in texts if "given up" not in text]
        if texts and not self.has_lost_a_checkpoint:
            self._violate(texts[0])
        if self.is_calm or self.rng.random() < 0.7:
            self.training.desk.write()
        self._observe()
        self._tell()
        if self.rng.random() < 0.15:
            self.training.save()
            self.outcome.count("saves")

    def _hurry(self, stops: list[Order]) -> None:
        """An emergency stop does not wait for the replay."""
        self.outcome.count("replays overtaken")
        if self.training.desk._pad.is_ready and any(order.id in self.training.desk._waiting for order in stops):
            self._violate("an emergency stop waits for the replay")

    def _issue(self) -> None:
        if not self.is_calm and self.rng.random() < 0.5:
            order_id = f"o{len(self.sent)}"
            deadline = f"1970-01-12T13:{46 + self.rng.randrange(3)}:{self.rng.randrange(60):02}Z"
            self.sent[order_id] = an_order(
                order_id, self._command(len(self.sent)), issuer=self.rng.choice(("ada", "bob")),
                deadline=deadline if self.rng.random() < 0.1 else None,
            )  # fmt: skip
            self.unanswered[order_id] = self.now
        for order_id, again in self.unanswered.items():
            if again <= self.now:
                self.unanswered[order_id] = self.now + 4
                for _ in range(1 if self.is_calm else self.rng.choice((0, 1, 1, 1, 2, 3))):
                    late = 0.0 if self.is_calm else self.rng.choice((0, 0, 1, 30)) * self.rng.random()
                    wrong = 0.0 if self.is_calm else self.rng.choice((0,) * 15 + (-60, 60))
                    self.under_way.append((self.now + late, order_id, self.now + wrong))

    def _command(self, number: int) -> Command:
        kind = self.rng.random()
        if kind < 0.18:
            return RollBack(cohort=1, reason="", exact=True)
        if kind < 0.25:
            return self.rng.choice((Pause(), Resume(), Snapshot(), Stop(reason="fire", emergency=True)))
        return SetBudget(params=number if kind < 0.35 else HOST + number)

    def _carry(self) -> None:
        """From the issuers to the bus; what is late comes in any order."""
        arrived = [item for item in self.under_way if item[0] <= self.now]
        self.under_way = [item for item in self.under_way if item[0] > self.now]
        self.rng.shuffle(arrived)
        for _, order_id, sent in arrived:
            expires = None if self.is_calm or self.rng.random() < 0.8 else wire.timestamp(sent + 10 * self.rng.random())
            envelope = KEYS.sign(sealed(self.sent[order_id], time=wire.timestamp(sent), esperexpires=expires))
            self.hub.put(COMMANDS, [Message(JOB, wire.encode(envelope))])

    def _receive(self) -> None:
        """From the bus to the desk; a delivery is acknowledged when its order is not open any more."""
        self.in_hand += self.hub.take([COMMANDS], GROUP, "life", self.rng.randrange(6), 8.0)
        desk = self.training.desk
        done: list[Delivery] = []
        for delivery in self.in_hand:
            envelope = wire.decode(delivery.value)
            said = desk.take(envelope)
            if said is not None:
                self._hear(said)
            if not desk.is_open(envelope.id):
                done.append(delivery)
        self.in_hand = [delivery for delivery in self.in_hand if delivery not in done]
        if self.is_calm or self.rng.random() < 0.9:  # else they come again
            self.hub.done(GROUP, done)

    # ------------------------------------------------------------------------------------------ what must hold

    def _tell(self) -> None:
        """Acknowledgements leave by the log; some are lost on their way."""
        desk = self.training.desk
        for entry in desk._pad.after(self.cursor):
            said = read_entry(entry)
            if isinstance(said, Answer) and (self.is_calm or self.rng.random() < 0.8):
                self._hear(said.acknowledgement)
        self.cursor = desk._pad._log.position
        for told in desk.unlogged():
            self._hear(told)

    def _hear(self, told: Acknowledgement) -> None:
        self._note(f"told {told.id} {told.outcome} {told.gate}")
        self.outcome.count(f"{told.outcome} {told.gate}".strip())
        self.outcome.count("told" if told.first else "told again")
        if told.gate == "id":
            self._violate(f"{told.id} was taken for another order")
        first = self.told.setdefault(told.id, told)
        if first.gate == "journal" and _said(first) != _said(told):
            self.told[told.id] = first = told  # the one answer that is not on the disk
        if _said(first) != _said(told):
            self._violate(f"{told.id} was {_said(first)} and is {_said(told)}")
        self.unanswered.pop(told.id, None)

    def _observe(self) -> None:
        """While its log is replayed the training takes the course that it had before."""
        training = self.training
        turn = training.desk._turn
        now = digest(training.state())
        if turn <= self.horizon:
            before = self.course.get(turn)
            if before is not None and before != now and not self.has_lost_a_checkpoint:
                self._violate(f"turn {turn} went another way when it was replayed")
            self.outcome.count("replayed turns")
        elif training.keeping.holds or training.desk._doubted or training.desk._pad.lost:
            self.course = {turn: what for turn, what in self.course.items() if turn < 0}
            self.horizon = 10**9  # nothing can be said of this life any more
            self.outcome.count("uncertain lives")
        else:
            self.course = {at: what for at, what in self.course.items() if at < turn} | {turn: now}
        if len(set(training.applied)) != len(training.applied):
            self._violate(f"an order was applied twice: {training.applied}")
        order = [read_entry(entry) for entry in training.desk._pad.after(Position()) if entry.id.startswith("order/")]
        logged = [i.order.command.params for i in order if isinstance(i.order.command, SetBudget)]  # type: ignore[union-attr]
        places = [logged.index(params) for params in training.applied if params in logged]
        if places != sorted(places) or len(places) != len(training.applied):
            self._violate("orders were applied in another order than written down, or not written down")

    def _check_state(self) -> None:
        if self.has_lost_a_checkpoint:
            return
        applied = set(self.training.applied)
        for order_id, order in self.sent.items():
            told = self.told.get(order_id)
            if told is None or told.gate == "journal" or not isinstance(order.command, SetBudget):
                continue
            if (told.outcome == "applied") != (order.command.params in applied):
                self._violate(f"{order_id} was told as {told.outcome}, which is not what is there")

    def _note(self, what: str) -> None:
        self.outcome.trace.append(f"{self.now:.3f} {what}")

    def _violate(self, what: str) -> None:
        self.outcome.violations.append(what)
        self._note(f"VIOLATION {what}")


def _said(told: Acknowledgement) -> tuple[Any, ...]:
    return told.outcome, told.gate, told.reason, told.step
