"""Folding: decisions stay exact, curves stay bounded, a resumed run forgets what it repeats."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.observe.synthetic import ARMS, FATES, TOTAL_STEPS, records

from esper import protocol as p
from esper.observe.history import Cohort, Curve, RunHistory, fold
from esper.observe.scores import arm_scores, mean_interval
from esper.protocol import Lifecycle

pytestmark = pytest.mark.unit


def feed(history: RunHistory, *events: p.AnyEvent) -> RunHistory:
    for event in events:
        history.apply(p.Record(v=1, seq=history.num_events, time=float(history.num_events), event=event))
    return history


def loss(step: int, value: float = 1.0) -> p.TrainLoss:
    return p.TrainLoss(step=step, loss=value, flops=float(step))


def test_the_synthetic_run_folds_to_what_it_says() -> None:
    log = list(records())
    history = fold(log)
    assert tuple(history.arms) == ARMS and history.is_finished and history.main_arm == "grown"
    assert history.last_time == log[-1].time and history.budget_params == 30_000
    run = history.arms["grown"][1]
    assert len(run.cohorts) == len(FATES) and len(run.kept) == FATES.count("kept")
    assert run.count(Lifecycle.ROLLED_BACK) == 1 and run.stopped is not None
    events = [record.event for record in log]
    mine = [event for event in events if event.arm == "grown" and event.seed == 1]
    for kind, found in (
        (p.Judged, [item for cohort in run.cohorts.values() for item in cohort.judgements]),
        (p.Transitioned, [item for cohort in run.cohorts.values() for item in cohort.transitions]),
        (p.Refused, run.refusals),
        (p.HeldOut, run.held_out.items),
    ):
        assert [event for event in mine if isinstance(event, kind)] == found
    assert run.last_step == TOTAL_STEPS
    assert sum(run.units_added().values()) == sum(sum(c.germinated.widths) for c in run.kept if c.germinated)


@given(count=st.integers(0, 400), limit=st.integers(2, 20))
def test_a_curve_is_bounded_ordered_and_ends_at_the_newest(count: int, limit: int) -> None:
    curve = Curve[p.TrainLoss](limit)
    for step in range(count):
        curve.append(loss(step))
    steps = [event.step for event in curve.items]
    assert len(steps) <= limit + 1 and steps == sorted(set(steps))
    if count:
        assert steps[0] == 0 and steps[-1] == count - 1 == curve.last.step
        gaps = [after - before for before, after in pairwise(steps)]
        assert all(gap <= 4 * (1 + count // limit) for gap in gaps)


@given(steps=st.lists(st.integers(0, 60), max_size=80), limit=st.integers(2, 10))
def test_a_rewound_curve_never_runs_backwards(steps: list[int], limit: int) -> None:
    curve = Curve[p.TrainLoss](limit)
    for step in steps:
        curve.append(loss(step))
        shown = [event.step for event in curve.items]
        assert shown == sorted(set(shown)) and shown[-1] == step


def test_decisions_are_exact_when_curves_are_thinned() -> None:
    history = RunHistory()
    for step in range(20_000):
        feed(history, loss(step))
        if step % 100 == 0:
            feed(history, p.Refused(step=step, command="germinate", gate="budget", reason="full"))
    run = history.arms["grown"][0]
    assert len(run.train.items) <= 4097 and len(run.refusals) == 200


def transition(step: int, source: Lifecycle, target: Lifecycle, cohort: int = 0) -> p.Transitioned:
    return p.Transitioned(step=step, cohort=cohort, seeds=(1,), source=source, target=target, alpha=0.0, reason="r")


def test_an_end_state_outlives_the_return_to_dormant() -> None:
    history = feed(
        RunHistory(),
        transition(5, Lifecycle.EVALUATING, Lifecycle.CULLED),
        transition(15, Lifecycle.CULLED, Lifecycle.DORMANT),
    )
    cohort = history.arms["grown"][0].cohorts[0]
    assert cohort.state is Lifecycle.CULLED and cohort.ended_step == 5 and not cohort.is_alive


def test_resuming_from_a_checkpoint_forgets_what_came_after_it() -> None:
    attached = p.Attached(step=0, sites=(), skipped=(), host_params=5, covered_params=5, total_steps=None)
    history = feed(
        RunHistory(), attached, loss(10), transition(10, Lifecycle.GERMINATED, Lifecycle.TRAINING), loss(20),
        transition(25, Lifecycle.TRAINING, Lifecycle.CULLED),
        transition(28, Lifecycle.GERMINATED, Lifecycle.TRAINING, 1),
        p.Stopped(step=29, reason="done"), loss(30),
    )  # fmt: skip
    resumed = p.Attached(step=20, sites=(), skipped=(), host_params=5, covered_params=5, total_steps=None)
    run = feed(history, resumed).arms["grown"][0]
    assert [event.step for event in run.train.items] == [10, 20]
    assert list(run.cohorts) == [0] and run.cohorts[0].state is Lifecycle.TRAINING and run.cohorts[0].is_alive
    assert run.stopped is None and run.last_step == 20


def test_an_empty_history_has_no_arm_and_no_time() -> None:
    history = fold([])
    assert history.main_arm is None and math.isnan(history.last_time) and not history.is_finished
    assert Cohort(3).sites == () and Cohort(3).started_step == 0


def test_the_ceiling_is_found_in_a_job_and_in_a_grower() -> None:
    assert RunHistory(config={"budget_params": 7}).budget_params == 7
    assert RunHistory(config={"budget": {"params": 8}}).budget_params == 8
    assert RunHistory(config={"budget": None, "budget_params": True}).budget_params is None


def test_student_interval_known_answer() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, math.nan])
    assert interval.mean == 2.0 and interval.num == 3
    assert interval.half_width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert not mean_interval([4.0]).has_bounds and mean_interval([]).num == 0
    assert mean_interval([0.0, 1.0] * 40).half_width == pytest.approx(1.96 * math.sqrt(0.25 * 80 / 79 / 80), rel=1e-3)


def test_advantage_is_paired_by_seed() -> None:
    history = RunHistory()
    for arm, scores in (("grown", {0: 0.9, 1: 0.5, 2: 0.7}), ("static_small", {0: 0.8, 1: 0.4})):
        for seed, score in scores.items():
            feed(history, p.ArmFinished(
                step=1, arm=arm, seed=seed, score=score, score_name="accuracy", loss=1.0, params=1, flops=1.0,
                seconds=1.0, lr=0.1, widths={},
            ))  # fmt: skip
    grown, small = arm_scores(history)
    assert grown.arm == "grown" and grown.advantage is None
    assert small.advantage is not None and small.advantage.num == 2
    assert small.advantage.mean == pytest.approx(0.1) and small.advantage.half_width == pytest.approx(0.0, abs=1e-9)


def test_what_was_taken_back_did_not_happen_but_that_it_was_taken_back_did() -> None:
    incident = p.Incident(step=45, cohort=1, action="restored", reason="a non-finite loss")
    restored = p.Restored(
        step=45, to_step=29, cohort=1, verified=True, rewound=True, digest="ab", reason="taken back to step 29"
    )
    move = {"cohort": 1, "seeds": (0,), "reason": "r", "alpha": 1.0}
    history = feed(
        RunHistory(),
        loss(20),
        p.Transitioned(step=28, source=Lifecycle.GERMINATED, target=Lifecycle.TRAINING, **move),
        p.Transitioned(step=30, source=Lifecycle.TRAINING, target=Lifecycle.GRAFTING, **move),
        loss(40, 9.0),
        p.Stopped(step=44, reason="s"),
        incident,
        restored,
        p.Transitioned(step=29, source=Lifecycle.TRAINING, target=Lifecycle.ROLLED_BACK, **move),
        loss(30, 2.0),
    )
    (run,) = history.seed_runs
    assert [(e.step, e.loss) for e in run.train.items] == [(20, 1.0), (30, 2.0)]
    assert [e.target for e in run.cohorts[1].transitions] == [Lifecycle.TRAINING, Lifecycle.ROLLED_BACK]
    assert run.cohorts[1].state is Lifecycle.ROLLED_BACK and run.cohorts[1].ended_step == 29
    assert run.incidents == [incident] and run.restores == [restored]
    assert run.stopped is None and run.last_step == 30
