"""One controller for many trainings: nothing crosses between them, nothing is decided twice."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from tests.oona.test_observations_wire import full

from esper.errors import BusError, ConfigError
from esper.oona import envelope as wire
from esper.oona import observations
from esper.oona.bus import Message
from esper.oona.claim_stores import MemoryStore
from esper.oona.claims import Claims
from esper.oona.dead_letters import read_letter
from esper.oona.memory import Hub, MemoryBus
from esper.oona.operators import held
from esper.oona.schemas import OBSERVATION_SCHEMA, decode_payload
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.steering import GROUP, LISTED_S, MOST_ATTEMPTS, MOST_UNTOLD, OBSERVATION_MAX_AGE_S, Steering
from esper.oona.topics import (
    ACKNOWLEDGEMENTS,
    COMMANDS,
    DEAD_LETTERS,
    DECISIONS,
    HEARTBEATS,
    OBSERVATIONS,
    Topic,
)
from esper.protocol import (
    ACKNOWLEDGEMENT_SCHEMA,
    Acknowledgement,
    Command,
    Germinate,
    Observation,
    Order,
    SeedPlan,
)

pytestmark = pytest.mark.component

TIMES = "2026-01-01T00:00:{:06.3f}Z"
START = wire.seconds(TIMES.format(0))


class Eager:
    """Germinates at the first site whenever it is asked; remembers what it has seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        self.seen.append(observation.step)
        return (Germinate(seeds=(SeedPlan(site=observation.site_names[0]),), reason=str(observation.step)),)

    def state(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


class Raising(Eager):
    def decide(self, observation: Observation) -> tuple[Command, ...]:
        raise ValueError("no idea")


class Field:
    """A hub with a steering that reads it, and trainings that are only words."""

    def __init__(self, make: Any = Eager, *, keyring: Keyring | None = None, bus: Any = None) -> None:
        self.now = START
        self.hub = Hub()
        self.bus = MemoryBus(hub=self.hub) if bus is None else bus(self.hub)
        self.made: list[Any] = []
        self.notes: list[str] = []
        self.keyring = keyring

        def factory() -> Any:
            self.made.append(make())
            return self.made[-1]

        self.steering = Steering(
            self.bus, factory, name="eager", keyring=keyring, clock=lambda: self.now, on_note=self.notes.append
        )
        self.hub.join([ACKNOWLEDGEMENTS, OBSERVATIONS], GROUP, "newest")

    def observe(
        self, job: str, step: int, *, at: float, run: str = "run", keyring: Keyring | None = None, **more: Any
    ) -> None:
        sender = Sender(source="esper/kasmina", run=run, subject=job, keyring=keyring or self.keyring)
        sent = dataclasses.replace(full(), step=step, stopped=None, site_names=(f"{job}.a", "b", "c"))
        envelope = sender.envelope(
            OBSERVATION_SCHEMA, observations.encode(sent), time=wire.timestamp(START + at), **more
        )
        self.hub.put(OBSERVATIONS, [asyncio.run(sender.message(envelope))])

    def answer(self, order: Order, outcome: Any, *, at: float) -> None:
        sender = Sender(source="esper/kasmina", run=order.run, subject=order.job, keyring=self.keyring)
        told = Acknowledgement(id=order.id, outcome=outcome, run=order.run, job=order.job)
        envelope = sender.envelope(ACKNOWLEDGEMENT_SCHEMA, wire.write_json(told), time=wire.timestamp(START + at))
        self.hub.put(ACKNOWLEDGEMENTS, [asyncio.run(sender.message(envelope))])

    def turn(self) -> None:
        """Let the steering work through what is there."""

        async def work() -> None:
            subscription = await self.bus.subscribe(
                (ACKNOWLEDGEMENTS, OBSERVATIONS), group=GROUP, consumer="server", begin="newest"
            )
            while deliveries := await subscription.receive(most=500, wait_s=0.0):
                await self.steering._take(subscription, deliveries)

        asyncio.run(work())

    def orders(self) -> list[Order]:
        return [decode_payload(wire.decode(d.value)) for d in asyncio.run(held(self.bus, COMMANDS, 1000, wait_s=0.0))]

    def on(self, topic: Topic) -> list[Any]:
        return asyncio.run(held(self.bus, topic, 1000, wait_s=0.0))


def test_each_training_gets_its_own_orders_from_its_own_controller() -> None:
    field = Field()
    for number, job in enumerate("xyz"):
        field.observe(job, 10 + number, at=1)
    field.turn()
    orders = field.orders()
    assert [(o.job, o.command.seeds[0].site, o.command.reason) for o in orders] == [
        ("x", "x.a", "10"), ("y", "y.a", "11"), ("z", "z.a", "12")
    ]  # fmt: skip
    assert [c.seen for c in field.made] == [[10], [11], [12]] and field.steering.num_trainings == 3
    assert len({o.id for o in orders}) == 3 and all(o.issuer == "tamiyo" and o.deadline for o in orders)
    assert [d.key for d in field.on(COMMANDS)] == ["run/x", "run/y", "run/z"]


def test_its_orders_name_whose_the_key_is_that_signs_them() -> None:
    field = Field(keyring=Keyring.of(f"night-watch:{'n' * 32} run:{'r' * 32}"))
    field.observe("a", 10, at=0)
    field.turn()
    assert {order.issuer for order in field.orders()} == {"night-watch"}
    sent = wire.decode(asyncio.run(held(field.bus, COMMANDS, 9))[0].value)
    assert field.keyring is not None and field.keyring.is_signed(sent) and sent.esperkeyid == "night-watch"


def test_one_name_in_two_runs_is_two_trainings() -> None:
    field = Field()
    field.observe("x", 1, at=1, run="one")
    field.observe("x", 2, at=1, run="two")
    field.turn()
    assert [(o.run, o.command.reason) for o in field.orders()] == [("one", "1"), ("two", "2")]


def test_nothing_is_decided_while_orders_are_open() -> None:
    field = Field()
    field.observe("x", 10, at=1)
    field.turn()
    field.observe("x", 20, at=2)
    field.turn()
    assert len(field.orders()) == 1 and field.steering.counts["waited"] == 1
    field.answer(field.orders()[0], "applied", at=3)
    field.observe("x", 25, at=2.5)  # from before the answer: it does not show the order's effect
    field.turn()
    assert len(field.orders()) == 1
    field.observe("x", 30, at=3.5)
    field.turn()
    assert [o.command.reason for o in field.orders()] == ["10", "30"]
    assert field.steering.counts["applied"] == 1


def test_an_order_that_is_never_answered_runs_out() -> None:
    field = Field()
    field.observe("x", 10, at=1)
    field.turn()
    field.now += 31
    field.observe("x", 20, at=2)
    field.turn()
    assert [o.command.reason for o in field.orders()] == ["10", "20"]


def test_only_the_newest_of_several_observations_counts() -> None:
    field = Field()
    for step, at in ((10, 1.0), (30, 3.0), (20, 2.0)):
        field.observe("x", step, at=at)
    field.turn()
    assert [o.command.reason for o in field.orders()] == ["30"] and field.steering.counts["superseded"] == 2


def test_a_training_that_was_taken_back_is_followed() -> None:
    field = Field()
    field.observe("x", 100, at=1)
    field.turn()
    field.answer(field.orders()[0], "applied", at=1.5)
    field.observe("x", 40, at=2)
    field.turn()
    assert [o.command.reason for o in field.orders()] == ["100", "40"]


def test_the_same_observation_makes_the_same_order() -> None:
    """Whoever decides on it again, after a crash, says it under the same id: it is applied once."""
    one, two = Field(), Field()
    sender = Sender(source="esper/kasmina", run="run", subject="x")
    envelope = sender.envelope(
        OBSERVATION_SCHEMA, observations.encode(dataclasses.replace(full(), stopped=None)), time=TIMES.format(1)
    )
    message = asyncio.run(sender.message(envelope))
    for field in (one, two):
        field.hub.put(OBSERVATIONS, [message])
        field.turn()
    assert one.orders()[0].id == two.orders()[0].id


def test_a_controller_that_fails_is_said_and_costs_nobody_else_anything() -> None:
    field = Field(Raising)
    field.observe("x", 10, at=1)
    field.turn()
    assert field.orders() == []
    (decision,) = [decode_payload(wire.decode(d.value)) for d in field.on(DECISIONS)]
    assert "ValueError: no idea" in decision.reason and any("no idea" in note for note in field.notes)


def test_decisions_tell_what_they_rest_on() -> None:
    field = Field()
    field.observe("x", 10, at=1)
    field.turn()
    (delivery,) = field.on(DECISIONS)
    told = wire.decode(delivery.value)
    decision = decode_payload(told)
    assert (told.esperrun, told.subject) == ("run", "x")
    assert decision.step == 10 and decision.controller == "eager" and len(decision.commands) == 1


class Failing(MemoryBus):
    """Refuses to publish to one topic, before or after it has arrived."""

    refused: Topic | None = None
    arrives = False

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        if topic is self.refused and not self.arrives:
            raise BusError("away")
        await super().publish(topic, messages)
        if topic is self.refused:
            raise BusError("away")


@pytest.mark.parametrize(("topic", "arrives"), [(COMMANDS, True), (COMMANDS, False), (DECISIONS, False)])
def test_nothing_is_decided_while_orders_may_be_out_and_the_decision_is_told_later(topic: Topic, arrives: bool) -> None:
    field = Field(bus=lambda hub: Failing(hub=hub))
    field.observe("x", 10, at=1)
    field.bus.refused, field.bus.arrives = topic, arrives
    with pytest.raises(BusError, match="away"):
        field.turn()
    field.bus.refused = None
    field.observe("x", 20, at=2)
    field.turn()
    assert field.made[0].seen == [10], "the first orders may be under way"
    field.now += 31
    field.observe("x", 30, at=30)
    field.turn()
    assert field.made[0].seen == [10, 30]
    assert [decode_payload(wire.decode(d.value)).step for d in field.on(DECISIONS)] == [10, 30]


def test_a_decision_that_the_bus_never_takes_holds_up_nobody() -> None:
    class Picky(MemoryBus):
        async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
            if topic is DECISIONS and messages[0].key == "run/x":
                raise BusError("too large")
            await super().publish(topic, messages)

    field = Field(bus=lambda hub: Picky(hub=hub))
    field.observe("x", 10, at=1)
    with pytest.raises(BusError):
        field.turn()
    field.observe("y", 11, at=1)
    for _ in range(MOST_ATTEMPTS - 2):
        with pytest.raises(BusError):
            asyncio.run(field.steering._tell())
    field.turn()
    assert [d.key for d in field.on(DECISIONS)] == ["run/y"] and field.steering.counts["untold"] == 1


def test_decisions_that_cannot_be_told_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.oona.steering.MOST_ATTEMPTS", 1_000)
    field = Field(bus=lambda hub: Failing(hub=hub))
    field.bus.refused = DECISIONS
    for number in range(MOST_UNTOLD + 5):
        field.observe(f"x{number}", 10, at=1)
        with pytest.raises(BusError):
            field.turn()
    field.bus.refused = None
    field.observe("last", 10, at=1)
    field.turn()
    assert len(field.on(DECISIONS)) == MOST_UNTOLD


class Refusing(Eager):
    def decide(self, observation: Observation) -> tuple[Command, ...]:
        raise ConfigError("no such budget")


class Garbled(Eager):
    def decide(self, observation: Observation) -> Any:
        return (object(),)


class Endless(Eager):
    def decide(self, observation: Observation) -> tuple[Command, ...]:
        return (Germinate(seeds=(SeedPlan(site="a"),), reason="?" * (wire.MAX_MESSAGE_BYTES + 1)),)


class Stateless(Eager):
    def state(self) -> dict[str, Any]:
        raise ConfigError("no state")


@pytest.mark.parametrize(
    ("make", "said"), [(Refusing, "ConfigError: no such budget"), (Garbled, "failed"), (Endless, "EnvelopeError")]
)
def test_whatever_a_controller_does_the_server_goes_on(make: Any, said: str) -> None:
    made = iter((make, Eager))
    field = Field(lambda: next(made)())
    field.observe("x", 10, at=1)
    field.observe("y", 11, at=1)
    field.turn()
    assert [o.job for o in field.orders()] == ["y"] and field.steering.counts["failed"] == 1
    told = [decode_payload(wire.decode(d.value)) for d in field.on(DECISIONS)]
    assert said in told[0].reason and told[1].reason == "" and any(said in note for note in field.notes)


def test_a_controller_that_tells_no_state_steers() -> None:
    field = Field(Stateless)
    field.observe("x", 10, at=1)
    field.turn()
    assert len(field.orders()) == 1


def test_a_controller_that_cannot_be_made_ends_nothing() -> None:
    def make() -> Any:
        raise ConfigError("no weights")

    field = Field(make)
    field.observe("x", 10, at=1)
    field.turn()
    assert field.orders() == [] and any("no weights" in note for note in field.notes)


@pytest.mark.parametrize("at", [-61.0, 61.0])
def test_observations_of_another_time_are_not_decided_on(at: float) -> None:
    field = Field()
    field.observe("x", 10, at=at)
    field.observe("x", 11, at=at)
    field.turn()
    assert field.orders() == [] and field.on(DEAD_LETTERS) == [] and field.steering.counts["stale"] == 2
    assert len([note for note in field.notes if "clock" in note]) == 1
    field.observe("x", 20, at=0)
    field.turn()
    assert [o.command.reason for o in field.orders()] == ["20"]


def test_observations_run_out_when_they_say_so() -> None:
    field = Field()
    field.observe("x", 10, at=-2, expires=wire.timestamp(START - 1))
    field.observe("y", 11, at=-2, expires=wire.timestamp(START + 1))
    field.observe("z", 12, at=-2, expires="tomorrow")
    field.turn()
    assert [o.job for o in field.orders()] == ["y"] and field.steering.counts["stale"] == 1
    assert len(field.on(DEAD_LETTERS)) == 1


@pytest.mark.parametrize("back", [30.0, 115.0])
def test_a_training_whose_clock_was_set_back_is_steered_again_within_the_window(back: float) -> None:
    field = Field()
    field.observe("x", 10, at=58)
    field.turn()
    field.answer(field.orders()[0], "applied", at=58)
    field.turn()
    for second in range(1, int(OBSERVATION_MAX_AGE_S) + 2):
        field.now = START + second
        field.observe("x", 10 + second, at=58 - back + second)
        field.turn()
    assert len(field.orders()) >= 2


def test_a_claim_store_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(MemoryStore):
        async def get(self, name: str, limit: int) -> bytes | None:
            await asyncio.Event().wait()
            return None

    monkeypatch.setattr("esper.oona.steering.CLAIM_WAIT_S", 0.05)
    field = Field()
    field.steering._claims = Claims(Silent(), above=10)
    sender = Sender(source="esper/kasmina", run="run", subject="x", claims=Claims(Silent(), above=10))
    envelope = sender.envelope(OBSERVATION_SCHEMA, observations.encode(full()), time=TIMES.format(1))
    field.hub.put(OBSERVATIONS, [asyncio.run(sender.message(envelope))])
    with pytest.raises(BusError, match="claim store must answer within"):
        field.turn()


def test_with_a_key_unsigned_trainings_are_not_listened_to() -> None:
    ours, theirs = Keyring({"a": "k" * 32}), Keyring({"a": "x" * 32})
    field = Field(keyring=ours)
    field.observe("x", 10, at=1, keyring=theirs)
    field.turn()
    assert field.orders() == [] and field.steering.num_trainings == 0
    (letter,) = field.on(DEAD_LETTERS)
    assert "signed" in read_letter(letter).reason
    field.observe("x", 20, at=2)
    field.turn()
    assert [o.command.reason for o in field.orders()] == ["20"]
    assert ours.is_signed(wire.decode(field.on(COMMANDS)[0].value))


@pytest.mark.parametrize("topic", [OBSERVATIONS, ACKNOWLEDGEMENTS])
def test_rubbish_is_buried(topic: Topic) -> None:
    field = Field()
    sender = Sender(source="somebody", run="run", subject="x")
    wrong = sender.envelope("esper:observation:99", b"?", time=TIMES.format(1))
    field.hub.put(topic, [Message("run/x", b"rubbish"), asyncio.run(sender.message(wrong))])
    field.turn()
    assert len(field.on(DEAD_LETTERS)) == 2 and field.orders() == []


def test_heartbeats_list_the_trainings_that_are_steered() -> None:
    field = Field(lambda: Raising() if len(field.made) == 1 else Eager())
    for job in "xyz":
        field.observe(job, 10, at=1)
    field.turn()
    assert field.steering._listed() == ("run/x", "run/z")
    sender = Sender(source="esper/kasmina", run="run", subject="z")
    over = observations.encode(dataclasses.replace(full(), stopped="enough"))
    envelope = sender.envelope(OBSERVATION_SCHEMA, over, time=TIMES.format(40))
    field.now += 31  # the orders have run out
    field.hub.put(OBSERVATIONS, [asyncio.run(sender.message(envelope))])
    field.turn()
    assert field.steering._listed() == ("run/x",), "one that has stopped needs nobody"
    field.now += LISTED_S + 1
    assert field.steering._listed() == ()


def test_very_many_trainings_are_listed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.oona.steering.MOST_LISTED", 2)
    field = Field()
    for job in "vwxyz":
        field.observe(job, 10, at=1)
    field.turn()
    told = [field.steering._listed() for _ in range(4)]
    assert told == [("run/v", "run/w"), ("run/x", "run/y"), ("run/z",), ("run/v", "run/w")]
    monkeypatch.setattr("esper.oona.steering.MOST_LISTED_BYTES", 1)
    assert field.steering._listed() == ("run/x",)


def test_of_two_servers_one_steers_and_the_other_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.oona.steering.HEARTBEAT_S", 0.1)
    hub, made, notes = Hub(), Counter[str](), list[str]()

    def server(name: str) -> Steering:
        def make() -> Eager:
            made[name] += 1
            return Eager()

        return Steering(MemoryBus(hub=hub), make, name="eager", consumer=name, settle_s=0.15, on_note=notes.append)

    async def look(job: str) -> None:
        sender = Sender(source="esper/kasmina", run="run", subject=job)
        sent = dataclasses.replace(full(), stopped=None)
        hub.put(OBSERVATIONS, [await sender.message(sender.envelope(OBSERVATION_SCHEMA, observations.encode(sent)))])
        await asyncio.sleep(0.05)

    async def work() -> None:
        ends = {name: asyncio.Event() for name in "ab"}
        serving = {name: asyncio.create_task(server(name).serve(end)) for name, end in ends.items()}
        await asyncio.sleep(0.4)
        for number in range(10):
            await look(f"x{number}")
        assert made == {"a": 10} and notes[0] == "the server a steers this bus already; standing by"
        ends["a"].set()
        await serving["a"]
        await asyncio.sleep(0.6)
        await look("y")
        assert made == {"a": 10, "b": 1} and any("taking over" in note for note in notes)
        ends["b"].set()
        await asyncio.wait_for(serving["b"], 5)

    asyncio.run(work())


def test_serving_beats_and_ends(tmp_path: Any) -> None:
    field = Field()

    async def work() -> None:
        until = asyncio.Event()
        serving = asyncio.create_task(field.steering.serve(until))
        await asyncio.sleep(0.2)
        until.set()
        await asyncio.wait_for(serving, 5)

    asyncio.run(work())
    beats = [decode_payload(wire.decode(d.value)) for d in field.on(HEARTBEATS)]
    assert [beat.role for beat in beats] == ["controller"] and msgspec.to_builtins(beats[0])["state"] == "eager"
