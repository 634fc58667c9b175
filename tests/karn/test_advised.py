"""The controller that asks the architect: what it changes, what it leaves alone, and its state."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.karn.made import OFFERS, experience
from tests.tamiyo.conftest import Observe, observe  # noqa: F401  (a fixture)

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.karn import AdvisedController, Architect, Snapshot
from esper.protocol import Command, Cull, Germinate, Observation, SeedPlan, Stop
from esper.tamiyo import make_controller

pytestmark = pytest.mark.unit

SNAPSHOT = Snapshot(reports=experience())


class Says:
    """A controller that says what it is told to."""

    def __init__(self, *commands: Command) -> None:
        self.commands = commands
        self.loaded: Any = None

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        return self.commands

    def state(self) -> dict[str, Any]:
        return {"said": 1}

    def load(self, state: dict[str, Any]) -> None:
        self.loaded = state


def advised(inner: Any, seed: int = 0) -> AdvisedController:
    return AdvisedController(inner, Architect(SNAPSHOT), seed=seed)


ASKED = Germinate(
    seeds=(SeedPlan(site="blocks.0", width=8, strategy="fixed_ramp", keep=1), SeedPlan(site="blocks.2")), reason="even"
)


@pytest.fixture
def seen(observe: Observe) -> Observation:  # noqa: F811
    return observe(kinds=("linear_span",) * 4, offers=(OFFERS,) * 4, family="mlp", optimizer="adaptive")


def test_sites_and_time_stay_the_inner_controllers(seen: Observation) -> None:
    first, germinate, last = advised(Says(Cull(cohort=1, reason="x"), ASKED, Stop(reason="y"))).decide(seen)
    assert (first, last) == (Cull(cohort=1, reason="x"), Stop(reason="y"))
    assert isinstance(germinate, Germinate)
    assert [plan.site for plan in germinate.seeds] == ["blocks.0", "blocks.2"]
    one, two = germinate.seeds
    assert (one.blueprint, one.start) in OFFERS and one.strategy == "fixed_ramp" and one.keep is None
    assert one.width is not None and one.width * one.seeds in (4, 8, 16)
    assert two.width is not None and two.width * two.seeds in (16, 32, 64), "no width asked: the host's own, 32"
    assert germinate.reason.startswith("even; Karn proposes ") and one.design is not None
    assert one.design in germinate.reason


def test_under_a_budget_nothing_is_larger_than_asked(observe: Observe) -> None:  # noqa: F811
    capped = observe(kinds=("linear_span",) * 4, offers=(OFFERS,) * 4, budget_params=30_000)
    for seed in range(20):
        (germinate,) = advised(Says(ASKED), seed).decide(capped)
        assert isinstance(germinate, Germinate)
        plan = germinate.seeds[0]
        assert plan.width is not None and plan.width * plan.seeds <= 8


def test_where_nothing_is_offered_nothing_is_changed(observe: Observe, seen: Observation) -> None:  # noqa: F811
    assert advised(Says(ASKED)).decide(observe()) == (ASKED,)
    unknown = observe(kinds=("linear_span",) * 4, offers=((),) * 4)
    assert advised(Says(ASKED)).decide(unknown) == (ASKED,)


def test_layers_are_measured_by_their_smaller_side(observe: Observe) -> None:  # noqa: F811
    layers = observe(
        spans=0, layers=4, kinds=("linear_layer",) * 4, offers=((("low_rank", "random_zero"),),) * 4
    )  # fmt: skip
    (germinate,) = advised(Says(ASKED)).decide(layers)
    assert isinstance(germinate, Germinate)
    assert germinate.seeds[1].width in (4, 8, 16), "an eighth of 64, and half and twice that"


def test_it_goes_on_where_it_was_saved(seen: Observation) -> None:
    subject, twin = advised(Says(ASKED), 3), advised(Says(ASKED), 3)
    subject.decide(seen)
    state = json.loads(json.dumps(subject.state()))
    twin.load(state)
    assert isinstance(twin.inner, Says) and twin.inner.loaded == {"said": 1}
    assert [twin.decide(seen) for _ in range(5)] == [subject.decide(seen) for _ in range(5)]
    assert len({str(subject.decide(seen)) for _ in range(8)}) > 1


@pytest.mark.parametrize("state", [{}, {"inner": {}, "germinations": -1}, {"inner": {}, "germinations": 0, "x": 1}])
def test_a_state_that_does_not_fit(state: dict[str, Any]) -> None:
    subject = advised(Says())
    with pytest.raises(ConfigError, match="must have the keys germinations and inner"):
        subject.load(state)
    assert isinstance(subject.inner, Says) and subject.inner.loaded is None


def test_it_wraps_the_real_heuristic(seen: Observation) -> None:
    subject = advised(make_controller("heuristic", TamiyoConfig(first=100)))
    (germinate,) = subject.decide(seen)
    assert isinstance(germinate, Germinate) and len(germinate.seeds) == 4
    assert subject.state()["inner"]["germinations"] == 1
