from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.protocol import SITE_FEATURES, CohortView, Germinate, Lifecycle, Observation, Stop, Verdict
from esper.tamiyo import HeuristicController
from esper.tamiyo.exploration import draw_variation
from esper.tamiyo.heuristic import TEMPERS

pytestmark = pytest.mark.unit

Observe = Callable[..., Observation]
View = Callable[[Lifecycle], CohortView]
Build = Callable[..., Verdict]
NAN = float("nan")

IN_THE_WAY = [state for state in Lifecycle if Lifecycle.GERMINATED <= state <= Lifecycle.EVALUATING]
NOT_IN_THE_WAY = [Lifecycle.FINE_TUNING, Lifecycle.CULLED, Lifecycle.ROLLED_BACK]


def controller(
    temper: str = "balanced", seed: int = 0, *, first: int | None = 100, growth: float | None = 0.5, **settings: Any
) -> HeuristicController:
    return HeuristicController(TamiyoConfig(temper=temper, first=first, growth=growth, **settings), seed=seed)


def germinate(subject: HeuristicController, observation: Observation) -> Germinate:
    (command,) = subject.decide(observation)
    assert isinstance(command, Germinate)
    return command


def stop(subject: HeuristicController, observation: Observation) -> str:
    (command,) = subject.decide(observation)
    assert isinstance(command, Stop)
    return command.reason


def test_even_growth_over_all_spans(observe: Observe) -> None:
    command = germinate(controller(), observe(spans=4, layers=2))
    assert [plan.site for plan in command.seeds] == [f"blocks.{row}" for row in range(4)]
    assert {plan.width for plan in command.seeds} == {16}
    assert all(plan.chunks == () for plan in command.seeds)
    assert all(plan.blueprint is plan.start is plan.strategy is None for plan in command.seeds)
    assert command.reason == "even growth over 4 sites: +16 units each"


def test_only_eligible_spans(observe: Observe) -> None:
    command = germinate(controller(), observe(eligible=np.array([False, True, False, True])))
    assert [plan.site for plan in command.seeds] == ["blocks.1", "blocks.3"]


def test_layers_when_there_is_no_span(observe: Observe) -> None:
    command = germinate(controller(), observe(spans=0, layers=1))
    assert [(plan.blueprint, plan.width) for plan in command.seeds] == [(None, 4)]
    assert command.reason == "even growth over 1 site: +4 ranks each"


def test_layers_only_when_no_span_is_about_to_come_free(observe: Observe, view: View) -> None:
    busy = observe(spans=1, layers=1, eligible=np.array([False, True]), alive=(view(Lifecycle.FINE_TUNING),))
    assert controller().decide(busy) == ()
    embargo = dataclasses.replace(busy, alive=())
    assert [plan.site for plan in germinate(controller(), embargo).seeds] == ["blocks.1"]


def test_waits_when_nothing_is_eligible(observe: Observe) -> None:
    assert controller().decide(observe(eligible=np.zeros(4, dtype=np.bool_))) == ()


@pytest.mark.parametrize(("step", "germinates"), [(0, False), (299, False), (300, True), (600, True)])
def test_first_and_last(observe: Observe, step: int, germinates: bool) -> None:
    assert bool(controller(first=None).decide(observe(step=step))) == germinates


@pytest.mark.parametrize(
    ("total_steps", "first"),
    [
        (None, 100), (1, 0), (4, 0), (100, 10), (400, 40), (777, 78), (800, 100), (1000, 300), (1166, 466),
        (1200, 480), (2000, 800), (5000, 2000), (6000, 2000), (100_000, 2000),
    ],
)  # fmt: skip
def test_a_run_begins_to_grow_as_late_as_leaves_700_steps_between_a_tenth_and_two_fifths_of_it_and_2000_steps(
    observe: Observe, total_steps: int | None, first: int
) -> None:
    for step in range(max(0, first - 2), first):
        assert controller(first=None).decide(observe(step=step, total_steps=total_steps)) == ()
        assert controller(first=None).waits(step, total_steps=total_steps, num_ended=0)
    assert germinate(controller(first=None), observe(step=first, total_steps=total_steps))
    assert not controller(first=None).waits(first, total_steps=total_steps, num_ended=0)


