"""While nothing is alive and nobody looks, sensors stay off; whatever comes to life finds everything in order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models import Pair, mse
from tests.rigs import Idle, Rig, attach

import esper
from esper.config import TamiyoConfig, TelemetryConfig
from esper.protocol import Germinated, Observation, Stop
from esper.safety.divergence import LossWatch
from esper.safety.tree import digest
from esper.tamiyo import HeuristicController, ScheduleController, Waiting
from esper.tamiyo.schedule import ScheduleEntry

pytestmark = pytest.mark.integration


class Asleep(Idle):
    """Does nothing before a step, and says so."""

    until = 1 << 20

    def waits(self, step: int, *, total_steps: int | None, num_ended: int) -> bool:
        return step < self.until


def unheard(controller: Any, **settings: Any) -> Rig:
    torch.manual_seed(0)
    rig = attach(Pair(), controller=controller, **{"telemetry": TelemetryConfig(every=2), **settings})
    rig.grower.journal._on_event = None
    return rig


def reports(rig: Rig) -> int:
    (site,) = rig.grower.kasmina.sites.values()
    return site.telemetry.reports


@pytest.mark.parametrize("looks", [False, True])
def test_sensors_report_to_somebody(looks: bool) -> None:
    rig = unheard(Idle() if looks else Asleep())
    rig.train(21)
    before = reports(rig)
    rig.train(10)
    assert reports(rig) == before + (5 if looks else 0)


def test_whoever_begins_to_look_finds_what_the_last_steps_were_like() -> None:
    early, late = unheard(Asleep()), unheard(Asleep())
    seen: list[Observation] = []
    early.grower.controller.until = 0
    late.grower.controller.until = 40
    for rig in (early, late):
        rig.train(39)
        rig.grower.controller.decide = lambda observation: seen.append(observation) or ()  # type: ignore[method-assign]
        rig.train(1)
    one, two = seen
    assert one.step == two.step == 40
    assert (one.sites == two.sites).sum() > 5 and str(one.sites) == str(two.sites)
    assert (one.train_loss, one.lr_share, one.flops_per_step) == (two.train_loss, two.lr_share, two.flops_per_step)


def test_a_run_that_was_saved_asleep_goes_on_the_same() -> None:
    rig, again = unheard(Asleep()), unheard(Asleep())
    rig.train(33)
    state = rig.grower.state_dict()
    again.grower.load_state_dict(state)
    again.turn = rig.turn
    for one in (rig, again):
        one.grower.controller.until = 45
        one.train(24)
    assert digest(again.grower.state_dict()) == digest(rig.grower.state_dict())


def test_the_largest_learning_rate_of_a_rest_is_not_missed() -> None:
    rig = unheard(Asleep(), interval=1000, telemetry=TelemetryConfig(every=1000))
    rig.train(30)
    clock = rig.grower.clock
    assert clock.rests
    (group,) = rig.optimizer.param_groups
    before = group["lr"]
    group["lr"] = 7 * before
    rig.train(1)
    group["lr"] = before
    rig.train(1)
    assert clock.rests and clock.hosts["fc1-fc2"].peak_lr == pytest.approx(7 * before)
    assert clock.hosts["fc1-fc2"].lr == before


def test_an_order_ends_a_rest_in_its_own_step() -> None:
    rig = unheard(Asleep(), interval=1000, telemetry=TelemetryConfig(every=1000))
    rig.train(30)
    rig.optimizer.param_groups[0]["weight_decay"] = 0.125
    rig.train(1)
    rig.grower.submit(Stop(reason="enough"))
    rig.train(1)
    assert rig.grower.stopped == "enough"
    assert rig.grower.clock.hosts["fc1-fc2"].weight_decay == 0.125, "what was missed has been read"
    cohort = rig.grower.kasmina.cohorts
    assert not cohort and rig.grower.loop.last_step == 32


@pytest.mark.parametrize(("interval", "every", "first"), [(5, 2, 60), (3, 10, 12), (10, 3, 30), (5, 3, 30), (1, 1, 30)])
def test_a_growing_run_is_the_same_whether_its_waiting_is_used_or_not(interval: int, every: int, first: int) -> None:
    def run(controller: Any) -> tuple[list[Germinated], str]:
        rig = unheard(controller, total_steps=200, interval=interval, telemetry=TelemetryConfig(every=every))
        germinated: list[Germinated] = []
        rig.grower.journal._on_event = None
        emit = rig.grower.journal.emit
        rig.grower.journal.emit = lambda event: (  # type: ignore[method-assign]
            germinated.append(event) if isinstance(event, Germinated) else None, emit(event),
        )[1]  # fmt: skip
        rig.train(90)
        return germinated, digest({"model": dict(rig.model.state_dict())})

    class Restless(HeuristicController):
        waits = None  # type: ignore[assignment]

    config = TamiyoConfig(first=first)
    waiting, restless = run(HeuristicController(config)), run(Restless(config))
    assert waiting == restless and waiting[0][0].step == first


@pytest.mark.parametrize(("interval", "every"), [(10, 3), (3, 10), (5, 3)])
def test_a_rest_that_was_saved_anywhere_goes_on_the_same(interval: int, every: int) -> None:
    rig = unheard(Asleep(), interval=interval, telemetry=TelemetryConfig(every=every))
    rig.grower.controller.until = 30
    states: list[tuple[dict[str, Any], int]] = []
    for _ in range(24):
        rig.train(1)
        states.append((copy.deepcopy(rig.grower.state_dict()), rig.turn))
    rig.train(12)
    for taken, (state, turn) in enumerate(states, start=1):
        again = unheard(Asleep(), interval=interval, telemetry=TelemetryConfig(every=every))
        again.grower.controller.until = 30
        again.grower.load_state_dict(state)
        again.turn = turn
        again.train(36 - taken)
        assert digest(again.grower.state_dict()) == digest(rig.grower.state_dict()), taken


def test_what_a_subclass_decides_its_parent_does_not_foretell() -> None:
    asked: list[int] = []

    class Own(HeuristicController):
        def decide(self, observation: Observation) -> tuple[Any, ...]:
            asked.append(observation.step)
            return ()

    rig = unheard(Own(TamiyoConfig(first=1000)), interval=5)
    rig.train(20)
    assert asked == [5, 10, 15, 20]


def test_a_bus_that_begins_to_listen_finds_what_was_sensed() -> None:
    for begins in range(30, 36):
        seen: list[list[Observation]] = []
        for listens_from in (0, begins):
            rig = unheard(Asleep(), interval=5, telemetry=TelemetryConfig(every=5))
            heard: list[Observation] = []
            rig.train(listens_from)
            rig.grower.watcher = heard.append
            rig.train(45 - listens_from)
            seen.append([observation for observation in heard if observation.step >= 40])
        always, late = seen
        assert [o.step for o in late] == [o.step for o in always] == [40, 45]
        assert [str(o.sites) for o in late] == [str(o.sites) for o in always], begins


def test_controllers_tell_when_they_wait() -> None:
    heuristic = HeuristicController(TamiyoConfig(first=50, last_share=0.5))
    assert isinstance(heuristic, Waiting) and not isinstance(Idle(), Waiting)
    assert heuristic.waits(49, total_steps=None, num_ended=0)
    assert not heuristic.waits(50, total_steps=None, num_ended=0)
    assert not heuristic.waits(49, total_steps=None, num_ended=1)
    assert not heuristic.waits(40, total_steps=60, num_ended=0), "it would stop: too late"
    seeds = (esper.protocol.SeedPlan(site="fc1-fc2"),)
    schedule = ScheduleController([ScheduleEntry(step=30, seeds=seeds)])
    assert schedule.waits(29, total_steps=None, num_ended=0) and not schedule.waits(30, total_steps=None, num_ended=0)
    assert not ScheduleController([]).waits(1, total_steps=None, num_ended=0), "it is about to stop"


def test_a_loss_that_diverges_while_nobody_looks_is_reported() -> None:
    rig = unheard(Asleep())
    rig.train(60)
    with pytest.warns(RuntimeWarning, match="diverges"):
        for _ in range(15):
            loss = mse(rig.model, rig.batches[0])
            loss.backward()
            rig.optimizer.step()
            rig.optimizer.zero_grad()
            rig.grower.step(1e6 * float(loss.detach()) + 1e6)


@given(
    before=st.lists(st.floats(-10, 10), min_size=20, max_size=40),
    recent=st.lists(st.floats(-100, 100), min_size=1, max_size=10),
    ratio=st.floats(1.01, 4),
)
def test_what_is_seen_without_a_median_is_what_the_median_says(
    before: list[float], recent: list[float], ratio: float
) -> None:
    watch = LossWatch(100, 1.0, ratio)
    watch.take(before)
    by_hand = _verdict_by_medians(before, recent, 1.0, ratio)
    assert (watch.verdict(recent) is not None) == by_hand


def _verdict_by_medians(before: list[float], recent: list[float], max_z: float, ratio: float) -> bool:
    from statistics import median

    middle = median(before)
    rise = median(recent) - middle
    scatter = 1.4826 * median([abs(loss - middle) for loss in before])
    return rise > (ratio - 1) * abs(middle) and rise > max_z * scatter
