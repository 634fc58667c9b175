"""Twins repeat the host exactly, withholding and audits leave it alone, and what they cost is counted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models import DROPOUT_MLP, Batch, Mlp, Pair, mse, rows, same_bits, snapshot
from tests.rigs import Rig, attach, graft, keep_visible, trajectory
from tests.test_stages import accepted
from torch import nn

import esper
from esper.kasmina.cohort import Cohort
from esper.protocol import Audited, EffectScored, Germinate, Lifecycle, SeedPlan, Transitioned, TwinScored, Withheld

pytestmark = pytest.mark.component


def run(rig: Rig, steps: int, *, noise: float = 0.0) -> None:
    """The documented loop, with the batch handed over."""
    for _ in range(steps):
        batch = rig.batches[rig.turn % len(rig.batches)]
        if noise:
            torch.rand(3)  # a loader that draws between two steps
        loss = mse(rig.model, batch)
        loss.backward()
        rig.optimizer.step()
        rig.optimizer.zero_grad()
        rig.grower.step(loss, batch=batch)
        rig.turn += 1


def scored(rig: Rig, kind: type[Any]) -> list[Any]:
    return [event for event in rig.events if isinstance(event, kind)]


def until_grafted(rig: Rig, cohort: Cohort) -> Cohort:
    for _ in range(100):
        if cohort.state is Lifecycle.GRAFTING:
            return cohort
        run(rig, 1)
    raise AssertionError("not grafted")


def twinned(steps: int = 1000, **settings: Any) -> esper.EvidenceConfig:
    return esper.EvidenceConfig(twin_share=1.0, twin_steps=steps, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# Twins


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_twin_of_a_branch_that_stays_zero_is_the_host_bit_for_bit(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(3)
    model = Mlp(dropout=0.2)
    extra = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    stepper = optimizer(model.parameters(), lr=3e-3, **extra)  # type: ignore[call-arg]
    schedule = torch.optim.lr_scheduler.StepLR(stepper, 3, 0.7)
    rig = attach(model, stepper, evidence=twinned())
    model.eval()
    keep_visible(rig, "fc1-fc2", 3)  # an annex that goes on learning, which the twin has to repeat
    model.train()
    rig.train(2)
    cohort = until_grafted(rig, rig.germinate("fc2-fc3"))
    rig.bank(cohort).set_learning(False)
    for _ in range(7):
        run(rig, 1, noise=1.0)
        schedule.step()
    (twin,) = rig.grower.trials.twins.values()
    assert twin.steps == 7
    for name, value in snapshot(model).items():
        assert same_bits(value, snapshot(twin.model)[name]), name
    annex, copied = rig.grower.kasmina.sites["fc1-fc2"].annex, twin.sites["fc1-fc2"].annex
    assert annex is not None and copied is not None
    assert all(same_bits(value, copied.params[name]) for name, value in annex.params.items())
    rig.grower.finish()
    (score,) = scored(rig, TwinScored)
    assert score.credit == 0.0 and score.num_steps == 7 and score.cohort == cohort.number


def test_a_twin_leaves_no_trace_in_the_host() -> None:
    def grown(share: float) -> tuple[Rig, Any]:
        torch.manual_seed(1)
        rig = attach(Mlp(dropout=0.1), evidence=esper.EvidenceConfig(twin_share=share, twin_steps=9))
        rig.germinate("fc1-fc2", start="negative_gradient")
        run(rig, 40)
        return rig, (snapshot(rig.model), torch.rand(()))

    (without, (plain, drawn)), (rig, (state, drawn_too)) = grown(0.0), grown(1.0)
    assert all(same_bits(plain[name], value) for name, value in state.items()) and drawn == drawn_too
    (score,) = scored(rig, TwinScored)
    assert score.num_steps == 9 and score.num_batches == len(rig.grower.judge.evaluator.splits.confirm)
    assert rig.grower.trials.twins == {}
    assert len(rig.model._forward_pre_hooks) == len(without.model._forward_pre_hooks), "what listened is gone"
    assert not scored(without, TwinScored)


def test_the_credit_is_what_the_branch_is_worth_on_the_confirmation_batches() -> None:
    rig = attach(Pair(), evidence=twinned())
    cohort = until_grafted(rig, rig.germinate())
    run(rig, 3)
    (twin,) = rig.grower.trials.twins.values()
    evaluator = rig.grower.judge.evaluator
    with torch.no_grad():
        gaps = [
            float(mse(twin.model, evaluator.batches[i]) - mse(rig.model, evaluator.batches[i]))
            for i in evaluator.splits.confirm
        ]
    rig.grower.stages.end(cohort, Lifecycle.CULLED, rig.grower.clock.steps, "test")
    (score,) = scored(rig, TwinScored)
    assert score.credit == pytest.approx(sum(gaps) / len(gaps), rel=1e-5) and score.credit != 0.0
    assert "CULLED" in score.reason and rig.grower.trials.twins == {}


def test_twins_and_draws_are_counted_as_evidence() -> None:
    def spent(evidence: esper.EvidenceConfig) -> tuple[Rig, float]:
        torch.manual_seed(1)
        rig = attach(Pair(), evidence=evidence)
        until_grafted(rig, rig.germinate())
        run(rig, 6)
        return rig, rig.grower.ledger.spent["evidence"]

    (plain, without), (rig, with_twin) = spent(esper.EvidenceConfig()), spent(twinned(5))
    (score,) = scored(rig, TwinScored)
    assert with_twin - without == pytest.approx(score.flops)
    trained = 5 * 3.0 * rig.grower.accounts.host_flops_per_step
    assert score.flops > trained > 0
    assert rig.grower.ledger.spent["host"] == plain.grower.ledger.spent["host"]


def test_without_the_batch_there_is_no_twin_and_the_user_is_told_once() -> None:
    rig = attach(Pair(), evidence=twinned())
    until_grafted(rig, rig.germinate())
    with pytest.warns(RuntimeWarning, match=r"grower\.step\(loss, batch=batch\)"):
        rig.train(2)
    assert rig.grower.trials.twins == {} and not scored(rig, TwinScored)


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> torch.Tensor:
    loss = mse(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("told", [False, True])
def test_a_loop_that_clips_is_found_out_unless_it_gives_its_step(told: bool) -> None:
    model = Pair()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    rig = attach(model, optimizer, evidence=twinned(), train_step=clipped if told else None)
    cohort = rig.germinate()

    def steps(num: int) -> None:
        for _ in range(num):
            batch = rig.batches[rig.turn % 10]
            rig.turn += 1
            rig.grower.step(clipped(model, optimizer, batch), batch=batch)

    while cohort.state is not Lifecycle.GRAFTING:
        steps(1)
    if told:
        steps(3)
        assert [twin.steps for twin in rig.grower.trials.twins.values()] == [3]
    else:
        with pytest.warns(RuntimeWarning, match="train_step="):
            steps(1)
        assert rig.grower.trials.twins == {} and not scored(rig, TwinScored)


def test_the_next_graft_ends_a_twin_that_would_not_have_it() -> None:
    rig = attach(Mlp(), evidence=twinned())
    first = until_grafted(rig, rig.germinate("fc1-fc2"))
    run(rig, 2)
    rig.grower.submit(Germinate(seeds=(SeedPlan(site="fc2-fc3", start="random_zero", width=3),)))
    run(rig, 1)
    until_grafted(rig, list(rig.grower.kasmina.cohorts.values())[-1])
    assert [event.cohort for event in scored(rig, TwinScored)] == [first.number]
    assert rig.grower.trials.twins == {}, "beside another cohort on trial a twin would stand still in part"


# ----------------------------------------------------------------------------------------------------------------------
# Withholding


def test_a_withheld_cohort_keeps_its_place_and_is_never_in_the_forward_pass() -> None:
    rig = attach(Pair(), evidence=esper.EvidenceConfig(withhold_share=1.0, withhold_steps=12))
    cohort = rig.germinate(start="negative_gradient")
    rig.train(10)
    (event,) = scored(rig, Withheld)
    assert cohort.state is Lifecycle.TRAINING and cohort.withheld_since == event.step and event.until == event.step + 12
    assert not rig.grower.kasmina.sites["fc1-fc2"].grafted and rig.grower.kasmina.sites["fc1-fc2"].capture is None
    rig.train(12)
    (effect,) = scored(rig, EffectScored)
    (verdict,) = rig.grower.verdicts
    assert effect.withheld and effect.num_steps == 12 and effect.flops > 0
    assert verdict.state is Lifecycle.CANCELLED and verdict.reason.startswith("withheld")
    assert not rig.grower.kasmina.cohorts


def test_a_cohort_that_is_drawn_for_grafting_gets_its_window_too() -> None:
    rig = attach(Pair(), evidence=esper.EvidenceConfig(withhold_share=1e-12, withhold_steps=5))
    rig.germinate()
    rig.train(20)
    (effect,) = scored(rig, EffectScored)
    assert not effect.withheld and not scored(rig, Withheld)


def test_withholding_leaves_the_host_bit_identical() -> None:
    def join(model: nn.Module, optimizer: torch.optim.Optimizer, task: Any) -> Rig:
        rig = attach(
            model, optimizer, batches=task.batches(10), held_out=task.batches(16),
            evidence=esper.EvidenceConfig(withhold_share=1.0, withhold_steps=8),
        )  # fmt: skip
        sites = tuple(info.name for info in rig.grower.sites())
        rig.grower.submit(Germinate(seeds=tuple(SeedPlan(site=name, width=3) for name in sites)))
        return rig

    trajectory(DROPOUT_MLP, 25, join).assert_equals(trajectory(DROPOUT_MLP, 25))


@pytest.mark.parametrize("seed", [0, 1])
def test_who_is_withheld_follows_from_the_seed(seed: int) -> None:
    def draws() -> list[tuple[int, bool]]:
        rig = attach(
            Pair(), seed=seed, evidence=esper.EvidenceConfig(withhold_share=0.5, withhold_steps=2),
            graft=esper.GraftConfig(ramp_steps=1, cull_steps=1, embargo=0, timeout=40, warmup_steps=1),
        )  # fmt: skip
        for _ in range(6):
            cohort = rig.germinate()
            rig.train(8)
            if cohort.number in rig.grower.kasmina.cohorts:
                rig.grower.stages.expel(cohort, rig.grower.clock.steps, "test")
        return [(event.cohort, event.withheld) for event in scored(rig, EffectScored)]

    once = draws()
    assert once == draws() and len(once) == 6


def test_the_end_of_training_cancels_a_withheld_cohort() -> None:
    rig = attach(Pair(), evidence=esper.EvidenceConfig(withhold_share=1.0))
    rig.germinate()
    rig.train(10)
    rig.grower.finish()
    assert [verdict.state for verdict in rig.grower.verdicts] == [Lifecycle.CANCELLED]
    assert not scored(rig, EffectScored), "its window was not over"


# ----------------------------------------------------------------------------------------------------------------------
# The audit


class Sealed:
    """Batches that notice being read."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.times_read = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        self.times_read += 1
        torch.rand(1)  # as a DataLoader does
        return iter(self.batches)


