"""What Esper holds where a model trains, counted tensor by tensor over whole lives of a small GPT-2."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.models import Pair, rows
from tests.rigs import Rig, attach, graft
from tests.test_stages import accepted

import esper
from esper.bench import hosts
from esper.bench.hosts import Shape
from esper.bench.memory import BARS, Moments, alone, life, live, metered
from esper.bench.tally import Meter, Tally, collected
from esper.bench.training import Training
from esper.evidence.before import HostBefore
from esper.kasmina import memory
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.blueprints.module import ModuleBlueprint
from esper.protocol import Audited, Cull, Germinate, Lifecycle, SeedPlan
from esper.safety.snapshot import Snapshot
from esper.safety.tree import digest

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")
SMALL = Shape(dim=64, blocks=2, symbols=4192, context=64, batch=8)
"""As in GPT-2, logits and what the loss makes of them are more than half of the peak."""
PER_PARAM = 12
"""A weight and two moments, fp32."""
CHANGE = 16 << 10
"""Scalars, counts and alphas."""


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """Counts as if the CPU were a GPU: what is put into the CPU's memory there lies elsewhere."""
    monkeypatch.setattr(memory, "is_scarce", lambda device: True)
    monkeypatch.setattr(memory, "LEAST_CAPTURES", 0)
    # modules that other tests have registered keep a template in the host's memory for each width they are asked about
    shipped = {name: item for name, item in BLUEPRINTS._items.items() if not isinstance(item, ModuleBlueprint)}
    monkeypatch.setattr(BLUEPRINTS, "_items", shipped)
    with metered(CPU) as found:
        yield found


def small() -> hosts.Host:
    return hosts.gpt2(CPU, shape=SMALL, compiled=False)


def quick(*, recompute: bool) -> esper.Config:
    """The benchmark's life; fits take few steps, each of which needs as much memory as the others."""
    return dataclasses.replace(life(small(), recompute=recompute), fit=esper.FitConfig(steps=4))


def lived(meter: Meter, monkeypatch: pytest.MonkeyPatch, *, recompute: bool) -> tuple[int, Moments, int]:
    """Peak of the bare host, a whole life, and parameters grown in it."""
    peak, _ = alone(small(), CPU, meter)
    collected(meter)
    monkeypatch.setattr(memory, "used_bytes", lambda device: peak)
    moments, training = live(small(), CPU, meter, quick(recompute=recompute))
    assert training.grower is not None and moments.most.keys() >= {"GERMINATED", "FINE_TUNING", "FOSSILIZED"}
    return peak, moments, training.grower.kasmina.params - training.grower.kasmina.host_params


# ----------------------------------------------------------------------------------------------------------------------
# The count itself


def test_storage_is_counted_once_until_it_is_freed() -> None:
    with Tally() as tally:
        x = torch.zeros(1000)
        view, y = x[10:].view(33, 30), x + 1
        assert tally.now == 8000 and view.numel() == 990
        del x
        assert tally.now == 8000, "the view still holds it"
        del view
        assert (tally.now, tally.peak) == (4000, 8000)
        tally.reset()
        assert tally.peak == 4000 == y.untyped_storage().nbytes()
        elsewhere = tally.uncounted(torch.clone)(y)
        assert tally.peak == 4000 == elsewhere.untyped_storage().nbytes()


def test_what_autograd_keeps_is_counted() -> None:
    with Tally() as tally:
        x = torch.ones(1000, requires_grad=True)
        y = (x * 2).exp().sum()
        assert tally.now == 4000 + 4000 + 4, "exp keeps its result; the product is gone"
        y.backward()
        assert tally.now == 4000 + 4000 + 4 and x.grad is not None


# ----------------------------------------------------------------------------------------------------------------------
# A whole life


