"""The training's side of remote control: who decides, and that the user is told."""

from __future__ import annotations

from typing import Any

import pytest
from tests.oona.test_observations_wire import full

from esper.oona.remote import RemoteController
from esper.protocol import Command, Observation, Stop

pytestmark = pytest.mark.unit


class Local:
    def __init__(self) -> None:
        self.asked = 0

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        self.asked += 1
        return (Stop(reason="local"),)

    def state(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


class Line:
    def __init__(self) -> None:
        self.heard: float | None = None
        self.heard_any: float | None = None
        self.observed: list[Observation] = []

    def observe(self, observation: Observation) -> None:
        self.observed.append(observation)


def test_the_local_one_decides_until_somebody_is_heard_and_when_nobody_is_any_more() -> None:
    now, line, local = [0.0], Line(), Local()
    remote = RemoteController(local, line=line, patience_s=10, clock=lambda: now[0])
    assert remote.decide(full()) == (Stop(reason="local"),)
    line.heard = 0.0
    assert remote.decide(full()) == () and local.asked == 1
    now[0] = 10.0
    assert remote.decide(full()) == ()
    now[0] = 10.1
    assert remote.decide(full()) == (Stop(reason="local"),)
    line.heard = 10.1
    assert remote.decide(full()) == () and local.asked == 2
    assert len(line.observed) == 5, "observations go out whoever decides: how else could anybody come back?"
    told = remote.notes()
    assert [("local one" in t, "steers" in t) for t in told] == [(True, False), (False, True)] * 2
    assert remote.notes() == ()


def test_without_a_line_the_local_one_decides() -> None:
    local = Local()
    assert RemoteController(local).decide(full()) and local.asked == 1


def test_its_state_is_the_local_ones() -> None:
    one, two = RemoteController(Local()), RemoteController(Local())
    one.decide(full())
    two.load(one.state())
    assert two.fallback.state() == {"asked": 1}


def test_a_controller_that_steers_others_only_is_not_said_to_be_silent() -> None:
    now, line = [0.0], Line()
    remote = RemoteController(Local(), line=line, patience_s=10, clock=lambda: now[0])
    line.heard_any = 0.0
    remote.decide(full())
    line.heard = 0.0
    remote.decide(full())
    now[0], line.heard_any = 20.0, 20.0  # not listed any more
    remote.decide(full())
    line.heard = 20.0
    remote.decide(full())
    now[0] = 40.0  # gone
    remote.decide(full())
    said = ["not among those that it steers" in text for text in remote.notes()]
    assert said == [True, False, True, False, False]
