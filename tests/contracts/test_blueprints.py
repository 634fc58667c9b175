"""What every blueprint promises, on every kind of site it claims, for one seed of a whole site and for several."""

from __future__ import annotations

import io
from dataclasses import dataclass

import pytest
import torch
from tests.example_sites import EXAMPLES, Example, make_bank, parts_of, with_parts
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.config import FitConfig, SitesConfig
from esper.export.beside import layer_with_branches
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS, Parts, Port, register_module
from esper.kasmina.chunks import chunk_bounds
from esper.kasmina.discovery import discover
from esper.kasmina.hooks import attach
from esper.kasmina.layer_kinds import first_output
from esper.kasmina.optim import Hyperparameters, SlotAdamW
from esper.kasmina.site import Site
from esper.kasmina.starts import STARTS
from esper.kasmina.telemetry import TelemetryBuffer
from esper.protocol import SiteKind

pytestmark = pytest.mark.component


@dataclass(frozen=True)
class Case:
    blueprint: str
    example: Example
    slots: int

    @property
    def id(self) -> str:
        return f"{self.blueprint}-{self.example.geometry.kind}-{self.example.name}-S{self.slots}"

    def bank(self, *, seed: int = 0) -> Bank:
        return make_bank(self.blueprint, self.example, slots=self.slots, seed=seed)


class OwnMlp(nn.Module):
    """A user's module that can be stacked."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(in_features, 5), nn.Linear(5, out_features)

    def forward(self, y: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(y)))


class OwnChannels(nn.Module):
    """A user's module that cannot: it counts its calls and looks at values."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, y: Tensor) -> Tensor:
        if self.training and bool(torch.isfinite(y).all()):
            self.calls += 1
        return torch.einsum("nc...,kc->nk...", y, self.mix.to(y.dtype))


register_module("own_mlp")(OwnMlp)
register_module("own_channels", kinds=(SiteKind.CHANNEL_NORM_LAYER, SiteKind.CONV_LAYER))(OwnChannels)

CASES = [
    Case(name, example, slots)
    for name in BLUEPRINTS
    for kind in sorted(BLUEPRINTS[name].kinds)
    for example in EXAMPLES[kind]
    if BLUEPRINTS[name].refusal(example.geometry) is None
    for slots in (1, 3)
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
WHOLE = [case for case in CASES if case.slots == 1]
whole_site = pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.id)
several = pytest.mark.parametrize("case", [c for c in CASES if c.slots > 1], ids=lambda case: case.id)


def _run(bank: Bank, x: Tensor, y: Tensor, *, training: bool = False) -> Tensor:
    return bank.branch(bank.pick(x, y), alpha=torch.ones_like(bank.alpha), training=training, generator=None)


def _exported(case: Case, host: nn.Module, bank: Bank) -> nn.Module:
    """The host's layer with the branch in it, or beside it."""
    if bank.plan.folds(case.example.geometry):
        return bank.plan.merge(Parts(host, host, None), bank.params, bank.buffers, case.example.geometry).head
    return layer_with_branches(host, [bank], case.example.geometry)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_at_alpha_zero_the_output_is_the_hosts_bit_for_bit(case: Case, dtype: torch.dtype) -> None:
    bank, x = case.bank(), case.example.x(dtype=dtype)
    y = torch.randn(case.example.y_shape).to(dtype)
    out = bank.scatter(y, bank.branch(bank.pick(x, y), training=True, generator=None))
    assert out.dtype == dtype and out is not y
    assert torch.equal(out, y)
    bank.alpha.fill_(1.0)
    assert not torch.equal(bank.scatter(y, _run(bank, x, y)), y)


@every_case
def test_a_branch_adds_to_its_own_columns_only(case: Case) -> None:
    bank, zeros = case.bank(), torch.zeros(case.example.y_shape)
    delta = bank.scatter(zeros, _run(bank, case.example.x(), case.example.y()))
    delta = delta.movedim(case.example.geometry.feature_axis, 0)
    touched = {i for i, row in enumerate(delta) if bool((row != 0).any())}
    owned = set(range(len(delta))) if bank.columns is None else set(bank.columns.flatten().tolist())
    assert touched == owned


