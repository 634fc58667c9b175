"""Spans of every kind in the shapes that people write them in; what only looks like one is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.span_hosts import (
    BASIC,
    BOTTLENECK,
    CONV_1D,
    CONV_3D,
    BasicBlock,
    Conv1D,
    ConvNet,
    FusedGatedFfn,
    GatedFfn,
    Gpt2Mlp,
    SpanHost,
)
from torch import Tensor, nn

from esper.config import SitesConfig
from esper.errors import SiteError
from esper.kasmina.discovery import Discovery, SitePlan, discover, present_geometry
from esper.kasmina.geometry import Activation, GateGeometry
from esper.protocol import SiteKind

pytestmark = pytest.mark.component


def _find(model: nn.Module, *inputs: Tensor, layers: bool = False) -> Discovery:
    return discover(model.eval(), lambda: model(*inputs), SitesConfig(layers=layers))


def _only(found: Discovery) -> SitePlan:
    (plan,) = found.sites
    return plan


def _reasons(found: Discovery) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in found.skipped}


class Gate(nn.Module):
    """Three layers named a, b and c, joined as a test says; and a plain span behind them."""

    def __init__(self, join: Callable[[Gate, Tensor], Tensor], *, up: nn.Module | None = None, first: int = 6) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, first), up or nn.Linear(4, 6), nn.Linear(6, 3)
        self.join = join
        self.d, self.e = nn.Linear(3, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.e(torch.relu(self.d(self.c(self.join(self, x)).exp())))


def _gate_plan(found: Discovery) -> SitePlan | None:
    return next((plan for plan in found.sites if plan.info.kind is SiteKind.LINEAR_GATED_SPAN), None)


# ----------------------------------------------------------------------------------------------------------------------
# Gates


def test_a_swiglu() -> None:
    model = nn.Sequential(GatedFfn(6))
    plan = _only(found := _find(model, torch.randn(2, 5, 8)))
    assert plan.info.name == "0.gate_proj-down_proj" and plan.info.kind is SiteKind.LINEAR_GATED_SPAN
    assert (plan.info.in_features, plan.info.hidden_features, plan.info.out_features) == (8, 6, 4)
    assert plan.info.weights == 8 * 6 * 2 + 6 * 4 and not found.skipped
    assert plan.head is model[0].gate_proj and plan.up is model[0].up_proj and plan.up_name == "0.up_proj"  # type: ignore[union-attr]
    assert plan.parent is model[0] and plan.upstream is None
    assert plan.geometry.activation == Activation("silu") and plan.geometry.gate is not None
    assert not plan.geometry.gate.bias and not plan.geometry.gate.fused


def test_both_factors_start_on_their_own_scale_as_it_is_now() -> None:
    model = GatedFfn(6)
    plan = _only(_find(model, torch.randn(2, 8)))
    with torch.no_grad():
        model.up_proj.weight.mul_(7.0)
    now = present_geometry(plan)
    assert now.gate is not None and now.gate.std == pytest.approx(float(model.up_proj.weight.detach().std()))
    assert now.head_std == pytest.approx(float(model.gate_proj.weight.detach().std()))


FORMS: dict[str, Callable[[Gate, Tensor], Tensor]] = {
    "product-turned": lambda m, x: m.b(x) * F.gelu(m.a(x)),
    "torch.mul": lambda m, x: torch.mul(m.b(x), F.gelu(m.a(x))),
    "in-place": lambda m, x: F.gelu(m.a(x)).mul_(m.b(x)),
    "dropout": lambda m, x: F.dropout(F.gelu(m.a(x)) * m.b(x), 0.25, m.training),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_gate_in_other_words(form: str) -> None:
    plan = _gate_plan(_find(Gate(FORMS[form]), torch.randn(5, 4)))
    assert plan is not None and plan.info.name == "a-c" and plan.up_name == "b"
    assert plan.geometry.activation == Activation("gelu")
    assert plan.geometry.dropout == (0.25 if form == "dropout" else 0.0)


REFUSED: dict[str, tuple[Callable[[Gate, Tensor], Tensor], str]] = {
    "two activations": (lambda m, x: F.gelu(m.a(x)) * torch.tanh(m.b(x)), "something other than a layer's output"),
    "other input": (lambda m, x: F.gelu(m.a(x)) * m.b(x + 1.0), "something other than a layer's output"),
    "a parameter": (lambda m, x: F.gelu(m.a(x)) * m.scale, "something other than a layer's output"),
    "itself": (lambda m, x: F.gelu(m.a(x)).mul(m.a(x)), "runs 2 times"),
    "read again": (lambda m, x: (lambda u: F.gelu(m.a(x)) * u + u)(m.b(x)), "is read elsewhere too"),
    "no activation": (lambda m, x: m.a(x) * m.b(x), "'mul'"),
    "a sum": (lambda m, x: F.gelu(m.a(x)) + m.b(x), "'add'"),
    "a norm behind": (lambda m, x: F.layer_norm(F.gelu(m.a(x)) * m.b(x), (6,)), "'layer_norm'"),
    "twice": (lambda m, x: F.gelu(m.a(x)) * m.b(x) * m.scale, "'mul'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_looks_like_a_gate_is_refused(name: str) -> None:
    join, reason = REFUSED[name]
    found = _find(Gate(join), torch.randn(5, 4))
    assert [plan.info.name for plan in found.sites] == ["d-e"]
    assert reason in _reasons(found)["a"]


def _frozen() -> nn.Module:
    return nn.Linear(4, 6).requires_grad_(False)


class Linear4bit(nn.Linear):
    """A layer whose weight some library has packed into integers."""

    def __init__(self) -> None:
        super().__init__(4, 6)
        self.weight = nn.Parameter(torch.randint(-8, 8, (6, 4), dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize(
    ("up", "refusal", "reason"),
    [
        (_frozen, "a layer that cannot grow", "frozen"),
        (Linear4bit, "a layer that cannot grow", "quantised"),
        (lambda: nn.Linear(4, 1), "of another width", "opens no span"),
    ],
)
def test_a_gate_whose_other_factor_cannot_grow(up: Callable[[], nn.Module], refusal: str, reason: str) -> None:
    found = _find(Gate(lambda m, x: F.silu(m.a(x)) * m.b(x), up=up()), torch.randn(5, 4))
    assert _gate_plan(found) is None
    assert refusal in _reasons(found)["a"]
    assert reason in _reasons(found)["b"] or "'mul'" in _reasons(found)["b"]


def test_a_packed_layer_is_named_as_quantised() -> None:
    packed = type("Linear", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.linear"})()
    packed._packed_params = None
    packed.forward = lambda x: x
    found = _find(nn.Sequential(packed, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4))
    assert _only(found).info.name == "1-3" and _reasons(found)["0"].startswith("quantised")


def test_a_tied_factor_is_refused() -> None:
    model = Gate(lambda m, x: F.silu(m.a(x)) * m.b(x))
    model.b.weight = model.a.weight
    found = _find(model, torch.randn(5, 4))
    assert _gate_plan(found) is None and "tied to b.weight" in _reasons(found)["a"]


# ----------------------------------------------------------------------------------------------------------------------
# Fused gates


def _split(first: Callable[[Tensor, Tensor], Tensor], axis: int = -1) -> Callable[[Gate, Tensor], Tensor]:
    return lambda m, x: first(*m.a(x).chunk(2, dim=axis))


FUSED: dict[str, tuple[Callable[[Gate, Tensor], Tensor], str, bool]] = {
    "first half": (_split(lambda a, b: F.silu(a) * b), "silu", True),
    "second half": (_split(lambda a, b: a * F.gelu(b)), "gelu", False),
    "axis by number": (_split(lambda a, b: F.silu(a) * b, 1), "silu", True),
    "torch.chunk": (lambda m, x: (lambda a, b: a * b.tanh())(*torch.chunk(m.a(x), 2, -1)), "tanh", False),
    "glu": (lambda m, x: F.glu(m.a(x)), "sigmoid", False),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_gate_and_its_factor_in_one_layer(name: str) -> None:
    join, activation, gate_first = FUSED[name]
    plan = _gate_plan(_find(Gate(join, first=12), torch.randn(5, 4)))
    assert plan is not None and plan.info.name == "a-c" and plan.up is None
    assert plan.info.hidden_features == 6 and plan.geometry.activation == Activation(activation)
    assert plan.geometry.gate is not None
    assert plan.geometry.gate == GateGeometry(True, plan.geometry.gate.std, True, gate_first)


CUT: dict[str, tuple[Callable[[Gate, Tensor], Tensor], int, str]] = {
    "fixed sizes": (lambda m, x: (lambda a, b: F.silu(a) * b)(*m.a(x).split(6, -1)), 12, "'split'"),
    "no product": (_split(lambda a, b: F.silu(a) + b), 12, "not multiplied with each other"),
    "both activated": (_split(lambda a, b: F.silu(a) * torch.tanh(b)), 12, "not exactly one passes"),
    "none activated": (_split(lambda a, b: a * b), 12, "not exactly one passes"),
    "the batch": (_split(lambda a, b: (F.silu(a) * b).repeat(2, 1), 0), 6, "'chunk'"),
    "in three": (lambda m, x: (lambda a, b, c: F.silu(a) * b + c)(*m.a(x).chunk(3, -1)), 18, "'chunk'"),
}


@pytest.mark.parametrize("name", CUT)
def test_other_cuts_are_refused(name: str) -> None:
    join, width, reason = CUT[name]
    found = _find(Gate(join, first=width), torch.randn(4, 4))
    assert _gate_plan(found) is None and reason in _reasons(found)["a"]


def test_chains_through_gates_know_their_upstream() -> None:
    ffn = FusedGatedFfn(6)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), ffn, nn.ReLU(), nn.Linear(4, 2))
    found = _find(model, torch.randn(4, 3))
    assert [(plan.info.name, plan.upstream) for plan in found.sites] == [
        ("0-2.proj", None), ("2.proj-out", "0-2.proj"), ("2.out-4", "2.proj-out"),
    ]  # fmt: skip
    assert found.sites[0].parent is model


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2's layers


def test_gpt2s_layers_make_a_span_and_layers() -> None:
    found = _find(nn.Sequential(Gpt2Mlp(6)), torch.randn(2, 5, 8), layers=True)
    span, *layers = found.sites
    assert span.info.name == "0.c_fc-c_proj" and span.info.kind is SiteKind.LINEAR_SPAN
    assert (span.info.in_features, span.info.hidden_features, span.info.out_features) == (8, 6, 4)
    assert span.geometry.activation == Activation("gelu", (("approximate", "tanh"),)) and span.geometry.head_bias
    assert [(p.info.name, p.info.kind, p.info.in_features) for p in layers] == [
        ("0.c_fc", SiteKind.LINEAR_LAYER, 8), ("0.c_proj", SiteKind.LINEAR_LAYER, 6),
    ]  # fmt: skip


def _gelu_by_hand(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (h + 0.044715 * torch.pow(h, 3.0))))


def test_an_activation_made_of_several_operations_is_refused() -> None:
    model = nn.Sequential(Gpt2Mlp(6), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].forward = lambda x, m=model[0]: m.c_proj(_gelu_by_hand(m.c_fc(x)))
    found = _find(model, torch.randn(2, 8))
    assert "read 3 times" in _reasons(found)["0.c_fc"]
    assert "0.c_fc-c_proj" not in {plan.info.name for plan in found.sites}


def test_a_stranger_of_the_same_name_is_no_site() -> None:
    stranger = type("Conv1D", (nn.Module,), {"forward": lambda self, x: x})()
    found = _find(nn.Sequential(stranger, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 4))
    assert _only(found).info.name == "1-3" and not found.skipped


def test_tied_and_frozen_transposed_layers_are_refused() -> None:
    model = nn.Sequential(Conv1D(4, 4), nn.ReLU(), Conv1D(4, 4), nn.ReLU(), Conv1D(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight = model[2].weight
    model[4].weight.requires_grad_(False)
    with pytest.raises(SiteError, match=r"0: tied to 2\.weight; 2: tied to 0\.weight; 4: frozen"):
        _find(model, torch.randn(2, 4))


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions of every dimension, residual blocks


@pytest.mark.parametrize(("dims", "norm"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
def test_conv_norm_act_conv_in_every_dimension(dims: int, norm: type[nn.Module]) -> None:
    model = ConvNet(dims, 5)
    plan = _find(model, torch.randn(2, 3, *[6] * dims)).sites[0]
    assert plan.info.name == "conv1-conv2" and plan.info.kind is SiteKind.CONV_SPAN
    assert plan.norm_name == "norm" and isinstance(model.norm, norm)
    head, tail = plan.geometry.head_conv, plan.geometry.tail_conv
    assert head is not None and tail is not None
    assert head.kernel == (3,) * dims and tail.stride == (2,) * dims and tail.shrinkage == 2**dims
    assert head.taps == 3**dims


def test_uneven_kernels_keep_their_numbers() -> None:
    first = nn.Conv3d(2, 4, (3, 1, 5), (1, 2, 1), (1, 0, 2), (1, 1, 1))
    plan = _only(_find(nn.Sequential(first, nn.ReLU(), nn.Conv3d(4, 2, 1)), torch.randn(2, 2, 4, 4, 6)))
    conv = plan.geometry.head_conv
    assert conv is not None and (conv.kernel, conv.stride, conv.padding) == ((3, 1, 5), (1, 2, 1), (1, 0, 2))


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv1d(4, 4, 3, padding=1, groups=2), "groups=2"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Conv1d(4, 4, 3, padding="same"), "padding='same'"),
        (nn.Conv1d(4, 4, 3, padding=1).requires_grad_(False), "frozen"),
    ],
)
def test_other_convolutions_are_skipped(conv: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.ReLU(), conv)
    found = _find(model, torch.randn(2, 4, 6))
    assert _only(found).info.name == "0-2" and reason in _reasons(found)["4"]


def test_images_without_a_batch_axis_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1))
    with pytest.raises(SiteError, match="0: a convolution that is called on an input without a batch axis"):
        _find(model, torch.randn(3, 9))


def test_a_norm_behind_a_linear_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    found = _find(model, torch.randn(6, 4))
    assert _only(found).info.name == "3-5" and "'batch_norm'" in _reasons(found)["0"]


@pytest.mark.parametrize("host", [BASIC, BOTTLENECK, CONV_1D, CONV_3D], ids=lambda host: host.name)
def test_spans_of_whole_networks(host: SpanHost) -> None:
    found = _find(host.build(4), torch.randn(2, *host.x_shape))
    assert tuple(plan.info.name for plan in found.sites) == host.spans
    assert all(plan.norm_name is not None for plan in found.sites)


def test_spans_lie_inside_their_residual_block() -> None:
    model = BASIC.build(4)
    for plan in _find(model, torch.randn(2, 3, 6, 6)).sites:
        assert isinstance(plan.parent, BasicBlock) and plan.upstream is None
    chain = _find(BOTTLENECK.build(4), torch.randn(2, 3, 6, 6)).sites
    assert [plan.upstream for plan in chain] == [None, "blocks.0.conv1-conv2", None, "blocks.1.conv1-conv2"]