def test_the_audit_is_read_once_after_the_run_and_scores_what_was_kept() -> None:
    sealed = Sealed(rows(6, seed=99))
    rig = attach(Mlp(), evidence=twinned(8), audit=sealed)
    accepted(rig, holds=True)
    cohort = rig.germinate("fc1-fc2", start="negative_gradient")
    run(rig, 60)
    assert cohort.state is Lifecycle.FOSSILIZED and sealed.times_read == 0 and not scored(rig, Audited)
    before, drawn = snapshot(rig.model), copy.deepcopy(torch.get_rng_state())
    cost = rig.grower.ledger.spent["evidence"]
    rig.grower.finish()
    assert sealed.times_read == 1 and torch.equal(torch.get_rng_state(), drawn)
    assert all(same_bits(before[name], value) for name, value in snapshot(rig.model).items())
    audits = {event.source: event for event in scored(rig, Audited)}
    assert set(audits) == {"twin", "on_off"}
    for event in audits.values():
        assert event.cohort == cohort.number and event.claimed == pytest.approx(0.2) and event.num_batches == 6
        assert event.gain_low < event.gain < event.gain_high
    assert rig.grower.ledger.spent["evidence"] - cost >= sum(event.flops for event in audits.values()) > 0


def test_the_on_off_audit_is_of_the_network_as_it_was_when_the_cohort_became_permanent() -> None:
    batches = rows(6, seed=99)
    rig = attach(Pair(), evidence=esper.EvidenceConfig(control="plain"), audit=batches)
    accepted(rig, holds=True)
    cohort = graft(rig, alpha=1.0)
    rig.grower.kasmina.set_paused(cohort, False, rig.grower.clock.steps)
    wanted: list[float] = []
    keeping = rig.grower.trials.keeping

    def measure(cohort: Cohort) -> None:
        site = rig.grower.kasmina.sites["fc1-fc2"]
        with torch.no_grad():
            on = [float(mse(rig.model, batch)) for batch in batches]
            site.grafted.clear()
            site.refresh()
            off = [float(mse(rig.model, batch)) for batch in batches]
            site.grafted.add(cohort.number)
            site.refresh()
        wanted.extend([sum(off) / 6 - sum(on) / 6, sum(on) / 6])
        keeping(cohort)

    rig.grower.trials.keeping = measure  # type: ignore[method-assign]
    rig.train(60)
    rig.grower.finish()
    (event,) = scored(rig, Audited)
    assert [event.gain, event.loss] == pytest.approx(wanted, rel=1e-4)
    assert [e for e in scored(rig, Transitioned) if e.target is Lifecycle.FOSSILIZED]


def test_an_audit_with_too_little_to_say_says_so() -> None:
    rig = attach(Pair(), audit=rows(1, seed=99))
    accepted(rig, holds=True)
    rig.germinate()
    rig.train(60)
    with pytest.warns(RuntimeWarning, match="at least 2 batches, got 1"):
        rig.grower.finish()
    assert not scored(rig, Audited)
