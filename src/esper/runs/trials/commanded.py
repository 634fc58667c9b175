"""Fault trials of the bus: a run that is heard and commanded over one that fails, and the same run without any bus."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from esper.errors import BusError
from esper.oona import envelope as wire
from esper.oona.bus import Message
from esper.oona.desk import Desk
from esper.oona.incoming import nobody
from esper.oona.link import Link, LinkLimits
from esper.oona.memory import hub_named
from esper.oona.schemas import decode_payload
from esper.oona.sender import Sender
from esper.oona.topics import ACKNOWLEDGEMENTS, COMMANDS
from esper.protocol import ORDER_SCHEMA, Acknowledgement, Command, Commanded, Cull, Order, Pause, Resume, SetBudget
from esper.runs.trials.faulty import FaultyRun, inconsistencies, same_weights
from esper.runs.trials.faulty_hub import FaultyHub
from esper.runs.trials.records import FaultRecord
from esper.runs.trials.training import Setup
from esper.runs.trials.trial import is_finite
from esper.safety.faults import FAULTS, Fault, Strikes, Subject, Traffic

FIRST = (30, 110)
"""Least and most steps before the fault; the trial's number says how many."""
LASTS = 60
"""Steps that it lasts for, with an order every third one."""
FURTHER = 40
"""Steps after the last answer."""
PATIENCE_S = 30.0
"""How long orders may take once the fault is over."""
_PAUSE_S = 0.003
"""Between steps while messages are on their way: the courier, a thread of its own, gets its turn."""
_RUN, _JOB, _OPERATOR = "trial", "grown", "ada"


def commanded_trial(number: int, name: str) -> FaultRecord:
    """Trial ``number``: the fault strikes while orders come in. How often depends on the threads; 1 says that it did.

    Orders of even numbers change nothing that trains: the run must be the one that nobody commanded. Those of odd ones
    do, and the run must be the one without a bus that obeys the same log.
    """
    started, fault = time.perf_counter(), FAULTS[name]
    with tempfile.TemporaryDirectory(prefix="esper-trial-") as place:
        run = CommandedRun(Setup.of(number), fault, Path(place))
        problems = run.train()
    return FaultRecord(
        number=number, kind=name, task=run.setup.task.name, family=run.setup.task.family, phase=run.phase,
        struck=min(1, run.strikes.num), expects=fault.expects.value, held=not problems, detail="; ".join(problems),
        seconds=round(time.perf_counter() - started, 2),
    )  # fmt: skip


