"""GradMax, TINY and Net2Wider against answers known beforehand."""

from __future__ import annotations

import pytest
import torch
from tests.example_sites import EXAMPLES, Example, make_bank
from torch import Tensor, nn

from esper.config import FitConfig
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.geometry import Activation, Geometry
from esper.kasmina.starts import STARTS, HostUnits
from esper.kasmina.starts.correlation import by_slot, correlate, unit_inputs
from esper.protocol import SiteKind

pytestmark = pytest.mark.component

CONFIG = FitConfig()
CONVS = [e for e in EXAMPLES[SiteKind.CONV_SPAN] if e.geometry.norm is None]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _span(activation: str = "tanh", *, bias: bool = False) -> Geometry:
    return Geometry(
        kind=SiteKind.LINEAR_SPAN, in_features=5, out_features=6, hidden_features=7, head_bias=bias,
        activation=Activation(activation), head_std=0.4, tail_std=0.3,
    )  # fmt: skip


def _bank(geometry: Geometry, units: int, *, columns: Tensor | None = None) -> Bank:
    return Bank(
        "bottleneck", geometry, units=units, reads=5, columns=columns, generator=_generator(1),
        device=torch.device("cpu"),
    )  # fmt: skip


def _rows(x: Tensor, g: Tensor, batches: int = 4) -> Rows:
    index = torch.arange(len(x))
    return Rows(x, torch.ones_like(g), g, index, index % batches)


def _silent_host(geometry: Geometry) -> HostUnits:
    """A host whose hidden units are all zero: its layer can express nothing."""
    head = nn.Linear(5, 7, bias=geometry.head_bias)
    nn.init.zeros_(head.weight)
    if geometry.head_bias:
        nn.init.zeros_(head.bias)
    return HostUnits.of(head, None, nn.Linear(7, 6, bias=False), None)


def _linear_map(bank: Bank) -> Tensor:
    """The map (O, I) of a bank's units, linearised at zero."""
    return bank.params["w2"][0] @ bank.params["w1"][0]


# ---------------------------------------------------------------------------------------------------------- gradmax


def test_gradmax_finds_the_planted_direction_and_descends_along_it() -> None:
    a, b = torch.randn(6, generator=_generator(1)), torch.randn(5, generator=_generator(2))
    x = torch.randn(4000, 5, generator=_generator(3))
    g = (x @ b)[:, None] * a + 0.01 * torch.randn(4000, 6, generator=_generator(4))
    bank = _bank(_span(), 1)
    STARTS["gradmax"].prepare(bank, _rows(x, g), CONFIG, _generator())
    w2 = bank.params["w2"][0, :, 0]
    assert abs(float(torch.cosine_similarity(w2, a, dim=0))) > 0.999
    assert float(w2.norm()) == pytest.approx(0.3 * 6**0.5)  # as large as a host unit's
    assert not bank.params["w1"].any()
    bank.set_learning(True)
    out = bank.branch(x, alpha=torch.ones(1), training=True, generator=None)
    (grad,) = torch.autograd.grad((out * g).sum() / len(x), [bank.params["w1"]])
    step = -bank.params["w2"].detach()[0] @ grad[0]  # what one step of descent adds, up to the rate
    assert float(torch.cosine_similarity(step.flatten(), torch.outer(-a, b).flatten(), dim=0)) > 0.99


@pytest.mark.parametrize("units", [1, 3])
def test_no_out_weights_of_the_same_norm_give_a_larger_first_gradient(units: int) -> None:
    x = torch.randn(500, 5, generator=_generator(3)) * torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1])
    g = torch.tanh(x @ torch.randn(5, 6, generator=_generator(4))) + torch.randn(500, 6, generator=_generator(5))
    bank = _bank(_span(), units)
    STARTS["gradmax"].prepare(bank, _rows(x, g), CONFIG, _generator())

    def energy(w2: Tensor) -> float:
        return float((w2.t() @ (g.t() @ x)).square().sum())

    chosen = bank.params["w2"][0]
    for seed in range(50):
        other = torch.linalg.qr(torch.randn(6, units, generator=_generator(seed)))[0] * chosen[:, 0].norm()
        assert energy(other) <= energy(chosen) * (1 + 1e-5)


