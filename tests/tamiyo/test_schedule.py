from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from esper.errors import ConfigError, SiteError
from esper.protocol import Germinate, Germinated, Observation, SeedPlan, Stop
from esper.tamiyo import ScheduleController
from esper.tamiyo.schedule import ScheduleEntry

pytestmark = pytest.mark.unit

Observe = Callable[..., Observation]


def entry(step: int, *sites: str) -> ScheduleEntry:
    return ScheduleEntry(step=step, seeds=tuple(SeedPlan(site=site, width=8, start="random_zero") for site in sites))


def test_plays_in_order_then_stops(observe: Observe) -> None:
    entries = [entry(100, "blocks.0"), entry(100, "blocks.1"), entry(250, "blocks.2", "blocks.3")]
    subject = ScheduleController(entries)
    assert subject.decide(observe(step=90)) == ()
    for step, expected in ((100, 0), (110, 1), (260, 2)):
        assert subject.decide(observe(step=step)) == (
            Germinate(seeds=entries[expected].seeds, reason=f"scheduled for step {entries[expected].step}"),
        )
    assert subject.decide(observe(step=270)) == (Stop(reason="schedule finished: 3 cohorts germinated"),)
    assert subject.decide(observe(step=280, stopped="schedule finished")) == ()


def test_a_due_entry_waits_for_its_sites_and_the_next_behind_it(observe: Observe) -> None:
    subject = ScheduleController([entry(100, "blocks.0", "blocks.1"), entry(120, "blocks.2")])
    assert subject.decide(observe(step=130, eligible=np.array([True, False, True, True]))) == ()
    (command,) = subject.decide(observe(step=140))
    assert isinstance(command, Germinate) and [plan.site for plan in command.seeds] == ["blocks.0", "blocks.1"]


def test_replay_takes_another_start(observe: Observe) -> None:
    event = Germinated(
        step=100,
        cohort=0,
        seeds=(0, 1),
        sites=("blocks.0", "blocks.2"),
        blueprints=("bottleneck", "bottleneck"),
        starts=("negative_gradient", "negative_gradient"),
        widths=(8, 16),
        added_params=100,
        reason="",
    )
    (command,) = ScheduleController.replay([event]).decide(observe())
    assert isinstance(command, Germinate)
    assert [(p.site, p.blueprint, p.width, p.start, p.chunks) for p in command.seeds] == [
        ("blocks.0", "bottleneck", 8, "random_zero", ()),
        ("blocks.2", "bottleneck", 16, "random_zero", ()),
    ]


def test_replay_of_many_seeds_takes_one_plan_a_site(observe: Observe) -> None:
    event = Germinated(
        step=100, cohort=0, seeds=(0, 1, 2, 3), sites=("blocks.0",) * 3 + ("blocks.2",),
        blueprints=("bottleneck",) * 4, starts=("tiny",) * 4, widths=(2, 2, 2, 8), added_params=1, reason="",
        chunks=(4, 4, 4, 64),
    )  # fmt: skip
    (command,) = ScheduleController.replay([event]).decide(observe())
    assert isinstance(command, Germinate)
    assert [(p.site, p.width, p.seeds, p.chunks) for p in command.seeds] == [
        ("blocks.0", 2, 3, tuple(range(12))),
        ("blocks.2", 8, 1, tuple(range(64))),
    ]


def test_empty_schedule_and_one_entry(observe: Observe) -> None:
    assert ScheduleController([]).decide(observe()) == (Stop(reason="schedule finished: 0 cohorts germinated"),)
    one = ScheduleController([entry(0, "blocks.0")])
    one.decide(observe())
    assert one.decide(observe()) == (Stop(reason="schedule finished: 1 cohort germinated"),)


def test_unknown_site_names_the_near_ones(observe: Observe) -> None:
    subject = ScheduleController([entry(100, "block.1")])
    with pytest.raises(SiteError, match=r"no site is called 'block\.1'; near: .*'blocks\.1'.*grower\.sites"):
        subject.decide(observe())
    with pytest.raises(SiteError, match=r"'zzz'; list all"):
        ScheduleController([entry(100, "zzz")]).decide(observe())


def test_state_round_trip(observe: Observe) -> None:
    entries = [entry(100, "blocks.0"), entry(100, "blocks.1")]
    subject, again = ScheduleController(entries), ScheduleController(entries)
    subject.decide(observe())
    again.load(subject.state())
    assert again.decide(observe()) == subject.decide(observe())


@pytest.mark.parametrize("state", [{}, {"next": -1}, {"next": 2}, {"next": "1"}])
def test_foreign_state_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="'next' between 0 and 1"):
        ScheduleController([entry(0, "blocks.0")]).load(state)


def test_bad_entries() -> None:
    with pytest.raises(ConfigError, match=r"must not decrease, got \[200, 100\]"):
        ScheduleController([entry(200, "blocks.0"), entry(100, "blocks.1")])
    with pytest.raises(ConfigError, match="at least one seed"):
        ScheduleController([entry(100)])