@every_case
def test_learns_within_a_few_steps_from_a_zero_output(case: Case) -> None:
    """A unit whose output weights are zero must get gradients, and a ReLU behind a norm must be alive."""
    bank, x, y = case.bank(), case.example.x(), case.example.y()
    STARTS["random_zero"].prepare(bank, None, FitConfig(), torch.Generator())
    assert torch.count_nonzero(_run(bank, x, y)) == 0
    target = _run(case.bank(seed=7), x, y, training=True).detach()
    optimizer = SlotAdamW(lr_boost=1.0, warmup_steps=1)
    bank.set_learning(True)
    losses: list[float] = []
    for step in range(60):
        loss = (_run(bank, x, y, training=True) - target).square().mean()
        loss.backward()
        if step == 1:
            dead = [n for n, v in bank.params.items() if v.grad is None or not bool(v.grad.flatten(1).any(1).all())]
            assert not dead, "every parameter of every slot has a gradient once the output has moved"
        optimizer.step(bank, Hyperparameters("adamw", 0.03, 0.0))
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@every_case
def test_declared_cost_is_what_is_measured(case: Case) -> None:
    bank, x = case.bank(), case.example.x()
    width = case.example.geometry.out_features if bank.columns is None else bank.columns.shape[1]
    cost = bank.plan.cost(case.example.geometry, units=bank.units, columns=width, reads=bank.reads)
    assert bank.num_params == cost.params * case.slots
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        _run(bank, x, case.example.y())
    if case.blueprint == "affine":  # one operation a parameter and row, which no counter counts
        assert cost.flops_per_row == cost.params and counter.get_total_flops() == 0
    else:
        assert counter.get_total_flops() == cost.flops_per_row * case.slots * case.example.positions
    assert bank.flops_per_row == cost.flops_per_row * case.slots


@pytest.mark.parametrize("case", [c for c in WHOLE if c.example.geometry.kind.is_span], ids=lambda case: case.id)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_merged_spans_compute_host_plus_branch(case: Case, training: bool) -> None:
    host, bank, x = case.example.layers(), case.bank(), case.example.x()
    seen = case.example.x(seed=1)
    host(seen), _run(bank, seen, seen, training=True)  # running statistics leave their first values
    host.train(training)
    parts = bank.plan.merge(parts_of(host), bank.params, bank.buffers, case.example.geometry)
    plain = with_parts(host, parts).train(training)
    torch.testing.assert_close(plain(x), host(x) + _run(bank, x, x, training=training), atol=2e-6, rtol=2e-5)
    own = parts_of(host)
    assert parts.head is not own.head and parts.tail is not own.tail
    assert type(parts.head) is type(own.head) and type(parts.tail) is type(own.tail)


LAYERS = [case for case in CASES if not case.example.geometry.kind.is_span]


@pytest.mark.parametrize("case", [c for c in LAYERS if c.slots == 1 or not c.bank().plan.absorbs], ids=lambda c: c.id)
def test_exported_layers_compute_host_plus_branch(case: Case) -> None:
    host, bank, x = case.example.layers()[0], case.bank(), case.example.x()
    y = case.example.call(host, x)
    wanted = bank.scatter(y, _run(bank, x, y, training=True)).detach()
    plain = _exported(case, host, bank)
    torch.testing.assert_close(case.example.call(plain, x), wanted, atol=2e-6, rtol=2e-5)
    assert not any("esper" in type(module).__module__ for module in plain.modules())
    if not bank.plan.folds(case.example.geometry):
        saved = io.BytesIO()
        torch.save(plain, saved)
        assert b"esper" not in saved.getvalue()
        saved.seek(0)
        again = torch.load(saved, weights_only=False)
        assert torch.equal(case.example.call(again.eval(), x), case.example.call(plain.eval(), x))


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_while_isolated_host_and_branch_get_no_gradient_from_one_another(case: Case) -> None:
    torch.manual_seed(0)
    host, x = case.example.layers(), case.example.x()
    inputs = x[..., 0] if case.example.geometry.kind is SiteKind.EMBEDDING_LAYER else x
    call = (lambda: host[0](x, x, x)[0]) if case.example.geometry.kind is SiteKind.ATTENTION_LAYER else None
    run = call or (lambda: first_output(host[0](inputs)))
    run().square().sum().backward()
    alone = [p.grad.clone() for p in host.parameters() if p.grad is not None]
    host.zero_grad()
    found = discover(host, lambda: run(), SitesConfig(layers=True))
    site = Site(found.sites[0].info, found.sites[0].geometry, None)
    bank = case.bank()
    bank.set_learning(True)
    bank.alpha.fill_(1.0)
    site.banks[1] = bank
    site.telemetry_due = True
    site.telemetry = TelemetryBuffer(chunk_bounds(6, 6), 8, torch.device("cpu"))
    site.refresh()
    switch = attach(list(found.sites), {found.sites[0].info.name: site})
    run().square().sum().backward()
    assert site.telemetry.reported and all(value.grad is None for value in bank.params.values())
    assert all(torch.equal(p.grad, g) for p, g in zip(host.parameters(), alone, strict=True) if p.grad is not None)
    host.zero_grad()
    y = case.example.y().requires_grad_()
    _run(bank, x, y.detach()).square().sum().backward()
    assert all(p.grad is None for p in host.parameters()) and y.grad is None
    assert all(value.grad is not None for value in bank.params.values())
    switch.detach()


@whole_site
def test_merging_leaves_the_random_streams_and_the_branch_alone(case: Case, unchanged_rng: None) -> None:
    rng = torch.get_rng_state()
    host, bank = case.example.layers(), case.bank()
    torch.set_rng_state(rng)
    before = {name: value.clone() for name, value in bank.params.items()}
    if case.example.geometry.kind.is_span:
        bank.plan.merge(parts_of(host), bank.params, bank.buffers, case.example.geometry)
    else:
        _exported(case, host[0], bank)
    assert all(torch.equal(bank.params[name], value) for name, value in before.items())