def test_a_whole_life_stays_within_the_bars(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, moments, grown = lived(meter, monkeypatch, recompute=True)
    assert moments.peak("DORMANT")[0] <= (1 + BARS["dormant"]) * peak
    for state in ("GRAFTING", "STABILIZATION", "EVALUATING", "FINE_TUNING", "FOSSILIZED"):
        assert moments.most[state]["training"][0] <= (1 + BARS["default_pool"]) * peak, state
    assert moments.peak()[0] <= (1 + BARS["lifecycle"]) * peak, moments.peak()
    assert abs(moments.at_rest - moments.dormant - PER_PARAM * grown) <= CHANGE, "only what was grown is left"


def test_without_recomputation_activations_of_the_pool_are_kept(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    peak, moments, grown = lived(meter, monkeypatch, recompute=False)
    rows = SMALL.batch * SMALL.context
    kept = SMALL.blocks * rows * 4 * SMALL.dim * 2 * 2  # before and behind the activation, bf16
    assert moments.most["GRAFTING"]["training"][0] >= peak + kept + PER_PARAM * grown
    assert abs(moments.at_rest - moments.dormant - PER_PARAM * grown) <= CHANGE


def test_nothing_is_left_of_a_cohort_that_was_culled(meter: Meter) -> None:
    config = quick(recompute=True)
    config = dataclasses.replace(config, tamiyo=dataclasses.replace(config.tamiyo, first=1 << 20))
    training = Training(small(), CPU, config)
    grower = training.grower
    assert grower is not None
    training.block(2)
    rest = collected(meter)
    sites = [info.name for info in grower.sites() if info.kind.is_span]
    seeds = tuple(SeedPlan(site=name, start="negative_gradient") for name in sites)
    grower.submit(Germinate(seeds=seeds))
    training.block(1)
    (cohort,) = grower.kasmina.cohorts.values()
    while cohort.state is not Lifecycle.GRAFTING:
        training.block(1)
    training.block(2)
    grafted = collected(meter)
    assert abs(grafted - rest - PER_PARAM * cohort.added_params) <= CHANGE, "captures, fits and snapshots are gone"
    grower.submit(Cull(cohort=cohort.number, reason="test"))
    training.block(8)
    assert not grower.kasmina.cohorts
    assert abs(collected(meter) - rest) <= CHANGE


def test_rows_are_joined_without_being_held_twice(meter: Meter) -> None:
    rig = attach(Pair(), batches=rows(10, size=512))
    cohort = rig.germinate(start="negative_gradient")
    rig.until(cohort, Lifecycle.TRAINING)
    capture = rig.grower.kasmina.sites[cohort.sites[0]].capture
    assert capture is not None
    before = collected(meter)
    meter.reset()
    joined = capture.rows()
    size = sum(t.numel() * t.element_size() for t in (joined.x, joined.y, joined.g, joined.cluster, joined.batch))
    assert meter.peak - before <= 1.5 * size, "one batch's temporaries beside them"


# ----------------------------------------------------------------------------------------------------------------------
# Copies of the host


def test_a_snapshot_holds_nothing_where_the_model_trains(meter: Meter) -> None:
    rig = attach(Pair())
    rig.train(2)
    state = {"model": dict(rig.model.state_dict()), "optimizer": [*rig.optimizer.state.values()]}
    before = collected(meter)
    meter.reset()
    snapshot = Snapshot.of(state, 2)
    assert meter.peak == before
    assert snapshot.digest() == digest(state)


def test_the_host_from_before_a_graft_lies_elsewhere(meter: Meter) -> None:
    model = Pair()
    rig = attach(model)
    before = collected(meter)
    kept = HostBefore(model, rig.grower.kasmina.sites, 1)
    assert collected(meter) - before <= 64, "none of it here"
    weights = [value.detach().clone() for value in model.parameters()]
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)
    with kept.restored():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(a, b + 1.0) for a, b in zip(model.parameters(), weights, strict=True))


def audited(audit: list[Any]) -> Rig:
    torch.manual_seed(0)
    rig = attach(Pair(), evidence=esper.EvidenceConfig(control="plain"), audit=audit)
    accepted(rig, holds=True)
    cohort = graft(rig, alpha=1.0)
    rig.grower.kasmina.set_paused(cohort, False, rig.grower.clock.steps)
    rig.until(cohort, Lifecycle.FOSSILIZED)
    return rig


def test_networks_that_wait_for_the_audit_lie_elsewhere(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    gains: list[float] = []
    for scarce in (True, False):
        monkeypatch.setattr(memory, "is_scarce", lambda device, scarce=scarce: scarce)
        rig = audited(rows(8, seed=99))
        (kept,) = rig.grower.trials.copies.kept
        (network,) = kept.networks.networks
        parked = {id(tensor) for tensor, _ in network._homes}
        assert {id(p) for p in network.model.parameters()} <= parked if scarce else not parked
        rig.grower.finish()
        (event,) = [event for event in rig.events if isinstance(event, Audited)]
        gains.append(event.gain)
    assert gains[0] == gains[1] and gains[0] != 0.0


def test_captures_stay_small_beside_the_training_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 64 << 30)
    default = esper.CaptureConfig().max_bytes
    allowed, why = memory.capture_budget(default, CPU, 0, 10 << 30)
    assert allowed == int(0.05 * (10 << 30)) and why is not None and "the training takes 10.0 GiB" in why
    assert memory.capture_budget(default, CPU, 0, 1 << 20)[0] == memory.LEAST_CAPTURES
    assert memory.capture_budget(2 * default, CPU, 0, 10 << 30) == (2 * default, None), "named by the user"
    assert memory.capture_budget(default, CPU, 0, None) == (default, None)
    assert memory.used_bytes(CPU) is None


@pytest.mark.parametrize("name", ["max_memory_allocated", "memory_reserved"])
def test_what_a_training_takes_is_told_by_the_allocator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in ("max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, known, lambda device, known=known: 7000 if known == name else 10)
    assert memory.used_bytes(torch.device("cuda")) == 7000


def test_sums_of_a_regression_are_held_for_few_sites_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = attach(Pair())
    names = [info.name for info in rig.grower.sites()] * 3
    judge = rig.grower.judge
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert judge._groups(names) == [names]
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert judge._groups(names) == [[name] for name in names]
