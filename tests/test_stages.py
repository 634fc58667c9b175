"""The less trodden ways through a cohort's life: fits that do not hold, states that take too long, gains that go."""

from __future__ import annotations

import pytest
import torch
from tests.models import Mlp, Pair, rows
from tests.rigs import Rig, attach, make_visible

import esper
from esper.evidence.acceptance import Judgement
from esper.evidence.paired import paired_difference
from esper.kasmina.cohort import Cohort
from esper.kasmina.gates import Gate
from esper.plugins import Move, Strategy, register_strategy
from esper.protocol import Germinate, Lifecycle, Pause, SeedPlan, SetStrategy, Transitioned

pytestmark = pytest.mark.integration

UNPROVABLE = {"steps": 10, "batch_rows": 32, "min_t": 1e9}


def moves(rig: Rig) -> list[tuple[Lifecycle, Lifecycle]]:
    return [(event.source, event.target) for event in rig.events if isinstance(event, Transitioned)]


def test_a_fit_that_does_not_hold_keeps_its_features_and_starts_from_zero() -> None:
    rig = attach(Pair(), fit=esper.FitConfig(**UNPROVABLE))  # type: ignore[arg-type]
    cohort = rig.until(rig.germinate(start="negative_gradient"), Lifecycle.GRAFTING)
    assert cohort.alpha == 1.0, "a zero branch has nothing to ramp"
    bank = rig.bank(cohort)
    inner, outer = bank.params["w1"], bank.params["w2"]
    assert bool(inner.any()) and not bool(outer.any())
    assert cohort.members["fc1-fc2"].preserves_function


def test_of_two_sites_the_one_that_proves_nothing_leaves_and_the_other_goes_on() -> None:
    rig = attach(Mlp(), fit=esper.FitConfig(**UNPROVABLE, unproven="cull"))  # type: ignore[arg-type]
    seeds = tuple(
        SeedPlan(site=site, start=start, width=3)
        for site, start in (("fc1-fc2", "random_zero"), ("fc2-fc3", "negative_gradient"))
    )
    rig.order(Germinate(seeds=seeds))
    (cohort,) = rig.grower.kasmina.cohorts.values()
    both, ids = cohort.added_params, cohort.seed_ids
    rig.until(cohort, Lifecycle.GRAFTING)
    kasmina = rig.grower.kasmina
    assert cohort.sites == ("fc1-fc2",) and cohort.seed_ids == ids[:1]
    assert cohort.added_params == rig.bank(cohort).num_params < both
    assert kasmina.params == kasmina.host_params + cohort.added_params
    assert not kasmina.sites["fc2-fc3"].banks and kasmina.sites["fc2-fc3"].capture is None
    culled = [e for e in rig.events if isinstance(e, Transitioned) and e.target is Lifecycle.CULLED]
    assert [event.seeds for event in culled] == [ids[1:]] and "fc2-fc3" in culled[0].reason
    assert rig.grower.verdicts == (), "the cohort itself has not ended"


def test_alone_a_site_that_proves_nothing_ends_its_cohort() -> None:
    rig = attach(Pair(), fit=esper.FitConfig(**UNPROVABLE, unproven="cull"))  # type: ignore[arg-type]
    rig.germinate(start="negative_gradient")
    rig.train(10)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.CULLED and verdict.reason.startswith("fc1-fc2: ")
    assert not rig.grower.kasmina.cohorts


def test_a_cohort_that_does_not_settle_runs_out_of_time() -> None:
    graft = esper.GraftConfig(ramp_steps=2, timeout=12, stabilize_steps=100, cull_steps=2, warmup_steps=1)
    rig = attach(Pair(), graft=graft)
    rig.until(rig.germinate(), Lifecycle.STABILIZATION)
    rig.train(20)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.CULLED and verdict.reason.startswith("out of time: ")
    assert (Lifecycle.STABILIZATION, Lifecycle.CULLED) in moves(rig)


