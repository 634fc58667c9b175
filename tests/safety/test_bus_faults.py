"""Faults of the bus through whole trials: every order is obeyed once or not at all, and the harness would say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from esper.oona.desk import Desk
from esper.oona.register import Register
from esper.oona.topics import COMMANDS
from esper.runs.trials import commanded
from esper.runs.trials.faults import fault_trial
from esper.runs.trials.faulty import FaultyRun
from esper.runs.trials.faulty_hub import FaultyHub
from esper.safety.faults import FAULTS, Moment

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

BUS_FAULTS = [name for name in FAULTS if FAULTS[name].moment is Moment.COMMANDED]


def test_there_is_one_for_each_thing_that_a_bus_does_to_messages() -> None:
    assert BUS_FAULTS == ["bus_disorders", "bus_doubles", "bus_gone", "bus_loses"]
    assert all(FAULTS[name].leaves_no_trace for name in BUS_FAULTS)


@pytest.mark.parametrize("name", ["bus_loses", "bus_disorders"])
def test_orders_that_steer_are_obeyed_as_the_log_says(name: str) -> None:
    record = fault_trial(3, faults=(name,))
    assert record.struck == 1 and record.held, record.detail


Plant = Callable[[pytest.MonkeyPatch], None]


def swallowed(patch: pytest.MonkeyPatch) -> None:
    """Orders that the bus has taken never arrive."""
    put = FaultyHub.put

    def swallow(self: FaultyHub, topic: Any, messages: Any) -> None:
        put(self, topic, [] if topic == COMMANDS else messages)

    patch.setattr(FaultyHub, "put", swallow)
    patch.setattr(FaultyHub, "_meets", _struck)
    patch.setattr(commanded, "PATIENCE_S", 0.2)


def _struck(self: FaultyHub, *_: Any) -> None:
    self._traffic.strikes.num += 1


def forgotten(patch: pytest.MonkeyPatch) -> None:
    """The desk does not know again what it has answered."""
    patch.setattr(Register, "content", lambda self, order_id: self.open.get(order_id))
    patch.setattr(commanded, "PATIENCE_S", 1.0)


def applied_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Desk, "_lateness", lambda self, order: None)


def meddling(patch: pytest.MonkeyPatch) -> None:
    """Somebody touches a weight of the run that is on the bus."""
    serve = FaultyRun.take_steps

    def touch(self: FaultyRun, num: int) -> None:
        serve(self, num)
        if num == commanded.FURTHER:
            next(iter(self.model.parameters())).data.add_(1e-6)

    patch.setattr(FaultyRun, "take_steps", touch)


PLANTED: dict[str, tuple[Plant, str]] = {
    "swallowed": (swallowed, "order-0 has no answer"),
    "forgotten": (forgotten, "was obeyed"),
    "applied late": (applied_late, "order-6 came too late and was applied"),
    "meddling": (meddling, "the run is another one than without the bus"),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_what_does_not_hold_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, says = PLANTED[name]
    plant(monkeypatch)
    record = fault_trial(2, faults=("bus_doubles",))
    assert not record.held and says in record.detail, record.detail
