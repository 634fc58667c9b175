"""One id, one outcome: in thousands of small worlds of a desk and its disk, in which copies bear any time."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.oona.served import JOB, RUN, an_order, sealed
from tests.oona.test_desk import LOG, YES

from esper.errors import StateError
from esper.oona import desk as desks
from esper.oona import envelope as wire
from esper.oona.answers import Answer, read_entry
from esper.oona.desk import Desk
from esper.oona.register import Register
from esper.oona.signing import Keyring, Verifier
from esper.protocol import Acknowledgement, SetBudget
from esper.safety.command_log import Position
from esper.safety.simulation.disk import SimulatedDisk
from esper.safety.simulation.faults import FaultyDisk, ProcessDeath

pytestmark = pytest.mark.component

SEEDS, CANARY_SEEDS, ORDERS, WINDOW_S = 2000, 200, 4, 10.0
KEYS = Keyring({"world": "w" * 40})
Patch = pytest.MonkeyPatch


class World:
    """A desk that dies and begins again, and all that was ever told of each id."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now, self.step = random.Random(seed), 1_000_000.0, 0
        self.disk, self.counts = SimulatedDisk(), Counter[str]()
        self.saved: tuple[Any, list[str], int] = (None, [], 0)
        self.applied: list[str] = []
        self.told: dict[str, Acknowledgement] = {}
        self.copies: list[Any] = []

    def begin(self) -> None:
        faults = {}
        if self.rng.random() < 0.5:
            faults[self.rng.randrange(30)] = self.rng.choice(("death", "half", "EIO", "ENOSPC"))
        verify = Verifier(KEYS, window_s=WINDOW_S, clock=lambda: self.now).check
        disk: Any = FaultyDisk(self.disk, faults)
        self.desk = Desk(LOG, run=RUN, job=JOB, verify=verify, clock=lambda: self.now, room=1, disk=disk)
        state, applied, self.step = self.saved
        self.desk.restore(state)
        self.applied, self.cursor = list(applied), Position()
        for order_id, first in self.told.items():
            known = self.desk.answer_to(order_id)
            assert known is not None and said(known) == said(first), f"{order_id} was {first}, and now it is {known}"

    def live(self, ticks: int) -> None:
        try:
            self.begin()
            for _ in range(ticks):
                self.tick()
        except ProcessDeath:
            self.counts["deaths"] += 1
        except StateError:
            self.counts["refused starts"] += 1
        desk = getattr(self, "desk", None)
        if desk is not None:
            desk._pad.close()
        if self.rng.random() < 0.5:
            self.disk.cut_power(self.rng)
        self.disk.kill()

    def tick(self) -> None:
        self.now += self.rng.random() * 4
        if self.rng.random() < 0.7:
            self.send()
        if self.rng.random() < 0.5:
            self.step += 1
            for order in self.desk.turn(self.step):
                self.applied.append(order.id)
                assert self.applied.count(order.id) == 1, f"{order.id} is applied twice"
                self.desk.answer(order, self.step, YES, hold=False)
        if self.rng.random() < 0.5:
            self.desk.write()
        for entry in self.desk._pad.after(self.cursor):
            if isinstance(found := read_entry(entry), Answer):
                self.hear(found.acknowledgement)
        self.cursor = self.desk._pad.position
        if self.rng.random() < 0.1 and not self.desk.is_replaying:
            self.saved = (self.desk.state(), list(self.applied), self.step)

    def send(self) -> None:
        """A copy that is made now, with any time, or one that was made before."""
        if not self.copies or self.rng.random() < 0.5:
            number = self.rng.randrange(ORDERS)
            at = self.now + self.rng.choice((0, 0, -30, 30))
            expires = wire.timestamp(self.now + self.rng.choice((-5, 20))) if self.rng.random() < 0.3 else None
            order = an_order(f"o{number}", SetBudget(params=number))
            self.copies.append(KEYS.sign(sealed(order, time=wire.timestamp(at), esperexpires=expires)))
        told = self.desk.take(self.rng.choice(self.copies[-6:]))
        if told is not None:
            self.hear(told)

    def hear(self, told: Acknowledgement) -> None:
        if told.gate == "journal":  # the one that may be forgotten; see docs/safety.md
            return
        self.counts[f"{told.outcome} {told.gate}"] += 1
        first = self.told.setdefault(told.id, told)
        assert said(first) == said(told), f"{told.id} was {first} and is {told}"
        assert (told.outcome == "applied") == (told.id in self.applied) or self.desk.is_replaying


def said(told: Acknowledgement) -> tuple[Any, ...]:
    return told.outcome, told.gate, told.reason


def run(seed: int) -> Counter[str]:
    world = World(seed)
    for _ in range(3):
        world.live(12)
    return world.counts


def test_an_id_has_one_outcome_in_any_world() -> None:
    counts = Counter[str]()
    for seed in range(SEEDS):
        try:
            counts += run(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    for what in ("applied command", "refused stale", "expired expired", "refused room", "deaths"):
        assert counts[what] > 100, f"the worlds hardly try {what}: {counts}"


def late_is_not_remembered(patch: Patch) -> None:
    """Late once is late for ever, it seems; but a copy with another time may follow."""
    take = Desk.take

    def forgetful(self: Desk, envelope: Any) -> Acknowledgement | None:
        doubt = self._verify(envelope)
        if doubt is not None and doubt.flaw in ("stale", "expired") and self._content(envelope.id) is None:
            order = an_order(envelope.id, SetBudget(params=int(envelope.id[1:])))
            outcome = "expired" if doubt.flaw == "expired" else "refused"
            return desks.acknowledge(order, outcome, doubt.flaw, str(doubt), self._step)
        return take(self, envelope)

    patch.setattr(Desk, "take", forgetful)


def late_is_told_before_it_is_written(patch: Patch) -> None:
    turn_away = Register.turn_away

    def hasty(self: Register, order: Any, told: Acknowledgement) -> None:
        turn_away(self, order, told)
        self.answers[order.id] = self._turned_away[-1]

    patch.setattr(Register, "turn_away", hasty)


def late_hides_what_is_known(patch: Patch) -> None:
    """An order that waits is refused because a copy of it is late."""
    content = Desk._content

    def blind(self: Desk, order_id: str) -> str | None:
        return content(self, order_id) if order_id not in self._waiting else None

    patch.setattr(Desk, "_content", blind)


@pytest.mark.parametrize("bug", [late_is_not_remembered, late_is_told_before_it_is_written, late_hides_what_is_known])
def test_a_planted_bug_is_found(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    bug(monkeypatch)
    with pytest.raises((AssertionError, RuntimeWarning)):  # the desk itself warns of an answer that has changed
        for seed in range(CANARY_SEEDS):
            run(seed)