def ramping(rig: Rig) -> Cohort:
    """A cohort at the beginning of its ramp."""
    cohort = rig.until(rig.germinate(), Lifecycle.GRAFTING)
    rig.grower.kasmina.set_alpha(cohort, 0.01)
    return cohort


def test_a_host_that_drifts_for_ever_lets_the_ramp_run_out_of_time() -> None:
    graft = esper.GraftConfig(
        strategy="drift_controlled", drift_threshold=1e-12, pause_duration=1000, ramp_steps=4, timeout=15, cull_steps=2
    )
    rig = attach(Pair(), graft=graft)
    ramping(rig)
    rig.train(20)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.CULLED and verdict.reason.startswith("out of time: ")


def test_a_branch_that_harms_is_held_near_zero_until_it_runs_out_of_time() -> None:
    graft = esper.GraftConfig(strategy="performance_linked", ramp_steps=10, pause_duration=1000, timeout=80)
    model = Pair()
    still = torch.optim.SGD(model.parameters(), 0.0)  # neither host nor branch can learn the harm away
    rig = attach(model, still, batches=rows(10, size=64), graft=graft)
    rig.train(40)
    cohort = rig.until(rig.germinate(), Lifecycle.GRAFTING)
    make_visible(rig.bank(cohort))
    rig.bank(cohort).scale_output(8.0)
    rig.grower.kasmina.set_alpha(cohort, 0.0)
    rig.train(20)
    assert 0 < cohort.alpha < 0.5 and cohort.held_by is not None and cohort.held_by.startswith("training loss ")
    alpha = cohort.alpha
    rig.train(20)
    assert cohort.alpha == alpha, "a pause holds, it does not go back"
    rig.train(80)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.CULLED and verdict.reason.startswith("out of time: ")


def test_a_change_of_strategy_holds_from_the_next_step() -> None:
    rig = attach(Pair(), graft=esper.GraftConfig(drift_threshold=1e-12, pause_duration=1000, ramp_steps=20))
    cohort = ramping(rig)
    rig.train(3)
    assert 0.1 < cohort.alpha < 1
    rig.order(SetStrategy(cohort=cohort.number, strategy="drift_controlled"))
    rig.train()  # the first look only takes the average
    held = cohort.alpha
    rig.train(5)
    assert cohort.strategy == "drift_controlled" and cohort.alpha == held
    assert not rig.refused()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "a strategy must return a Move, got NoneType from own"),
        (0.5, "a strategy must return a Move, got float from own"),
        (Move(2.0), r"must lie in [0, 1], got 2.0 from own"),
        (Move(float("nan")), r"must lie in [0, 1], got nan from own"),
    ],
)
def test_a_strategy_that_returns_no_alpha_ends_its_cohort(own_registries: None, given: object, message: str) -> None:
    register_strategy("own")(type("Own", (Strategy,), {"advance": lambda *_: given}))
    rig = attach(Pair(), graft=esper.GraftConfig(strategy="own", ramp_steps=4))
    ramping(rig)
    rig.train(3)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.ROLLED_BACK and message in verdict.reason


def test_an_alpha_that_is_a_tensor_becomes_a_number(own_registries: None) -> None:
    """It goes into events and saved states."""
    register_strategy("own")(type("Own", (Strategy,), {"advance": lambda *_: Move(torch.tensor(0.25))}))  # type: ignore[arg-type]
    rig = attach(Pair(), graft=esper.GraftConfig(strategy="own", ramp_steps=4))
    cohort = ramping(rig)
    rig.train(2)
    assert type(cohort.alpha) is float and cohort.alpha == 0.25


def accepted(rig: Rig, *, holds: bool) -> None:
    """Let judgements say yes, and the look after fine-tuning ``holds``."""
    result = paired_difference([0.1, 0.2, 0.3])
    verdict = Judgement(result, 100.0, 41.0, 0.01, 16, Gate("evidence", True, "accepted"))
    rig.grower.judge.evaluate = lambda cohort, members, **_: verdict  # type: ignore[method-assign]
    gate = Gate("hold", holds, "still there" if holds else "the gain is gone")
    rig.grower.judge.hold = lambda cohort, members, **_: (result, gate)  # type: ignore[method-assign]