@several
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_stacked_slots_equal_the_same_branches_one_by_one(case: Case, training: bool) -> None:
    bank, x, y = case.bank(), case.example.x(), case.example.y()
    alpha = torch.tensor([0.25, 1.0, 0.0])
    assert bank.columns is not None
    alone = torch.zeros(case.example.y_shape)
    ones: list[Bank] = []
    for slot in range(case.slots):
        one = make_bank(case.blueprint, case.example, slots=1, whole=False)
        one.columns = bank.columns[slot : slot + 1]
        one._flat_columns = one.columns.reshape(-1)
        one.params = {name: value[slot : slot + 1].clone() for name, value in bank.params.items()}
        one.buffers = {name: value[slot : slot + 1].clone() for name, value in bank.buffers.items()}
        own, read = alpha[slot : slot + 1], one.pick(x, y)
        alone = one.scatter(alone, one.branch(read, alpha=own, training=training, generator=None))
        ones.append(one)
    stacked = bank.scatter(
        torch.zeros(case.example.y_shape), bank.branch(bank.pick(x, y), alpha=alpha, training=training, generator=None)
    )
    torch.testing.assert_close(stacked, alone, atol=1e-6, rtol=1e-5)
    for name, value in bank.buffers.items():
        torch.testing.assert_close(value, torch.cat([one.buffers[name] for one in ones]))


@every_case
def test_gradients_agree_with_finite_differences(case: Case) -> None:
    bank = make_bank(case.blueprint, case.example, slots=case.slots, units=2)
    small = bank.pick(case.example.x(), case.example.y())[:2]
    if case.example.geometry.kind.is_conv:
        small = small[(slice(None), slice(None), *[slice(4)] * (small.dim() - 2))]
    x = small.double() if small.is_floating_point() else small
    x.requires_grad_(small.is_floating_point())
    names = list(bank.params)
    values = [bank.params[name].double().requires_grad_() for name in names]
    alpha = torch.linspace(0.5, 1.0, case.slots).double().requires_grad_()
    buffers = {name: value.double() for name, value in bank.buffers.items()}

    def run(x: Tensor, alpha: Tensor, *values: Tensor) -> Tensor:
        params = dict(zip(names, values, strict=True))
        own = {name: value.clone() for name, value in buffers.items()}
        h = bank.plan.hidden(params, own, x, bank.geometry, training=True, generator=None)
        return bank.plan.project(params, h, bank.geometry, alpha=alpha)

    assert torch.autograd.gradcheck(run, (x, alpha, *values), fast_mode=True, atol=1e-4)


@every_case
def test_frozen_copies_share_nothing(case: Case) -> None:
    bank, x, y = case.bank(), case.example.x(), case.example.y()
    bank.set_learning(True)
    bank.alpha.fill_(1.0)
    twin = bank.frozen_copy()
    before = _run(twin, x, y)
    assert not before.requires_grad and not twin.learning and not twin.moments.first
    with torch.no_grad():
        for value in (*bank.params.values(), *bank.buffers.values()):
            value.add_(1.0)
    bank.alpha.zero_()
    bank.bad_steps += 1
    assert torch.equal(_run(twin, x, y), before)
    assert bool((twin.alpha == 1).all()) and int(twin.bad_steps) == 0


WIDER = [c for c in CASES if c.bank().plan.port is Port.INPUT and c.example.x().is_floating_point()]


@pytest.mark.parametrize("case", WIDER, ids=lambda case: case.id)
def test_reading_more_features_changes_nothing_until_it_learns(case: Case) -> None:
    bank, x = case.bank(), case.example.x()
    before, reads = _run(bank, x, x), bank.reads
    bank.set_learning(True)
    bank.widen_reads(0)
    assert bank.reads == reads
    bank.widen_reads(2)
    axis = case.example.geometry.feature_axis
    shape = list(x.shape)
    shape[axis] = 2
    wide = torch.cat([x, torch.randn(shape)], dim=axis)
    assert bank.reads == reads + 2
    out = _run(bank, wide, wide)
    torch.testing.assert_close(out, before, atol=1e-6, rtol=1e-5)
    out.square().sum().backward()
    assert all(value.grad is not None for value in bank.params.values())


@every_case
def test_random_weights_come_from_the_given_generator_alone(case: Case, unchanged_rng: None) -> None:
    one, two, other = case.bank(seed=3), case.bank(seed=3), case.bank(seed=4)
    assert all(torch.equal(one.params[name], two.params[name]) for name in one.params)
    assert any(not torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert set(one.params) <= set(one.plan.axes) or not one.plan.absorbs
    assert set(one.buffers) <= set(one.plan.buffer_axes) or not one.plan.absorbs
    assert one.plan.output_names()
