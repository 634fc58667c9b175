"""Every kind of span under a real grower: dormant to the bit, a whole life, and an export that equals it."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.models import Task, mse
from tests.rigs import QUICK, Rig, attach, keep_visible, trajectory
from tests.span_hosts import BOTTLENECK, FUSED, GATED, GPT2, SPAN_HOSTS, Conv1D, GatedFfn, SpanHost
from torch import nn

import esper
from esper.protocol import AnyEvent, Lifecycle, Transitioned

S = Lifecycle
every_host = pytest.mark.parametrize("host", SPAN_HOSTS, ids=lambda host: host.name)


def _task(host: SpanHost) -> Task:
    return Task(host.name, lambda: host.build(4), lambda num, seed=1: host.batches(num, seed=seed, size=8))


@pytest.mark.integration
@every_host
def test_dormant_it_trains_as_without_esper(host: SpanHost) -> None:
    def join(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> Rig:
        return attach(
            model, optimizer, held_out=task.batches(16, seed=7), telemetry=esper.TelemetryConfig(every=2), interval=5,
            held_out_every=10, sites=esper.SitesConfig(layers=True),
        )  # fmt: skip

    alone = trajectory(_task(host), 30)
    trajectory(_task(host), 30, join).assert_equals(alone)


def _grown(host: SpanHost, *, start: str = "random_zero") -> Rig:
    torch.manual_seed(2)
    model = host.build(2)
    rig = attach(
        model, torch.optim.AdamW(model.parameters(), 1e-2), batches=host.batches(20, seed=1),
        held_out=host.batches(40, seed=7),
        graft=esper.GraftConfig(ramp_steps=60, stabilize_steps=10, fine_tune_steps=20, warmup_steps=10, lr_boost=2.0,
                                timeout=400),
    )  # fmt: skip
    rig.train(60)
    rig.germinate(*host.spans, start=start, width=10)
    for _ in range(600):
        if not rig.grower.kasmina.cohorts:
            break
        rig.train()
    return rig


@pytest.mark.e2e
@every_host
def test_a_whole_life_and_an_equal_export(host: SpanHost) -> None:
    rig = _grown(host)
    infos = {info.name: info for info in rig.grower.sites()}
    assert tuple(infos) == host.spans and {info.kind for info in infos.values()} == {host.kind}
    moves = [(event.source, event.target) for event in rig.events if isinstance(event, Transitioned)]
    way = [S.DORMANT, S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]
    assert list(dict.fromkeys(moves)) == list(itertools.pairwise(way)), rig.grower.verdicts
    (verdict,) = rig.grower.verdicts
    assert verdict.state is S.FOSSILIZED and verdict.gain_low > 0
    assert rig.grower.report().widths == dict.fromkeys(host.spans, 12)
    for name in host.spans:
        annex = rig.grower.kasmina.sites[name].annex
        assert annex is not None and annex.blueprint == host.blueprint and annex.units == 10
    rig.train(5)
    rig.grower.finish()
    _assert_exports_equal(rig, host)


def _assert_exports_equal(rig: Rig, host: SpanHost) -> None:
    """Outputs, shapes, and loading into a host that was built at the new width."""
    plain = rig.grower.export()
    assert type(plain) is type(rig.model)
    assert {type(module) for module in plain.modules()} == {type(module) for module in rig.model.modules()}
    x = rig.batches[0][0]
    for training in (False, True):
        rig.model.train(training), plain.train(training)
        torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-4, atol=1e-5)
    again = host.build(12)
    again.load_state_dict(plain.state_dict())
    torch.testing.assert_close(again.eval()(x), plain.eval()(x))
    shapes = rig.grower.export_structure()
    for name, sizes in shapes.items():
        layer = plain.get_submodule(name)
        assert all(getattr(layer, key) == value for key, value in sizes.items()), name


@pytest.mark.integration
@pytest.mark.parametrize("host", [GATED, FUSED, GPT2], ids=lambda host: host.name)
@pytest.mark.parametrize("start", ["negative_gradient", "reconstruction"])
def test_fitted_starts_reach_the_forward_pass(host: SpanHost, start: str) -> None:
    fit = esper.FitConfig(steps=150, batch_rows=128, min_t=-1e9)
    rig = attach(host.build(3), batches=host.batches(10, seed=1), held_out=host.batches(16, seed=7), fit=fit)
    rig.train(2)
    cohort = rig.germinate(start=start)
    rig.until(cohort, S.GRAFTING)
    rig.train(2)
    assert rig.bank(cohort).blueprint == host.blueprint


@pytest.mark.integration
def test_exported_layers_are_of_the_hosts_classes_and_sizes() -> None:
    gated = attach(GatedFfn(3, bias=True), batches=GATED.batches(10, seed=1), held_out=GATED.batches(16, seed=7))
    gated.train(2)
    keep_visible(gated, "gate_proj-down_proj", 2)
    assert gated.grower.export_structure() == {
        "gate_proj": {"in_features": 8, "out_features": 5},
        "up_proj": {"in_features": 8, "out_features": 5},
        "down_proj": {"in_features": 5, "out_features": 4},
    }
    gpt2 = attach(GPT2.build(3), batches=GPT2.batches(10, seed=1), held_out=GPT2.batches(16, seed=7))
    gpt2.train(2)
    keep_visible(gpt2, "c_fc-c_proj", 2)
    assert gpt2.grower.export_structure() == {"c_fc": {"nf": 5, "nx": 8}, "c_proj": {"nf": 4, "nx": 5}}
    plain = gpt2.grower.export()
    assert isinstance(plain.c_fc, Conv1D) and plain.c_fc.weight.shape == (8, 5)


class Chain(nn.Module):
    """Linear, then a fused gate, then a plain span on its last layer: each reads what the one before has grown."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 5), nn.Linear(5, 12), nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.b(torch.tanh(self.a(x))).chunk(2, dim=-1)
        return self.d(torch.relu(self.c(torch.sigmoid(gate) * up)))