def test_an_unproven_gain_sends_a_cohort_back_to_learn() -> None:
    rig = attach(Pair())
    result = paired_difference([0.1, 0.2, 0.3])
    gates = iter([Gate("evidence", False, "undecided, it learns on"), Gate("evidence", True, "accepted")])
    asked: list[bool] = []

    def evaluate(cohort: int, members: object, *, further: bool) -> Judgement:
        asked.append(further)
        gate = next(gates)
        return Judgement(result, 30.0, 41.0, 0.01, 16, gate, len(asked), not gate.passed)

    rig.grower.judge.evaluate = evaluate  # type: ignore[method-assign]
    cohort = rig.until(rig.germinate(), Lifecycle.EVALUATING)
    rig.until(cohort, Lifecycle.GRAFTING)
    assert cohort.alpha == 1.0, "it stays in the forward pass at full strength"
    before = rig.bank(cohort).params["w2"].clone()
    rig.train(2)
    assert not torch.equal(before, rig.bank(cohort).params["w2"]), "it learns on"
    rig.until(cohort, Lifecycle.FINE_TUNING)
    assert asked == [True, True]
    moves = [(e.source.name, e.target.name) for e in rig.events if isinstance(e, Transitioned)]
    assert moves.count(("STABILIZATION", "EVALUATING")) == 2 and ("EVALUATING", "GRAFTING") in moves


def test_no_further_look_where_no_time_is_left() -> None:
    rig = attach(Pair(), total_steps=20)
    asked: list[bool] = []

    def evaluate(cohort: int, members: object, *, further: bool) -> Judgement:
        asked.append(further)
        return Judgement(paired_difference([0.1, 0.2]), 1.0, 41.0, 1.0, 16, Gate("evidence", False, "no"))

    rig.grower.judge.evaluate = evaluate  # type: ignore[method-assign]
    rig.until(rig.germinate(), Lifecycle.CULLED)
    assert asked == [False]


def test_a_gain_that_goes_while_fine_tuning_is_culled() -> None:
    rig = attach(Pair())
    accepted(rig, holds=False)
    rig.until(rig.germinate(), Lifecycle.FINE_TUNING)
    rig.train(20)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.CULLED and verdict.reason == "the gain is gone"
    assert rig.grower.kasmina.params == rig.grower.kasmina.host_params


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
@pytest.mark.parametrize("holds", [False, True], ids=["gone", "there"])
def test_at_the_end_of_training_an_accepted_cohort_stays_if_it_holds(holds: bool, paused: bool) -> None:
    rig = attach(Pair())
    accepted(rig, holds=holds)
    cohort = rig.until(rig.germinate(), Lifecycle.FINE_TUNING)
    if paused:
        rig.order(Pause(cohort=cohort.number))
    rig.grower.finish()
    (verdict,) = rig.grower.verdicts
    assert verdict.state is (Lifecycle.FOSSILIZED if holds else Lifecycle.CULLED)
    assert not rig.grower.kasmina.cohorts and rig.grower.kasmina.live_banks == []
    grown = rig.grower.kasmina.units("fc1-fc2")
    assert grown == (3 if holds else 0)
    x = rig.batches[0][0]
    with torch.no_grad():
        torch.testing.assert_close(rig.grower.export()(x), rig.model(x))


def test_growth_that_was_stopped_stays_stopped_for_the_first_reason() -> None:
    rig = attach(Pair())
    assert rig.grower.stopped_because == "growth has not stopped"
    rig.grower.stop("enough")
    rig.grower.stop("again")
    rig.grower.finish()
    assert rig.grower.stopped_because == "enough"
    assert [event.reason for event in rig.events if type(event).__name__ == "Stopped"] == ["enough"]