@pytest.mark.parametrize("example", CONVS, ids=[e.name for e in CONVS])
@pytest.mark.parametrize("slots", [1, 3])
def test_correlations_of_convolutions_are_the_gradients_of_in_weights_at_zero(example: Example, slots: int) -> None:
    """What GradMax maximises, from autograd: with in-weights of zero, dL/dw1 is w2 times the correlation."""
    from dataclasses import replace

    smooth = replace(example, geometry=replace(example.geometry, activation=Activation("tanh"), head_bias=False))
    bank = make_bank("bottleneck_conv", smooth, slots=slots, units=3)
    bank.params["w1"].zero_()
    x = smooth.x()
    g = torch.randn(smooth.y_shape, generator=_generator(9))
    bank.set_learning(True)
    out = bank.branch(x, alpha=torch.ones(slots), training=True, generator=None)
    wanted = g if bank.columns is None else g[:, bank.columns.flatten()]
    (grad,) = torch.autograd.grad((out * wanted).sum(), [bank.params["w1"]])
    matrix = by_slot(correlate(unit_inputs(x, smooth.geometry, constant=False), g, smooth.geometry), bank)
    w2 = bank.params["w2"].detach()  # (S, K, U, kh, kw)
    flat = w2.movedim(2, 1).flatten(2)  # (S, U, K * T)
    assert torch.allclose(flat @ matrix, grad.flatten(2), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- tiny


def test_tiny_recovers_a_linear_target_exactly_whatever_the_inputs_spread() -> None:
    wanted = torch.randn(6, 5, generator=_generator(1))
    mix = torch.diag(torch.tensor([5.0, 1.0, 1.0, 0.2, 0.05])) @ torch.linalg.qr(
        torch.randn(5, 5, generator=_generator(7))
    )[0]  # fmt: skip
    x = torch.randn(2000, 5, generator=_generator(3)) @ mix
    geometry = _span()
    bank = _bank(geometry, 5)
    STARTS["tiny"].prepare(bank, _rows(x, -x @ wanted.t()), CONFIG, _generator(), _silent_host(geometry))
    found = _linear_map(bank)
    assert torch.allclose(found / found.norm(), wanted / wanted.norm(), atol=1e-3)


def test_tinys_single_unit_is_the_best_rank_one_map() -> None:
    """Eckart-Young in the norm that the inputs induce."""
    wanted = torch.randn(6, 5, generator=_generator(1))
    spread = torch.tensor([4.0, 1.0, 1.0, 0.3, 0.1])
    x = torch.randn(20_000, 5, generator=_generator(3)) * spread
    geometry = _span()
    bank = _bank(geometry, 1)
    STARTS["tiny"].prepare(bank, _rows(x, -x @ wanted.t()), CONFIG, _generator(), _silent_host(geometry))
    u, _, v = torch.linalg.svd(wanted * spread)
    best = torch.outer(u[:, 0], v[0] / spread)
    found = _linear_map(bank)
    assert float(torch.cosine_similarity(found.flatten(), best.flatten(), dim=0)) > 0.99


def test_tinys_bias_follows_a_constant_target() -> None:
    geometry = _span(bias=True)
    x, shift = torch.randn(2000, 5, generator=_generator(3)), torch.randn(6, generator=_generator(1))
    bank = _bank(geometry, 1)
    STARTS["tiny"].prepare(bank, _rows(x, -shift.expand(2000, 6)), CONFIG, _generator(), _silent_host(geometry))
    out = bank.branch(torch.zeros(1, 5), alpha=torch.ones(1), training=False, generator=None)[0]
    assert float(torch.cosine_similarity(out, shift, dim=0)) > 0.999
    assert float(bank.params["w1"].abs().max()) < 0.2 * float(bank.params["b1"].abs().max())


@pytest.mark.parametrize("grown", [False, True])
def test_tiny_leaves_out_what_the_hosts_own_layer_can_do(grown: bool) -> None:
    geometry = _span()
    head, tail = nn.Linear(5, 7, bias=False), nn.Linear(7, 6)
    annex = _bank(geometry, 2) if grown else None
    host = HostUnits.of(head, None, tail, annex)
    x = torch.randn(4000, 5, generator=_generator(3))
    hidden = torch.tanh(x @ head.weight.detach().t())
    if annex is not None:
        hidden = torch.cat([hidden, annex.hidden(x, training=False, generator=None)], dim=1)
    within = hidden @ torch.randn(hidden.shape[1], 6, generator=_generator(4))
    a, b = torch.randn(6, generator=_generator(1)), torch.randn(5, generator=_generator(2))
    beyond = (x @ b).pow(3)[:, None] * a * 0.05
    bank = _bank(geometry, 1)
    STARTS["tiny"].prepare(bank, _rows(x, -(within + beyond)), CONFIG, _generator(), host)
    assert abs(float(torch.cosine_similarity(bank.params["w2"][0, :, 0], a, dim=0))) > 0.95


@pytest.mark.parametrize("example", CONVS, ids=[e.name for e in CONVS])
def test_tiny_lowers_the_loss_more_than_random_units_of_the_same_output(example: Example) -> None:
    geometry = example.geometry
    layers = example.layers()
    host = HostUnits.of(layers[0], None, layers[-1], None)
    x = torch.randn((96, *example.x_shape[1:]), generator=_generator(3))
    teacher = make_bank("bottleneck_conv", example, units=2, seed=5)
    g = -teacher.branch(x, alpha=torch.ones(1), training=False, generator=None)
    rows = Rows(x, torch.ones_like(g), g, torch.arange(96), torch.arange(96) % 4)
    bank = make_bank("bottleneck_conv", example, units=2)
    STARTS["tiny"].prepare(bank, rows, CONFIG, _generator(), host)

    def decrease(candidate: Bank) -> float:
        out = candidate.branch(x, alpha=torch.ones(1), training=False, generator=None)
        return float(-(out * g).sum() / out.norm())

    assert geometry.norm is None
    random = [decrease(make_bank("bottleneck_conv", example, units=2, seed=s)) for s in range(30, 50)]
    assert decrease(bank) > max(random)


# ------------------------------------------------------------------------------------------- rank, refusals, copies


@pytest.mark.parametrize("start", ["gradmax", "tiny"])
def test_units_beyond_the_rows_rank_start_random_in_and_zero_out(start: str) -> None:
    geometry = _span()
    x = torch.zeros(400, 5)
    x[:, 0] = torch.randn(400, generator=_generator(3))
    bank = _bank(geometry, 4)
    before = bank.params["w1"].clone()
    STARTS[start].prepare(bank, _rows(x, x[:, :1].expand(400, 6)), CONFIG, _generator(), _silent_host(geometry))
    w2 = bank.params["w2"][0]
    assert w2[:, 0].any() and not w2[:, 1:].any()
    assert torch.equal(bank.params["w1"][0, 1:], before[0, 1:])


@pytest.mark.parametrize(
    ("start", "columns", "reads", "cap"),
    [("gradmax", 6, 5, 5), ("gradmax", 4, 5, 4), ("tiny", 6, 5, 6), ("tiny", 4, 5, 4), ("tiny", 9, 5, 6)],
)
def test_rank_caps_of_linear_spans(start: str, columns: int, reads: int, cap: int) -> None:
    assert STARTS[start].max_units(_span(bias=True), columns=columns, reads=reads) == cap


def test_rank_caps_of_convolutions_count_taps() -> None:
    strided_tail = next(e for e in CONVS if e.name == "strided-tail").geometry
    assert STARTS["gradmax"].max_units(strided_tail, columns=2, reads=3) == 18  # 2 columns x 9 taps under 3 x 9
    assert STARTS["tiny"].max_units(strided_tail, columns=6, reads=3) == 28  # 3 x 9 and the bias
    assert STARTS["copy"].max_units(strided_tail, columns=1, reads=1) is None


@pytest.mark.parametrize("start", ["gradmax", "gradient_svd", "tiny"])
def test_where_the_algebra_does_not_hold_the_start_says_why(start: str) -> None:
    norm = EXAMPLES[SiteKind.CONV_SPAN][0].geometry
    refuse = STARTS[start].refusal
    assert "the norm inside this span" in (refuse("bottleneck_conv", norm) or "")
    assert "needs an activation that is 0 at 0, got sigmoid with 0.5" in (refuse("bottleneck", _span("sigmoid")) or "")
    layer = EXAMPLES[SiteKind.LINEAR_LAYER][0].geometry
    assert "got 'low_rank' on a linear_layer" in (refuse("low_rank", layer) or "")
    assert refuse("bottleneck", _span("relu")) is None
    assert "'low_rank'" in (STARTS["copy"].refusal("low_rank", layer) or "")


def test_copies_are_the_hosts_units_each_once_before_any_twice() -> None:
    example = EXAMPLES[SiteKind.CONV_SPAN][0]
    layers = example.layers()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    norm = layers[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    norm.running_mean.copy_(torch.arange(4.0))
    before["1.running_mean"] = norm.running_mean.clone()
    bank = make_bank("bottleneck_conv", example, units=6)
    STARTS["copy"].prepare(bank, None, CONFIG, _generator(), HostUnits.of(layers[0], norm, layers[-1], None))
    picked = bank.buffers["mean"][0].long()
    assert sorted(picked[:4].tolist()) == [0, 1, 2, 3]
    difference = bank.params["w1"][0] - layers[0].weight.detach()[picked]  # type: ignore[index]
    assert 0 < float(difference.abs().max()) < 5 * 0.1 * example.geometry.head_std
    assert not bank.params["w2"].any()
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
