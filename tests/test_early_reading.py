"""What a dormant decision reads was begun a step before it: nothing is lost or seen twice, and saved runs agree."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import Pair, mse
from tests.rigs import Idle, Rig, S, attach

import esper
from esper.config import TelemetryConfig
from esper.guard import Suspicion
from esper.protocol import Germinate, Incident, Observation, SeedPlan, TrainLoss
from esper.safety.tree import digest
from esper.tamiyo import ScheduleController
from esper.tamiyo.schedule import ScheduleEntry

pytestmark = pytest.mark.integration

INTERVAL = 5


def watched(**settings: Any) -> tuple[Rig, list[Observation]]:
    """A rig whose heuristic controller grows by itself after a while, and what it sees."""
    torch.manual_seed(0)
    rig = attach(Pair(), controller=esper.tamiyo.make_controller("heuristic", esper.TamiyoConfig(first=17)), **settings)
    seen: list[Observation] = []
    rig.grower.watcher = seen.append
    return rig, seen


def assert_same(one: Observation, two: Observation) -> None:
    for field in fields(one):
        here, there = getattr(one, field.name), getattr(two, field.name)
        same = (
            np.array_equal(here, there, equal_nan=True) if isinstance(here, np.ndarray) else repr(here) == repr(there)
        )
        assert same, (one.step, field.name)


@pytest.mark.parametrize("saved_at", [4, 9, 10, 11, 19, 24])
def test_a_run_that_was_saved_between_reading_and_decision_decides_the_same(saved_at: int) -> None:
    rig, seen = watched(telemetry=esper.TelemetryConfig(every=1))
    rig.train(saved_at)
    early = (saved_at + 1) % INTERVAL == 0 and not rig.grower.kasmina.cohorts
    assert (rig.grower._early is not None) == early
    state = rig.grower.state_dict()
    again, seen_again = watched(telemetry=esper.TelemetryConfig(every=1))
    again.grower.load_state_dict(state)
    assert digest(again.grower.state_dict()) == digest(state)
    again.turn = rig.turn
    rig.train(40 - saved_at)
    again.train(40 - saved_at)
    assert any(observation.alive for observation in seen)
    later = [observation for observation in seen if observation.step > saved_at]
    assert [observation.step for observation in later] == [observation.step for observation in seen_again]
    for one, two in zip(later, seen_again, strict=True):
        assert_same(one, two)
    assert digest(again.grower.state_dict()) == digest(rig.grower.state_dict())


def test_a_load_that_was_refused_changes_nothing() -> None:
    rig, seen = watched()
    other, wanted = watched()
    rig.train(9)
    other.train(9)
    state = rig.grower.state_dict()
    assert isinstance(state, dict)
    with pytest.raises(esper.StateError):
        rig.grower.load_state_dict({**state, "host": {}})
    state["esper"]["judge"] = {}  # type: ignore[index, call-overload]
    with pytest.raises(esper.StateError):
        rig.grower.load_state_dict(state)
    rig.train(1)
    other.train(1)
    assert_same(seen[-1], wanted[-1])


def test_every_loss_is_judged_once_and_in_order() -> None:
    rig, seen = watched()
    judged: list[float] = []
    at: dict[int, int] = {}
    judge = rig.grower.guard._judge

    def note(losses: list[float], damage: dict[int, str], step: int) -> None:
        judged.extend(losses)
        at.setdefault(step, len(judged))  # a second look in a step is that for the sake of a cohort that germinated
        judge(losses, damage, step)

    rig.grower.guard._judge = note  # type: ignore[method-assign]
    losses: list[float] = []
    for _ in range(60):
        rig.train(1)
        losses.append(float(torch.tensor(rig.grower.loop.losses[-1])))
    assert judged == losses[: len(judged)]
    dormant, alive = ([step for step, count in at.items() if count == step - late] for late in (1, 0))
    assert dormant and alive and sorted(dormant + alive) == list(range(INTERVAL, 61, INTERVAL))
    assert {observation.step for observation in seen if observation.alive} & {*alive}


@pytest.mark.parametrize("is_alive", [False, True])
def test_a_loss_of_the_very_step_waits_for_the_next_look_only_where_nothing_is_on_trial(is_alive: bool) -> None:
    rig = attach(Pair())
    rig.train(12)
    if is_alive:
        rig.until(rig.germinate("fc1-fc2", start="random_zero"), S.GRAFTING)
    rig.train(-rig.grower.clock.steps % INTERVAL + INTERVAL - 1)
    step = rig.grower.clock.steps + 1
    loss = mse(rig.model, rig.batches[0])
    loss.backward()
    rig.optimizer.step()
    rig.optimizer.zero_grad()
    rig.grower.step(math.nan)
    if is_alive:
        assert [event.step for event in rig.events if isinstance(event, Incident)] == [step]
        assert not rig.grower.kasmina.cohorts
    else:
        rig.train(INTERVAL - 1)
        assert not [event for event in rig.events if isinstance(event, Incident)]
        with pytest.warns(RuntimeWarning, match="not finite"):
            rig.train(1)
        assert [event.step for event in rig.events if isinstance(event, Incident)] == [step + INTERVAL]


@pytest.mark.parametrize("what", ["a cohort that captures", "a cohort that has just left", "a suspicion"])
def test_whatever_may_be_to_blame_is_looked_at_without_delay(what: str) -> None:
    rig = attach(Pair(), capture=esper.CaptureConfig(batches=50, rows=640, timeout=100))
    rig.train(12)
    if what == "a suspicion":
        rig.grower.guard._suspicion = Suspicion(cohort=7, reason="test", until=10_000)
    else:
        cohort = rig.germinate("fc1-fc2", start="negative_gradient")
        if what == "a cohort that has just left":
            rig.grower.stages.expel(cohort, rig.grower.clock.steps, "test")
            rig.grower.guard._seen = {cohort.number: rig.grower.clock.steps}
        assert bool(rig.grower.kasmina.cohorts) == (what == "a cohort that captures")
    rig.train(-rig.grower.clock.steps % INTERVAL - 1)
    assert (rig.grower.clock.steps + 1) % INTERVAL == 0 and rig.grower._early is None


def test_what_changed_in_between_is_read_anew() -> None:
    rig = attach(Pair(), telemetry=esper.TelemetryConfig(every=1))
    rig.train(9)
    rig.grower.kasmina.refresh()
    rig.train(1)
    told = [event for event in rig.events if isinstance(event, TrainLoss)]
    assert told[-1].step == 10 and told[-1].loss == rig.grower.loop.losses[-1]
    rig.train(5)
    told = [event for event in rig.events if isinstance(event, TrainLoss)]
    assert told[-1].step == 15 and told[-1].loss == rig.grower.loop.losses[-2]
    assert len(rig.grower.guard._recent) == 1, "the newest waits for the next look"


def test_nobody_reads_sensors_for_nobody() -> None:
    rig = attach(Pair())
    rig.grower.kasmina.is_on_cpu = False  # there nothing would be begun early for nobody
    rig.grower.journal._on_event = None
    rig.grower.stop("enough")
    rig.train(9)
    assert rig.grower._early is not None and not rig.grower._early.reading.has_sensors
    seen: list[Observation] = []
    rig.grower.watcher = seen.append
    rig.train(1)
    assert [observation.step for observation in seen] == [10] and bool(np.isfinite(seen[0].sites[:, 7]).all())


@pytest.mark.parametrize("by_order", [False, True])
def test_a_loss_from_before_a_cohort_is_not_its_doing(by_order: bool) -> None:
    """It germinates in the step whose loss is not finite: a reading begun the step before has not seen that loss."""
    seeds = (SeedPlan(site="fc1-fc2", start="random_zero", width=3),)
    controller = Idle() if by_order else ScheduleController([ScheduleEntry(step=30, seeds=seeds)])
    rig = attach(
        Pair(), controller=controller, interval=10, held_out_every=10**6, telemetry=TelemetryConfig(every=10),
        graft=esper.GraftConfig(), fit=esper.FitConfig(), capture=esper.CaptureConfig(),
    )  # fmt: skip
    for step in range(1, 45):
        if by_order and step == 30:
            rig.grower.submit(Germinate(seeds=seeds))
        loss = rig.backward()
        rig.optimizer.step()
        rig.optimizer.zero_grad()
        with pytest.warns(RuntimeWarning, match="nothing of Esper is on trial") if step == 30 else nullcontext():
            rig.grower.step(math.inf if step == 30 else loss)
    told = [(event.step, event.cohort, event.action) for event in rig.events if isinstance(event, Incident)]
    assert told == [(30, None, "reported")] and 1 in rig.grower.kasmina.cohorts
