"""The desk against a model of it: issuers send anything in any order, the process ends anywhere, one answer each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.oona.served import an_order, sealed
from tests.oona.test_desk import Fixture

from esper.kasmina.gates import Gate
from esper.protocol import Acknowledgement, SetBudget

pytestmark = pytest.mark.component

IDS = st.sampled_from([f"o{number}" for number in range(12)])


class AnyTraffic(RuleBasedStateMachine):
    """``o3`` is refused by its gate, all others are applied; a checkpoint is the state as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self.fix = Fixture(room=5)
        self.told: dict[str, Acknowledgement] = {}
        self.done: list[str] = []
        """What the training holds, in order."""
        self.waiting: list[str] = []
        self.saved: tuple[Any, list[str]] = (None, [])

    def hear(self, said: Acknowledgement | None) -> None:
        if said is None or said.gate == "id":
            return
        first = self.told.setdefault(said.id, said)
        assert (said.outcome, said.gate, said.step) == (first.outcome, first.gate, first.step)

    @rule(order_id=IDS)
    def send(self, order_id: str) -> None:
        said = self.fix.send(order_id, command=SetBudget(params=int(order_id[1:])))[0]
        assert said is not None or order_id not in self.told, "a repetition is answered at once"
        self.hear(said)
        if self.fix.desk.is_open(order_id) and order_id not in self.waiting:
            self.waiting.append(order_id)

    @rule(order_id=IDS)
    def send_another_under_the_id(self, order_id: str) -> None:
        if order_id in self.told or order_id in self.waiting:
            said = self.fix.desk.take(sealed(an_order(order_id, SetBudget(params=99))))
            assert said is not None and (said.outcome, said.gate, said.first) == ("refused", "id", False)

    @rule()
    def step(self) -> None:
        replayed = [intent.order.id for intent in self.fix.desk._replay.intents if intent.turn <= self.fix.step + 1]
        expected = replayed or ([] if self.fix.desk._replay else self.waiting)
        seen = self.fix.train(lambda order: Gate("budget", order.id != "o3", "no" * (order.id == "o3")))
        assert seen == expected, "in the order in which they came"
        self.done += seen
        self.waiting = [name for name in self.waiting if name not in seen]

    @rule()
    def listen(self) -> None:
        for number in range(12):
            self.hear(self.fix.desk.answer_to(f"o{number}"))

    @rule()
    def save(self) -> None:
        if not self.fix.desk.is_replaying:
            self.saved = (self.fix.desk.state(), list(self.done))

    @rule()
    def die(self) -> None:
        """What waits is forgotten; the bus still has it."""
        state, done = self.saved
        self.fix = self.fix.again(state, room=5)
        self.fix.step = 0 if state is None else max(state["turn"], 0)
        self.done, self.waiting = list(done), []

    @invariant()
    def nobody_is_applied_twice(self) -> None:
        assert len(set(self.done)) == len(self.done)

    @invariant()
    def what_was_told_stays(self) -> None:
        for order_id, told in self.told.items():
            known = self.fix.desk.answer_to(order_id)
            assert known is not None and (known.outcome, known.step) == (told.outcome, told.step)
            assert not self.fix.desk.is_open(order_id)

    @invariant()
    def what_was_told_as_applied_is_there_or_will_be(self) -> None:
        coming = {intent.order.id for intent in self.fix.desk._replay.intents}
        for order_id, told in self.told.items():
            if told.gate != "room":
                assert order_id in self.done or order_id in coming

    def teardown(self) -> None:
        self.fix.desk.close()


AnyTraffic.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None
)
TestAnyTraffic = AnyTraffic.TestCase