@pytest.mark.integration
@pytest.mark.parametrize("order", [("a-b", "b-c", "c-d"), ("c-d", "b-c", "a-b", "b-c")], ids=lambda o: " ".join(o))
def test_chains_through_a_fused_gate(order: tuple[str, ...]) -> None:
    rig = attach(Chain(), sites=esper.SitesConfig(layers=True))
    rig.train(2)
    for site in order:
        keep_visible(rig, site, 3)
        rig.train(3)
    for layer in ("b", "c"):  # a branch of its own on a layer that spans have widened
        keep_visible(rig, layer, 2)
    plain = rig.grower.export()
    grown = {site: 3 * order.count(site) for site in order}
    assert (plain.b.in_features, plain.b.out_features) == (5 + grown["a-b"], 12 + 2 * grown["b-c"])
    assert (plain.c.in_features, plain.c.out_features) == (6 + grown["b-c"], 7 + grown["c-d"])
    x = rig.batches[0][0]
    torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.integration
def test_both_spans_of_a_bottleneck_block_grow_one_after_the_other() -> None:
    rig = attach(BOTTLENECK.build(3), batches=BOTTLENECK.batches(10, seed=1), held_out=BOTTLENECK.batches(16, seed=7))
    rig.train(2)
    for site in ("blocks.1.conv2-conv3", "blocks.1.conv1-conv2", "blocks.1.conv2-conv3"):
        keep_visible(rig, site, 2)
        rig.train(2)
    plain, x = rig.grower.export(), rig.batches[0][0]
    block = plain.get_submodule("blocks.1")
    assert (block.conv2.in_channels, block.conv2.out_channels, block.bn2.num_features) == (5, 7, 7)
    for training in (False, True):
        rig.model.train(training), plain.train(training)
        torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.integration
def test_the_default_controller_grows_a_gated_span_by_itself() -> None:
    torch.manual_seed(0)
    model = GatedFfn(3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    events: list[AnyEvent] = []
    grower = esper.Grower(
        model, optimizer, loss=mse, evaluate=GATED.batches(40, seed=7), on_event=events.append,
        config=esper.Config(total_steps=300, budget=esper.BudgetConfig(params=200), **QUICK),
    )  # fmt: skip
    rig = Rig(model, optimizer, grower, GATED.batches(20, seed=1))
    while not grower.kasmina.cohorts and rig.turn < 200:
        rig.train()
    (cohort,) = grower.kasmina.cohorts.values()
    bank = rig.bank(cohort)
    assert bank.blueprint == "gated" and bank.units >= 3
    host = sum(p.numel() for p in model.parameters())
    assert grower.kasmina.params == host + bank.units * (8 + 8 + 4) <= 200