def test_too_late(observe: Observe, verdict: Build) -> None:
    assert stop(controller(), observe(step=601)) == "too late to pay back: step 601 is past 60% of 1000 planned steps"
    assert germinate(controller(), observe(step=10**9, total_steps=None))
    tried = (verdict(gain=0.5),)
    assert germinate(controller(), observe(step=150, verdicts=tried))
    assert stop(controller(), observe(step=151, verdicts=tried)).endswith("step 151 is past 15% of 1000 planned steps")
    assert germinate(controller(last_share=0.6), observe(step=600, verdicts=tried))
    rejected = (verdict(Lifecycle.CULLED),)
    assert stop(controller(), observe(step=20, verdicts=rejected)).startswith("1 cohort rejected")
    assert germinate(controller(patience=2), observe(step=600, verdicts=rejected))
    assert "past 60%" in stop(controller(patience=2), observe(step=601, verdicts=rejected))


def test_without_a_planned_length_two_failures_end_growth(observe: Observe, verdict: Build) -> None:
    rejected = (verdict(Lifecycle.CULLED),)
    assert stop(controller(), observe(verdicts=rejected)).startswith("1 cohort rejected")
    assert germinate(controller(), observe(verdicts=rejected, total_steps=None))
    assert stop(controller(), observe(verdicts=rejected * 2, total_steps=None)).startswith(
        "2 cohorts in a row rejected"
    )
    assert germinate(controller(patience=3), observe(verdicts=rejected * 2, total_steps=None, step=600))
    assert [controller(temper).patience(None) for temper in TEMPERS] == [1, 2, 3, 2]


def known(observation: Observation, share: float, writes: int = 1000) -> Observation:
    """As many outputs as never count, and units of the host's width on all spans that cost ``share`` of its FLOPs."""
    observation.sites[:, SITE_FEATURES.index("log_out")] = math.log(writes)
    observation.sites[:, SITE_FEATURES.index("log_in")] = math.log(writes)
    num = int(np.count_nonzero(observation.hidden))
    each = share * observation.host_flops_per_step / max(1, observation.hidden.sum()) if num else NAN
    return dataclasses.replace(observation, unit_flops=np.full(len(observation.hidden), each))


def default(observation: Observation, temper: str = "balanced", **settings: Any) -> list[int | None]:
    """Widths that the default asks for."""
    command = germinate(controller(temper, growth=None, **settings), observation)
    return [plan.width for plan in command.seeds]


def test_the_default_asks_for_no_more_than_a_span_can_use_where_the_length_is_known(observe: Observe) -> None:
    narrow = known(observe(), 1.0, writes=10)
    assert default(narrow) == [10] * 4
    assert default(dataclasses.replace(narrow, total_steps=None)) == [16] * 4
    assert germinate(controller(), narrow).seeds[0].width == 16, "what is stated is asked for as it is"
    assert default(known(observe(), 1.0, writes=3)) == [8] * 4, "and no less than half of what it would be"


