"""The bandit: when, where and what by draws; what it learns; its state."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.tamiyo.conftest import Observe

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.protocol import CohortView, Germinate, Lifecycle, Observation, Stop, Verdict
from esper.tamiyo import BanditController, make_controller
from esper.worth import Choice, compressed, encode, places

pytestmark = pytest.mark.unit

OFFERS = (("bottleneck", "random_zero"), ("bottleneck", "tiny"))


def bandit(seed: int = 0, **settings: Any) -> BanditController:
    config = TamiyoConfig(controller="bandit", **{"first": 100, "growth": 0.5, **settings})
    made = make_controller("bandit", config, seed=seed)
    assert isinstance(made, BanditController)
    return made


@pytest.fixture
def look(observe: Observe) -> Callable[..., Observation]:
    """Two spans on which two starts are possible."""

    def build(**changes: Any) -> Observation:
        fields: dict[str, Any] = {
            "spans": 2, "kinds": ("linear_span",) * 2, "offers": (OFFERS,) * 2, "family": "mlp",
            "optimizer": "adaptive",
        }  # fmt: skip
        return observe(**(fields | changes))

    return build


def ended(cohort: int, state: Lifecycle, gain: float, cost: float = 0.5, reason: str = "") -> Verdict:
    return Verdict(
        cohort=cohort, step=150, state=state, sites=("blocks.0",), gain=gain, gain_low=gain, gain_high=gain,
        added_params=100, added_flops_share=cost, reason=reason, gain_shrunken=gain,
    )  # fmt: skip


def teach(subject: BanditController, seen: Observation, good: str, *, worth: float = 0.5, num: int = 400) -> None:
    """Earlier runs in which one start was worth something, at every size, and the others nothing."""
    place = places(seen)[0]
    rows, values = [], []
    for number in range(num):
        start = OFFERS[number % 2][1]
        growth = (0.5, 1.0, 2.0)[number // 2 % 3]
        rows.append(encode(place, Choice(blueprint="bottleneck", start=start, growth=growth)))
        values.append([compressed(worth) if start == good else compressed(-0.05), 0.0, 0.0])
    subject.learn(np.array(rows), np.array(values))


def asked(subject: BanditController, seen: Observation) -> Germinate:
    (command,) = subject.decide(seen)
    assert isinstance(command, Germinate)
    return command


def test_what_earlier_runs_found_good_is_what_grows(look: Callable[..., Observation]) -> None:
    for good in ("tiny", "random_zero"):
        found = Counter[str]()
        for seed in range(20):
            subject = bandit(seed)
            teach(subject, look(), good)
            command = asked(subject, look())
            assert "after 400 cohorts" in command.reason
            found.update(plan.start or "" for plan in command.seeds)
        assert found[good] == found.total() >= 20, found


def test_with_nothing_known_everything_is_tried(look: Callable[..., Observation]) -> None:
    tried = Counter[tuple[str | None, int | None]]()
    sites = Counter[int]()
    for seed in range(60):
        commands = bandit(seed).decide(look())
        sites[len(commands[0].seeds) if commands and isinstance(commands[0], Germinate) else 0] += 1
        for command in commands:
            assert isinstance(command, Germinate)
            tried.update((plan.start, plan.width) for plan in command.seeds)
    assert len(tried) == 6, "two starts at a quarter, half and once the host's 32"
    assert {width for _, width in tried} == {8, 16, 32} and sites[2] > 10 and sites[1] + sites[0] > 0


def test_what_is_not_worth_its_price_waits(look: Callable[..., Observation]) -> None:
    subject = bandit(min_gain_per_cost=0.3)
    teach(subject, look(), "nothing")
    assert subject.decide(look(step=100)) == ()
    draws = subject.state()["draws"]
    assert subject.decide(look(step=110)) == () and subject.state()["draws"] == draws, "the next draw comes later"
    assert subject.decide(look(step=150)) == () and subject.state()["draws"] == draws + 1
    endless = bandit(min_gain_per_cost=0.3)
    teach(endless, look(), "nothing")
    assert endless.decide(look(total_steps=None)) == () and endless.state()["wait_until"] == 150


def test_sites_that_are_not_worth_it_are_left_out(look: Callable[..., Observation]) -> None:
    """What is known to be good on narrow sites and bad on wide ones."""
    seen = look()
    seen.sites[1, 3] = np.log(2.0)  # log_hidden
    around = places(seen)
    rows = [encode(place, Choice(blueprint="bottleneck", start=s, growth=g)) for place in around
            for _, s in OFFERS for g in (0.5, 1.0, 2.0)]  # fmt: skip
    values = [[compressed(v), 0.0, 0.0] for v in [-0.2] * 6 + [0.5] * 6]
    subject = bandit()
    subject.learn(np.array(rows * 40), np.array(values * 40))
    assert [plan.site for plan in asked(subject, seen).seeds] == ["blocks.1"]


@pytest.mark.parametrize(
    ("end", "learnt"),
    [
        (ended(7, Lifecycle.FOSSILIZED, 0.1), compressed(0.2)),
        (ended(7, Lifecycle.CULLED, 0.1), 0.0),
        (ended(7, Lifecycle.CANCELLED, 0.1), None),
        (ended(7, Lifecycle.ROLLED_BACK, 0.1, reason="training ended before it was judged"), None),
    ],
)
def test_it_learns_from_its_own_cohorts(
    end: Verdict, learnt: float | None, look: Callable[..., Observation]
) -> None:  # fmt: skip
    subject = bandit(patience=9)
    teach(subject, look(), "tiny")
    command = asked(subject, look())
    view = CohortView(
        cohort=7,
        state=Lifecycle.GRAFTING,
        steps_in_state=1,
        sites=("blocks.0",),
        num_seeds=1,
        alpha=1.0,
        added_params=1,
    )
    assert subject.decide(look(step=110, alive=(view,))) == ()
    assert subject.state()["pending"][0]["cohort"] == 7
    subject.decide(look(step=160, verdicts=(end,), held_out=1.0))
    state = subject.state()
    assert state["values"] == ([] if learnt is None else [pytest.approx(learnt)])
    if learnt is not None:
        around = places(look())
        sizes = [plan.width for plan in command.seeds]
        parts = [
            encode(around[int(plan.site[-1])], Choice(blueprint="bottleneck", start=plan.start or "", growth=size / 32))
            for plan, size in zip(command.seeds, sizes, strict=True)
            if size is not None
        ]
        weights = np.array(sizes, dtype=float) / sum(size or 0 for size in sizes)
        np.testing.assert_allclose(state["rows"][0], weights @ np.array(parts))
    subject.decide(look(step=170, verdicts=(end,)))
    assert len(subject.state()["values"]) == (learnt is not None), "once"


def test_a_refused_cohort_teaches_nothing_and_halves_the_next(look: Callable[..., Observation]) -> None:
    subject = bandit(patience=9)
    teach(subject, look(), "tiny")
    first = asked(subject, look())
    second = asked(subject, look(step=110))
    assert len(subject.state()["pending"]) == 1 and subject.state()["values"] == []
    assert max(plan.width or 0 for plan in second.seeds) <= 32 and first.seeds


def test_pace_budget_and_end_are_the_heuristics(look: Callable[..., Observation]) -> None:
    assert bandit().decide(look(step=40)) == ()
    assert bandit().decide(look(stopped="by hand")) == ()
    assert bandit().decide(look(eligible=np.zeros(2, dtype=np.bool_))) == ()
    (late,) = bandit().decide(look(step=700))
    assert isinstance(late, Stop) and "too late to pay back" in late.reason
    failures = tuple(ended(number, Lifecycle.CULLED, 0.0) for number in range(2))
    (enough,) = bandit().decide(look(verdicts=failures))
    assert isinstance(enough, Stop) and "2 cohorts in a row rejected" in enough.reason
    subject = bandit()
    teach(subject, look(), "tiny")
    (full,) = subject.decide(look(budget_params=20_001))
    assert isinstance(full, Stop) and "budget reached" in full.reason
    tight = bandit()
    teach(tight, look(), "tiny")
    assert sum(plan.width or 0 for plan in asked(tight, look(budget_params=22_580)).seeds) <= 20


def test_spans_and_layers_are_weighed_together(look: Callable[..., Observation]) -> None:
    seen = look(
        spans=1, layers=1, kinds=("linear_span", "linear_layer"), offers=(OFFERS, (("low_rank", "random_zero"),))
    )  # fmt: skip
    subject = bandit(min_gain_per_cost=1e-9)
    place = places(seen)[1]
    rows = [encode(place, Choice(blueprint="low_rank", start="random_zero", growth=g)) for g in (0.5, 1.0, 2.0)]
    subject.learn(np.array(rows * 100), np.full((300, 3), compressed(1.0)))
    plans = {plan.site: plan for plan in asked(subject, seen).seeds}
    assert plans["blocks.1"].blueprint == "low_rank" and plans["blocks.1"].width in (4, 8, 16)


def test_the_default_asks_for_more_of_spans_that_cost_little_and_not_of_layers(
    look: Callable[..., Observation],
) -> None:
    seen = look(
        spans=1, layers=1, kinds=("linear_span", "linear_layer"), offers=(OFFERS, (("low_rank", "random_zero"),)),
        unit_flops=np.array([1e4, 1e4]),
    )  # fmt: skip
    found: dict[str, set[int | None]] = {"blocks.0": set(), "blocks.1": set()}
    for seed in range(40):
        for command in bandit(seed, growth=None).decide(seen):
            assert isinstance(command, Germinate)
            for plan in command.seeds:
                found[plan.site].add(plan.width)
    assert found == {"blocks.0": {32, 64, 128}, "blocks.1": {4, 8}}, "four times 32, but 64 outputs; and as stated"


def test_where_nobody_tells_what_can_be_defaults_grow(observe: Observe) -> None:
    subject = bandit()
    subject.learn(np.zeros((0, 1)), np.zeros((0, 3)))
    teach(subject, observe(), "nothing", worth=0.5)
    for seed in range(20):
        for command in bandit(seed).decide(observe()):
            assert isinstance(command, Germinate)
            assert all(plan.blueprint is None and plan.start is None for plan in command.seeds)


def test_it_goes_on_where_it_was_saved(look: Callable[..., Observation]) -> None:
    subject, twin = bandit(5, patience=9), bandit(5, patience=9)
    for one in (subject, twin):
        teach(one, look(), "tiny")
    asked(subject, look())
    kept = ended(0, Lifecycle.FOSSILIZED, 0.4)
    second = subject.decide(look(step=200, verdicts=(kept,)))
    twin.load(json.loads(json.dumps(subject.state())))
    assert second and twin.state() == subject.state()
    later = look(step=300, verdicts=(kept, ended(1, Lifecycle.CULLED, 0.0)))
    assert twin.decide(later) == subject.decide(later) and twin.state() == subject.state()
    again = json.loads(json.dumps(subject.state()))
    subject.load(again)
    assert subject.state() == again, "what it knows already is not learnt twice"


def test_loading_an_earlier_state_forgets_what_came_after(look: Callable[..., Observation]) -> None:
    """A rollback of the whole training."""
    subject, other = bandit(5, patience=9), bandit(5, patience=9)
    asked_for = look()
    for one in (subject, other):
        teach(one, asked_for, "tiny")
        asked(one, asked_for)
    before = json.loads(json.dumps(subject.state()))
    subject.decide(look(step=200, verdicts=(ended(0, Lifecycle.FOSSILIZED, 0.4),)))
    assert len(subject.state()["values"]) == 1
    subject.load(before)
    end = look(step=200, verdicts=(ended(0, Lifecycle.CULLED, 0.0),))
    assert subject.decide(end) == other.decide(end) and subject.state() == other.state()
    assert np.array_equal(subject._known.mean, other._known.mean)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("rows"),
        lambda s: s.update(prior_rows=3),
        lambda s: s.update(pending=[{"features": "x", "after": 1}]),
        lambda s: s.update(pace={}),
        lambda s: s.update(values=[1.0]),
    ],
)
def test_a_state_that_does_not_fit(damage: Any, look: Callable[..., Observation]) -> None:
    subject = bandit()
    subject.decide(look())
    state = json.loads(json.dumps(subject.state()))
    damage(state)
    before = subject.state()
    with pytest.raises(ConfigError):
        subject.load(state)
    assert subject.state() == before


def test_it_is_taught_before_its_run(look: Callable[..., Observation]) -> None:
    subject = bandit()
    subject.decide(look())
    with pytest.raises(ConfigError, match="before its run begins"):
        teach(subject, look(), "tiny")
