"""Which heartbeats a training takes for a controller of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from esper.oona import envelope as wire
from esper.oona.bus import Message
from esper.oona.ears import MOST_NAMES, Ears
from esper.oona.memory import Hub, MemoryBus
from esper.oona.schemas import HEARTBEAT_SCHEMA, Heartbeat
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.topics import HEARTBEATS

pytestmark = pytest.mark.component

KEY = Keyring({"a": "k" * 32})
NOW = 1_800_000_000.0


class Room:
    """Ears at a bus, and clocks that are set by hand."""

    def __init__(self, keyring: Keyring | None = None) -> None:
        self.seconds = 100.0
        self.hub = Hub()
        sender = Sender(source="esper/kasmina", run="run", subject="job", keyring=keyring)
        self.ears = Ears(
            MemoryBus(hub=self.hub), sender, group="ears", patience_s=10, clock=lambda: self.seconds, wall=lambda: NOW
        )

    def say(self, *trainings: str, age: float = 0.0, keyring: Keyring | None = None, **fields: Any) -> Message:
        beat = Heartbeat(**{"role": "controller", "every_s": 2.0, "name": "one", "trainings": trainings, **fields})
        sender = Sender(source="esper/tamiyo", keyring=keyring)
        envelope = sender.envelope(HEARTBEAT_SCHEMA, wire.write_json(beat), time=wire.timestamp(NOW - age))
        return asyncio.run(sender.message(envelope))

    def hears(self, *messages: Message) -> bool:
        """Whether one of the messages was heard now."""

        async def work() -> None:
            stop = asyncio.Event()
            listening = asyncio.create_task(self.ears.run(stop))
            await asyncio.sleep(0.02)
            self.hub.put(HEARTBEATS, messages)
            await asyncio.sleep(0.02)
            stop.set()
            await listening

        asyncio.run(work())
        return self.ears.heard == self.seconds


@pytest.mark.parametrize(("age", "heard"), [(0, True), (59, True), (-59, True), (61, False), (-61, False)])
def test_a_heartbeat_of_another_time_is_not_heard(age: float, heard: bool) -> None:
    room = Room(KEY)
    assert room.hears(room.say("run/job", age=age, keyring=KEY)) is heard


def test_only_signed_controllers_are_heard_where_there_is_a_key() -> None:
    room = Room(KEY)
    assert not room.hears(
        room.say("run/job"),
        room.say("run/job", keyring=Keyring({"a": "x" * 32})),
        room.say("run/job", keyring=KEY, role="job"),
        Message("/", b"rubbish"),
    )


def test_a_controller_that_does_not_list_the_training_gets_a_chance_only() -> None:
    room = Room()
    assert room.hears(room.say("run/other"))
    room.seconds += 10
    assert room.hears(room.say())
    room.seconds += 0.1
    assert not room.hears(room.say("run/other", "run/jo", "other/job"))
    assert room.ears.heard_any == room.seconds
    assert room.hears(room.say("run/other", "run/job"))
    room.seconds += 1
    assert not room.hears(room.say())
    assert room.hears(room.say(name="two")), "another controller has a chance of its own"


def test_names_do_not_pile_up() -> None:
    room = Room()
    assert room.hears(*(room.say(name=str(number)) for number in range(MOST_NAMES + 5)))
    assert len(room.ears._first) == MOST_NAMES