@pytest.mark.parametrize(
    ("share", "width"), [(4.0, 16), (1.0, 16), (0.8, 20), (0.5, 32), (0.25, 64), (0.125, 128), (0.01, 128), (NAN, 16)]
)
def test_the_default_asks_for_half_of_the_host_s_flops_up_to_four_times_the_width(
    observe: Observe, share: float, width: int
) -> None:
    seen = known(observe(), share)
    if math.isnan(share):  # of no cost at all is anything known
        seen.sites[:, SITE_FEATURES.index("log_in")] = NAN
    assert default(seen) == [width] * 4
    assert default(dataclasses.replace(seen, total_steps=None)) == [16] * 4
    assert germinate(controller(), seen).seeds[0].width == 16, "what is stated is asked for as it is"
    assert default(seen, "conservative") == [width // 2] * 4
    assert default(seen, "aggressive") == [width * 3 // 2] * 4


def test_a_span_that_can_use_little_gets_half_of_what_half_of_the_flops_would_be(observe: Observe) -> None:
    assert default(known(observe(), 0.125, writes=100)) == [100] * 4
    assert default(known(observe(), 0.125, writes=10)) == [64] * 4


def test_what_has_been_grown_does_not_make_the_next_cohort_larger(observe: Observe) -> None:
    """Growth is a multiple of the host's width and FLOPs; with ``compound`` of the present ones."""
    grown = {"grown": np.full(4, 32), "flops_per_step": 8e6}
    seen = known(observe(**grown), 0.8)
    assert default(seen) == [20] * 4
    assert default(seen, compound=True) == [40] * 4, "half of 8e6 where units of the present width cost 6.4e6"
    unknown = dataclasses.replace(seen, flops_per_step=NAN)
    assert default(unknown) == [20] * 4 and default(unknown, compound=True) == [32] * 4


def test_the_default_asks_for_fewer_units_under_a_budget_and_after_refusals(observe: Observe) -> None:
    seen = known(observe(budget_flops=4e6 + 1e6), 0.25)
    assert default(seen) == [32] * 4, "half of the host's FLOPs would be 64 each"
    subject = controller(growth=None)
    free = dataclasses.replace(seen, budget_flops=None)
    assert [germinate(subject, free).seeds[0].width for _ in range(3)] == [64, 32, 16]


def test_layers_get_the_usual_rank_from_the_default(observe: Observe) -> None:
    """However little the spans cost, and where there are none."""
    assert default(observe(spans=0, layers=2)) == [4, 4]
    assert default(observe(spans=0, layers=1, width=128), "aggressive") == [12]
    mixed = known(observe(spans=1, layers=1, eligible=np.array([False, True])), 0.01)
    assert default(mixed) == [62], "an eighth of half the smaller side, 1,000"


@pytest.mark.parametrize("state", IN_THE_WAY)
def test_one_cohort_at_a_time(observe: Observe, view: View, state: Lifecycle) -> None:
    assert controller().decide(observe(alive=(view(Lifecycle.FINE_TUNING), view(state)))) == ()


@pytest.mark.parametrize("state", NOT_IN_THE_WAY)
def test_next_cohort_beside_one_that_is_decided(observe: Observe, view: View, state: Lifecycle) -> None:
    assert germinate(controller(), observe(alive=(view(state),)))


def test_says_nothing_once_stopped(observe: Observe, verdict: Build) -> None:
    bad = (verdict(Lifecycle.CULLED),) * 3
    assert controller().decide(observe(stopped="by hand", step=900, verdicts=bad)) == ()


def test_stops_on_verdicts_even_beside_a_living_cohort(observe: Observe, view: View, verdict: Build) -> None:
    poor = (verdict(gain=0.001),) * 2
    observation = observe(verdicts=poor, alive=(view(Lifecycle.TRAINING),), step=900)
    assert stop(controller(), observation).startswith("gain per cost below threshold: 0.01 < 0.02 for 2 cohorts")


def test_waits_while_the_measure_of_verdicts_is_unknown(observe: Observe, verdict: Build) -> None:
    assert controller().decide(observe(verdicts=(verdict(),), held_out=NAN)) == ()
    assert controller().decide(observe(verdicts=(verdict(Lifecycle.CULLED),) * 5, held_out=NAN)) == ()
    assert germinate(controller(), observe(held_out=NAN))  # nothing to measure yet


@pytest.mark.parametrize(
    ("temper", "width", "patience", "threshold"),
    [
        ("conservative", 8, 1, 0.04),
        ("balanced", 16, 1, 0.02),
        ("aggressive", 24, 2, 0.01),
        ("exploratory", None, 1, 0.02),
    ],
)
def test_tempers(
    observe: Observe, verdict: Build, temper: str, width: int | None, patience: int, threshold: float
) -> None:
    if width is not None:
        assert germinate(controller(temper), observe()).seeds[0].width == width
    poor = verdict(gain=0.099 * threshold, cost=0.1)
    assert controller(temper).decide(observe(verdicts=(poor,) * (patience - 1), alive=(), step=10)) == ()
    assert f"{threshold:.3g}" in stop(controller(temper), observe(verdicts=(poor,) * patience, step=10))
    good = verdict(gain=0.101 * threshold, cost=0.1)
    assert controller(temper).decide(observe(verdicts=(good,) * patience, step=10)) == ()


def test_every_temper_of_the_configuration_is_known() -> None:
    assert set(TEMPERS) == {"conservative", "balanced", "aggressive", "exploratory"}
    assert controller("conservative", patience=5).patience(1000) == 1


def test_parameter_budget_trims_evenly(observe: Observe) -> None:
    # A unit of such a span has 129 parameters; there is room for 40 of them over 4 sites.
    command = germinate(controller(), observe(budget_params=20_000 + 40 * 129))
    assert [plan.width for plan in command.seeds] == [10] * 4


def test_flops_budget_uses_stated_costs(observe: Observe) -> None:
    stated = np.array([1e4, 1e4, 1e4, 1e4])
    command = germinate(controller(), observe(budget_flops=4e6 + 20 * 1e4, unit_flops=stated))
    assert [plan.width for plan in command.seeds] == [5] * 4


def test_budget_reached(observe: Observe) -> None:
    assert stop(controller(), observe(budget_params=20_100, budget_flops=5e6)) == (
        "budget reached: 20000 of 20100 parameters and 4e+06 of 5e+06 forward FLOPs a step used, "
        "and the next cohort needs more than is left"
    )


def test_leftovers_of_the_budget_are_no_second_cohort(observe: Observe, verdict: Build) -> None:
    # Room for 8 of 128 units: worth it only as the first cohort.
    ceiling = 20_000 + 8 * 129
    first, second = (controller(growth=1.0) for _ in range(2))
    assert [plan.width for plan in germinate(first, observe(budget_params=ceiling)).seeds] == [4, 4]
    assert stop(second, observe(budget_params=ceiling, verdicts=(verdict(),))).startswith("budget reached")


def test_unknown_present_cost_waits(observe: Observe) -> None:
    assert controller().decide(observe(budget_flops=5e6, flops_per_step=NAN)) == ()


def test_refused_germinations_shrink_and_then_stop(observe: Observe) -> None:
    subject = controller()
    assert [germinate(subject, observe()).seeds[0].width for _ in range(3)] == [16, 8, 4]
    assert stop(subject, observe()) == "germination refused 3 times in a row; the refused events name the gate"


def test_a_refused_first_cohort_is_asked_for_again_late_in_the_run(observe: Observe, verdict: Build) -> None:
    subject = controller()
    assert [germinate(subject, observe(step=step)).seeds[0].width for step in (140, 200, 599)] == [16, 8, 4]
    assert stop(subject, observe(step=600)).startswith("germination refused 3 times")
    subject = controller()
    germinate(subject, observe(step=140))
    germinate(subject, observe(step=200))
    assert "past 15% of 1000" in stop(subject, observe(step=260, verdicts=(verdict(),)))


def test_an_accepted_germination_forgets_refusals(observe: Observe, view: View, verdict: Build) -> None:
    subject = controller()
    germinate(subject, observe())
    germinate(subject, observe())
    assert subject.decide(observe(alive=(view(Lifecycle.TRAINING),))) == ()
    assert germinate(subject, observe(verdicts=(verdict(),))).seeds[0].width == 16


def test_exploration_varies_and_repeats(observe: Observe, view: View) -> None:
    def play(seed: int) -> list[Germinate]:
        subject, commands = controller("exploratory", seed), []
        for _ in range(12):
            commands.append(germinate(subject, observe(spans=6)))
            subject.decide(observe(spans=6, alive=(view(Lifecycle.TRAINING),)))
        return commands

    commands = play(1)
    assert commands == play(1) != play(2)
    assert len({tuple(plan.site for plan in command.seeds) for command in commands}) > 3
    assert len({plan.start for command in commands for plan in command.seeds}) > 1
    assert len({plan.strategy for command in commands for plan in command.seeds}) > 1


def test_exploration_does_not_fit_convolutions(observe: Observe) -> None:
    for seed in range(20):
        command = germinate(controller("exploratory", seed), observe(conv=True))
        assert {plan.start for plan in command.seeds} <= {None, "random_zero"}


def test_exploration_sometimes_holds_pressing_chunks_only(observe: Observe) -> None:
    rng = np.random.default_rng(0)
    chunks = {
        "chunk_site": rng.integers(0, 2, 64),  # sites 2 and 3 press nowhere: left out
        "chunk_index": np.arange(64),
        "chunk_pressure": np.sort(rng.random(64))[::-1],
    }
    commands = [germinate(controller("exploratory", seed), observe(**chunks)) for seed in range(30)]
    held = [plan for command in commands for plan in command.seeds if plan.chunks]
    assert 0 < len(held) < sum(len(command.seeds) for command in commands)
    assert {plan.site for plan in held} == {"blocks.0", "blocks.1"}
    assert all(len({bool(plan.chunks) for plan in command.seeds}) == 1 for command in commands)
    for plan in held:
        assert all(chunks["chunk_site"][chunk] == int(plan.site.split(".")[1]) for chunk in plan.chunks)


def test_state_round_trip(observe: Observe) -> None:
    subject, again = controller("exploratory", 3), controller("exploratory", 3)
    germinate(subject, observe())
    germinate(subject, observe())
    again.load(json.loads(json.dumps(subject.state())))
    assert again.decide(observe()) == subject.decide(observe())
    assert again.state() == subject.state()


def test_foreign_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="must have the keys"):
        controller().load({"germinations": 1})


def lines_run(action: Callable[[], object]) -> int:
    """Count the Python lines that ``action`` runs in controllers: deterministic, unlike a clock."""
    num = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal num
        if "tamiyo" not in frame.f_code.co_filename:
            return None
        num += int(event == "line")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return num


def test_a_million_chunks_without_a_loop_over_them(observe: Observe) -> None:
    num = 1_000_000
    rng = np.random.default_rng(0)
    observation = observe(
        spans=50,
        chunk_site=rng.integers(0, 50, num),
        chunk_index=np.arange(num),
        chunk_pressure=np.linspace(1, 0, num),
    )
    assert lines_run(lambda: germinate(controller(), observation)) < 5000
    seed = next(seed for seed in range(50) if draw_variation(50, seed, 0).pressing_only)
    commands: list[Germinate] = []
    aim = controller("exploratory", seed)
    assert lines_run(lambda: commands.append(germinate(aim, observation))) < 5000
    assert sum(len(plan.chunks) for plan in commands[0].seeds) > 50_000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    temper=st.sampled_from(sorted(TEMPERS)),
    seed=st.integers(0, 3),
    shape=st.tuples(st.integers(0, 5), st.integers(0, 3)),
    step=st.integers(0, 1200),
    held_out=st.sampled_from([0.5, NAN, math.inf, 0.0]),
    room_params=st.none() | st.integers(-100, 40_000),
    states=st.lists(st.sampled_from(list(Lifecycle)[1:]), max_size=3),
    ended=st.lists(st.sampled_from(list(Lifecycle)[7:]), max_size=4),
    data=st.data(),
)
def test_whatever_it_sees_it_asks_for_something_legal(
    observe: Observe,
    view: View,
    verdict: Build,
    temper: str,
    seed: int,
    shape: tuple[int, int],
    step: int,
    held_out: float,
    room_params: int | None,
    states: list[Lifecycle],
    ended: list[Lifecycle],
    data: st.DataObject,
) -> None:
    num = sum(shape)
    observation = observe(
        spans=shape[0],
        layers=shape[1],
        step=step,
        held_out=held_out,
        budget_params=None if room_params is None else 20_000 + room_params,
        eligible=np.array(data.draw(st.lists(st.booleans(), min_size=num, max_size=num)), dtype=np.bool_),
        alive=tuple(map(view, states)),
        verdicts=tuple(map(verdict, ended)),
    )
    commands = controller(temper, seed).decide(observation)
    assert len(commands) <= 1
    for command in commands:
        if isinstance(command, Stop):
            assert command.reason
            continue
        assert isinstance(command, Germinate) and command.seeds
        rows = [observation.site_names.index(plan.site) for plan in command.seeds]
        assert observation.eligible[rows].all() and len(set(rows)) == len(rows)
        assert 50 <= step <= 600 and not set(states) & set(IN_THE_WAY)
        assert all(plan.width is not None and plan.width >= 4 for plan in command.seeds)
        if room_params is not None:
            units = [129 if plan.blueprint is None else 128 for plan in command.seeds]
            assert sum((plan.width or 0) * unit for plan, unit in zip(command.seeds, units, strict=True)) <= room_params