class CommandedRun:
    """One run, its bus, and somebody who commands it."""

    def __init__(self, setup: Setup, fault: Fault, folder: Path) -> None:
        self.setup, self.fault, self.folder = setup, fault, folder
        self.run, self.traffic = FaultyRun(setup, None), Traffic()
        self.hub = FaultyHub(self.traffic)
        self.phase = "no cohort alive"
        self.strikes = Strikes()
        self._log = folder / "commands.jsonl"
        self._orders: dict[str, Order] = {}
        self._unsent: deque[Order] = deque()
        self._answers: dict[str, list[Acknowledgement]] = {}

    def train(self) -> list[str]:
        """Everything; returns what does not hold."""
        name = self.folder.name
        self.hub.join([ACKNOWLEDGEMENTS], _OPERATOR, "oldest")
        with hub_named(name, self.hub):
            link = Link(
                f"memory://{name}", run=_RUN, job=_JOB, folder=self.folder / "bus", limits=LinkLimits(stop_s=2.0),
                environ={},
            )  # fmt: skip
            with link.serving(self.run.grower, self._log):
                self._go_through(self.fault)
                self._settle()
                self.run.take_steps(FURTHER)
        problems = [] if self.strikes.num else ["it never struck"]
        problems += _unaccounted(link)
        problems += [f"reached the training loop: {text}" for text in self.run.escaped[:2]]
        problems += inconsistencies(self.run.grower)
        if not is_finite(self.run.model):
            problems.append("the host's weights are not finite")
        return problems + self._wrongly_done() + self._otherwise()

    def _go_through(self, fault: Fault) -> None:
        least, most = FIRST
        self.run.take_steps(least + self.setup.number % (most - least))
        grower = self.run.grower
        if grower.kasmina.cohorts:
            self.phase = grower.kasmina.cohorts[max(grower.kasmina.cohorts)].state.name
        subject = Subject(
            model=self.run.model, optimizers=[self.run.optimizer], sites=grower.kasmina.sites, attach=lambda: None,
            traffic=self.traffic,
        )  # fmt: skip
        with fault.inject(subject) as self.strikes:
            for step in range(LASTS):
                if step % 3 == 0:
                    self._order(step // 3)
                self._step()
        self._unsent += self._orders.values()  # whoever waits for an answer asks again

    # ---------------------------------------------------------------------------------------------- the operator's

    def _order(self, turn: int) -> None:
        """Give the next order; every seventh comes too late."""
        deadline = wire.timestamp(time.time() - 60) if turn % 7 == 6 else None
        order = Order(
            id=f"order-{turn}", command=self._command(turn), issuer=_OPERATOR, run=_RUN, job=_JOB, deadline=deadline
        )
        self._orders[order.id] = order
        self._unsent.append(order)

    def _command(self, turn: int) -> Command:
        if self.setup.number % 2 == 0:
            refused = Cull(cohort=10_000 + turn, reason="there is none")
            return refused if turn % 4 == 3 else SetBudget(params=1_000_000_000 + turn)
        return Pause(reason="for a while") if turn % 4 < 2 else Resume(reason="again")

    def _send(self) -> None:
        """Send what the bus has not taken yet; what it may have taken is sent again."""
        sender = Sender(source="esper/operator", run=_RUN, subject=_JOB)
        while self._unsent:
            order = self._unsent[0]
            envelope = sender.envelope(ORDER_SCHEMA, wire.write_json(order), id=order.id, expires=order.deadline)
            try:
                self.hub.put(COMMANDS, [Message(f"{_RUN}/{_JOB}", wire.encode(envelope))])
            except BusError:
                return
            self._unsent.popleft()

    def _step(self) -> None:
        self._send()
        self.run.take_steps(1)
        time.sleep(_PAUSE_S)

    def _settle(self) -> None:
        """Train until every order is answered, or time is up."""
        end = time.monotonic() + PATIENCE_S
        while (self._unsent or set(self._orders) - set(self._answers)) and time.monotonic() < end:
            self._step()
            taken = self.hub.take([ACKNOWLEDGEMENTS], _OPERATOR, _OPERATOR, 1000, float("inf"))
            for delivery in taken:
                told = decode_payload(wire.decode(delivery.value))
                self._answers.setdefault(told.id, []).append(told)

    # ---------------------------------------------------------------------------------------------- what must hold

    def _wrongly_done(self) -> list[str]:
        """Orders without an answer, with several, that were applied twice, too late or without being given."""
        found = [f"{name} has no answer" for name in self._orders if name not in self._answers]
        done = Counter(event.id for event in self._commanded)
        found += [f"{name} was obeyed {num} times" for name, num in done.items() if num > 1]
        found += [f"{name} was never given" for name in set(done) | set(self._answers) if name not in self._orders]
        for name, answers in self._answers.items():
            outcomes = {told.outcome for told in answers}
            if len(outcomes) > 1:
                found.append(f"{name} was answered {' and '.join(sorted(outcomes))}")
            late = name in self._orders and self._orders[name].deadline is not None
            if (outcomes == {"expired"}) != late or (name in done) == late:
                found.append(f"{name} came {'too late' if late else 'in time'} and was {answers[0].outcome}")
        return found

    @property
    def _commanded(self) -> list[Commanded]:
        return [event for event in self.run.events if isinstance(event, Commanded)]

    def _otherwise(self) -> list[str]:
        """Train the same host without a bus."""
        other = FaultyRun(self.setup, None)
        if self.setup.number % 2 == 0:
            other.take_steps(self.run.clock)
        else:
            desk = Desk(self._log, run=_RUN, job=_JOB, verify=nobody)
            other.grower.serve(desk)
            other.take_steps(self.run.clock)
            other.grower.serve(None)
            desk.close()
        is_same = same_weights(self.run.grower, other.grower)
        return [] if is_same else ["the run is another one than without the bus"]


def _unaccounted(link: Link) -> list[str]:
    """Telemetry of which nobody says what became of it."""
    counts: Any = link.counts()["telemetry"]
    came, went = counts["offered"] + counts["recovered"], counts["delivered"] + counts["dropped"] + counts["pending"]
    return [] if came == went else [f"of {came} pieces of telemetry {went} are accounted for"]
