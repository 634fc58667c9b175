"""A whole life through the real gates; chained spans; what is exported in the end."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.models import MLP, Mlp, Pair, assert_same_state, mse, rows, same_bits, snapshot
from tests.rigs import Rig, attach, hold, keep_visible, make_visible
from torch import nn

import esper
from esper.kasmina.strategies import STRATEGIES
from esper.protocol import Lifecycle, Transitioned

pytestmark = pytest.mark.integration

S = Lifecycle


@pytest.mark.e2e
def test_a_whole_life_through_the_real_gates() -> None:
    torch.manual_seed(1)
    model = Pair(hidden=2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rig = attach(
        model, optimizer, batches=rows(20, size=64), held_out=rows(32, seed=7, size=64),
        graft=esper.GraftConfig(ramp_steps=40, stabilize_steps=10, fine_tune_steps=20, warmup_steps=10, lr_boost=2.0),
    )  # fmt: skip
    rig.train(100)
    alone = rig.grower.judge.held_out(4)
    cohort = rig.germinate(start="random_zero", width=24)
    seen = [cohort.state]
    for _ in range(600):
        rig.train()
        if seen[-1] is not cohort.state:
            seen.append(cohort.state)
        if not rig.grower.kasmina.cohorts:
            break
    moves = [(event.source, event.target) for event in rig.events if isinstance(event, Transitioned)]
    way = [S.DORMANT, S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]
    assert moves == list(itertools.pairwise(way)), rig.grower.verdicts
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.FOSSILIZED and verdict.gain > 0 and verdict.gain_low > 0
    assert rig.grower.judge.held_out(4) < alone
    site = rig.grower.kasmina.sites["fc1-fc2"]
    assert site.annex is not None and site.annex.units == 24 and site.banks == {}
    annex = {name: value.detach().clone() for name, value in site.annex.params.items()}
    rig.train(3)
    assert all(not torch.equal(value, annex[name]) for name, value in site.annex.params.items()), "it goes on learning"
    again = rig.germinate(start="random_zero", width=4)
    assert again.state is S.TRAINING, "its chunks are dormant again in the next generation"
    rig.grower.finish()
    plain = rig.grower.export()
    assert isinstance(plain, Pair) and plain.fc1.out_features == 2 + 24
    x = rig.batches[0][0]
    torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.e2e
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_whole_life_under_every_strategy(strategy: str) -> None:
    """A fitted branch, whose alpha has to rise, is blended in, proves itself and becomes permanent."""
    torch.manual_seed(2)
    model = Pair(hidden=2)
    rig = attach(
        model, torch.optim.AdamW(model.parameters(), 1e-2), batches=rows(20, size=64),
        held_out=rows(32, seed=7, size=64), fit=esper.FitConfig(steps=60, batch_rows=128),
        graft=esper.GraftConfig(
            strategy=strategy, ramp_steps=20, pause_duration=5, stabilize_steps=10, fine_tune_steps=20,
            warmup_steps=10,
        ),
    )  # fmt: skip
    rig.train(60)
    cohort = rig.until(rig.germinate(start="negative_gradient", width=24), S.GRAFTING)
    alphas, held = [cohort.alpha], 0
    while cohort.state is S.GRAFTING:
        rig.train()
        alphas.append(cohort.alpha)
        held += cohort.held_by is not None and cohort.state is S.GRAFTING
        assert (alphas[-1] == alphas[-2]) == (cohort.held_by is not None or alphas[-2] == 1.0)
    assert alphas == sorted(alphas) and alphas[0] == 0.0 and alphas[-1] == 1.0
    assert len(set(alphas)) == 21, "twenty moves, whatever held them up"
    assert strategy != "fixed_ramp" or held == 0
    assert strategy != "drift_controlled" or held > 5, "a host that learns this fast drifts"
    rig.until(cohort, S.FINE_TUNING)
    rig.train(25)
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.FOSSILIZED and verdict.gain_low > 0, verdict
    plain = rig.grower.export()
    x = rig.batches[0][0]
    torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Chained spans


ORDERS = [("fc1-fc2", "fc2-fc3"), ("fc2-fc3", "fc1-fc2"), ("fc1-fc2", "fc2-fc3", "fc1-fc2", "fc2-fc3")]


@pytest.mark.parametrize("order", ORDERS, ids=lambda o: " ".join(o))
def test_downstream_reads_what_upstream_has_grown(order: tuple[str, ...]) -> None:
    rig = attach(MLP.build())
    rig.train(2)
    for site in order:
        keep_visible(rig, site, 3)
        rig.train(3)
    up, down = (rig.grower.kasmina.sites[name] for name in ("fc1-fc2", "fc2-fc3"))
    assert up.annex is not None and down.annex is not None
    grown = 3 * order.count("fc1-fc2")
    assert up.grown_units == grown and down.annex.reads == 10 + grown == down.reads
    read = down.annex.params["w1"][0, :, 10:]
    assert (read != 0).float().mean() > 0.5, "the grown inputs were to be learnt"
    plain = rig.grower.export()
    assert isinstance(plain, Mlp)
    assert plain.fc1.out_features == plain.fc2.in_features == 10 + grown
    assert plain.fc2.out_features == plain.fc3.in_features == 12 + 3 * order.count("fc2-fc3")
    for x, _ in rows(3, seed=31):
        torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)
    assert_gradients_agree(plain, rig)


def assert_gradients_agree(plain: nn.Module, rig: Rig) -> None:
    """The host's gradients in the grown model are those of the same weights in the plain one."""
    mse(plain, rig.batches[0]).backward()
    rig.backward()
    host = dict(rig.model.named_parameters())
    for name, p in plain.named_parameters():
        part = p.grad[tuple(slice(0, size) for size in host[name].shape)]  # type: ignore[index]
        torch.testing.assert_close(part, host[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batches", [6, 2], ids=["half full", "full"])
def test_an_upstream_that_grows_while_downstream_captures(batches: int) -> None:
    rig = attach(MLP.build(), capture=esper.CaptureConfig(batches=batches, rows=32 * batches))
    rig.train(2)
    waiting = rig.germinate("fc2-fc3", start="negative_gradient")
    rig.train(2)
    assert waiting.state is (S.GERMINATED if batches == 6 else S.TRAINING)
    rig.grower.kasmina.set_paused(waiting, True, rig.grower.clock.steps)
    keep_visible(rig, "fc1-fc2", 3)
    rig.grower.kasmina.set_paused(waiting, False, rig.grower.clock.steps)
    rig.until(waiting, S.GRAFTING)
    assert rig.bank(waiting).reads == 13
    rig.train(2)
    assert waiting.state is S.GRAFTING


def test_a_cohort_on_both_links_becomes_permanent_together() -> None:
    rig = attach(MLP.build())
    rig.train(2)
    cohort = rig.germinate("fc2-fc3", "fc1-fc2")
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    kasmina.move(cohort, S.GRAFTING, step)
    kasmina.graft(cohort)
    kasmina.set_alpha(cohort, 1.0)
    for site in cohort.sites:
        make_visible(rig.bank(cohort, site))
    rig.train(2)
    for state in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
        if cohort.state < state:
            kasmina.move(cohort, state, step)
    x = rig.batches[0][0]
    with torch.no_grad():
        before = rig.model(x)
        kasmina.fossilise(cohort, step, rig.grower.clock.hosts)
        torch.testing.assert_close(rig.model(x), before, rtol=1e-5, atol=1e-6)
    plain = rig.grower.export()
    torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)


def test_an_export_leaves_the_streams_and_the_grown_model_alone(unchanged_rng: None) -> None:
    state = torch.get_rng_state()
    rig, _ = hold(S.FOSSILIZED)
    before, out = snapshot(rig.model), rig.model(rig.batches[0][0])
    torch.set_rng_state(state)
    rig.grower.export()
    assert_same_state(snapshot(rig.model), before)
    assert same_bits(rig.model(rig.batches[0][0]), out)
