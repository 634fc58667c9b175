"""Incidents that once ended wrongly: ceilings, blame, shares, half-made growers, late decisions."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.models import Mlp, Pair, mse, rows
from tests.rigs import attach, graft

import esper
from esper.kasmina.discovery import present_geometry
from esper.kasmina.hooks import is_attached
from esper.protocol import Germinate, Lifecycle, SeedPlan

pytestmark = pytest.mark.integration


def test_a_flop_ceiling_counts_seeds_that_are_not_in_the_forward_pass_yet() -> None:
    rig = attach(Mlp(), budget=esper.BudgetConfig(flops_share=2.0))
    rig.train(2)
    first, second = (info for info in rig.grower.sites())
    for site in (first, second):
        rig.grower.submit(Germinate(seeds=(SeedPlan(site=site.name, width=site.hidden_features, start="random_zero"),)))
    rig.train()
    host = rig.grower.accounts.host_flops_per_step
    wanted = host + rig.grower.kasmina.added_flops_per_step(waiting=True)
    assert wanted <= 2.0 * host
    assert len(rig.grower.kasmina.cohorts) + len(rig.refused()) == 2


def test_one_incident_has_one_culprit() -> None:
    rig = attach(Mlp())
    rig.train(2)
    sites = [info.name for info in rig.grower.sites()]
    guilty, innocent = graft(rig, sites[0]), graft(rig, sites[1])
    loss = mse(rig.model, rig.batches[0])
    loss.backward()
    rig.optimizer.step()
    rig.optimizer.zero_grad()
    with torch.no_grad():
        next(iter(rig.bank(guilty).params.values())).fill_(float("nan"))
    rig.grower.step(torch.tensor(float("nan")))
    for _ in range(20):  # two decisions and more, with the NaN still inside a window of eight losses
        rig.grower.clock.steps += 1
        rig.grower.step(torch.tensor(1.0))
    assert guilty.number not in rig.grower.kasmina.cohorts
    assert innocent.number in rig.grower.kasmina.cohorts


def test_a_cohort_that_loses_a_site_loses_its_share_of_the_cost() -> None:
    rig = attach(Mlp())
    rig.train(2)
    cohort = rig.germinate(width=4)
    dropped, kept = cohort.sites
    share, rest = cohort.members[dropped].flops_share, cohort.members[kept].flops_share
    assert share > 0 and cohort.added_flops_share == pytest.approx(share + rest)
    rig.until(cohort, Lifecycle.TRAINING)
    rig.grower.kasmina.drop_member(cohort, dropped, rig.grower.clock.steps, 0)
    assert cohort.added_flops_share == pytest.approx(rest)
    assert cohort.added_params == rig.bank(cohort, kept).num_params


def test_a_grower_that_could_not_be_built_leaves_no_hook() -> None:
    model = Pair()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def refuse(event: object) -> None:
        raise RuntimeError("no room for events")

    with pytest.raises(RuntimeError, match="no room"):
        esper.Grower(model, optimizer, loss=mse, evaluate=rows(16, seed=7), on_event=refuse)
    assert not is_attached(model)
    esper.Grower(model, optimizer, loss=mse, evaluate=rows(16, seed=7)).detach()


def test_the_end_of_training_keeps_only_what_was_confirmed_and_fine_tuned() -> None:
    rig = attach(Mlp(), evidence=esper.EvidenceConfig(accept="always"))
    rig.train(2)
    early, late = (info.name for info in rig.grower.sites())
    first = rig.germinate(early)
    rig.until(first, Lifecycle.FINE_TUNING)
    second = rig.germinate(late)
    assert first.state is Lifecycle.FINE_TUNING and second.state < Lifecycle.FINE_TUNING
    rig.grower.finish()
    states = {verdict.cohort: verdict.state for verdict in rig.grower.verdicts}
    assert states == {first.number: Lifecycle.FOSSILIZED, second.number: Lifecycle.ROLLED_BACK}


def test_a_static_loss_buffer_is_copied() -> None:
    rig = attach(Pair())
    buffer = torch.zeros(())
    for value in range(1, 4):
        mse(rig.model, rig.batches[0]).backward()
        rig.optimizer.step()
        rig.grower.step(buffer.fill_(value))
    assert [float(loss) for loss in rig.grower.loop.losses] == [1.0, 2.0, 3.0]


def test_a_loss_of_several_numbers_is_refused_at_once() -> None:
    rig = attach(Pair())
    mse(rig.model, rig.batches[0]).backward()
    rig.optimizer.step()
    with pytest.raises(esper.AttachError, match=r"takes one number, got a tensor of shape \(3,\)"):
        rig.grower.step(torch.zeros(3))


def test_optimizers_whose_rule_is_not_known_are_named() -> None:
    model = Pair()
    with pytest.warns(RuntimeWarning, match="grown units learn by AdamW at the learning rate of RMSprop"):
        attach(model, torch.optim.RMSprop(model.parameters(), 1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(Pair())


def test_an_optimizer_that_maximises_is_refused() -> None:
    model = Pair()
    with pytest.raises(esper.AttachError, match="got maximize=True; negate the loss"):
        attach(model, torch.optim.SGD(model.parameters(), 0.1, maximize=True))
    assert not is_attached(model)


def test_first_weights_are_drawn_on_the_hosts_present_scale() -> None:
    rig = attach(Pair())
    rig.train(2)
    plan = next(iter(rig.grower.kasmina.plans.values()))
    with torch.no_grad():
        plan.head.weight.mul_(30)
    assert present_geometry(plan).head_std == pytest.approx(float(plan.head.weight.detach().std()), rel=1e-5)
    bank = rig.bank(rig.germinate(width=64))
    assert float(bank.params["w1"].detach().std()) == pytest.approx(float(plan.head.weight.detach().std()), rel=0.2)
