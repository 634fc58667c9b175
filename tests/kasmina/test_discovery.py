"""Sites are found by themselves in ordinary models, and what cannot grow is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.config import SitesConfig
from esper.errors import SiteError
from esper.kasmina.discovery import Discovery, SitePlan, discover
from esper.kasmina.geometry import Activation
from esper.protocol import SiteKind

pytestmark = pytest.mark.component


def _find(model: nn.Module, *inputs: Tensor, **config: Any) -> Discovery:
    return discover(model.eval(), lambda: model(*inputs), SitesConfig(**config))


def _only(found: Discovery) -> SitePlan:
    assert len(found.sites) == 1, [plan.info.name for plan in found.sites]
    return found.sites[0]


def _reasons(found: Discovery) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in found.skipped}


class Block(nn.Module):
    """A transformer FFN in functional style, with a residual and a pre-norm."""

    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(self.norm(x)), approximate="tanh")
        return x + self.down(F.dropout(h, 0.25, self.training))


class Residual(nn.Module):
    """conv, norm, ReLU, conv beside an identity."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(x[:, :, :: self.conv1.stride[0], :: self.conv1.stride[1]] + h)


def test_sequential() -> None:
    plan = _only(_find(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)))
    assert plan.info.name == "0-2" and plan.info.kind is SiteKind.LINEAR_SPAN
    assert (plan.info.in_features, plan.info.hidden_features, plan.info.out_features) == (3, 5, 2)
    assert plan.info.weights == 3 * 5 + 5 + 5 * 2 + 2 and plan.info.num_chunks == 2
    assert plan.geometry.activation == Activation("tanh") and plan.geometry.head_bias
    assert plan.norm_name is None and plan.upstream is None


def test_a_functional_transformer_ffn() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()]), "head": nn.Linear(8, 3)})
    x = torch.randn(2, 5, 8)
    found = discover(model.eval(), lambda: model["head"](model["blocks"][1](model["blocks"][0](x))), SitesConfig())  # type: ignore[index]
    assert [plan.info.name for plan in found.sites] == ["blocks.0.up-down", "blocks.1.up-down"]
    plan = found.sites[1]
    assert plan.geometry.activation == Activation("gelu", (("approximate", "tanh"),))
    assert plan.geometry.dropout == 0.25 and not plan.geometry.head_bias
    assert plan.parent is model["blocks"][1], "the list is never called, the block is"  # type: ignore[index]
    assert "head" in _reasons(found)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_residual_block(stride: int) -> None:
    plan = _only(_find(nn.Sequential(Residual(stride)), torch.randn(2, 4, 8, 8)))
    assert plan.info.name == "0.conv1-conv2" and plan.info.kind is SiteKind.CONV_SPAN
    assert plan.norm_name == "0.bn1" and plan.geometry.norm is not None and plan.geometry.norm.affine
    assert plan.geometry.head_conv is not None and plan.geometry.head_conv.stride == (stride, stride)
    assert plan.geometry.activation == Activation("relu")


def test_chained_spans_know_their_upstream() -> None:
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(5, 2)]
    found = _find(nn.Sequential(*layers), torch.randn(4, 3))
    assert [(plan.info.name, plan.upstream) for plan in found.sites] == [("0-2", None), ("2-6", "0-2")]
    assert found.sites[1].geometry.dropout == pytest.approx(0.75)
    assert found.sites[1].head is found.sites[0].tail


def test_ends_in_different_modules_share_the_innermost_one_that_runs() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2)))
    plan = _only(_find(model, torch.randn(4, 3)))
    assert plan.info.name == "0.0-1.0" and plan.parent is model


class _Span(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "layer-norm": (lambda h: F.relu(F.layer_norm(h, (6,))), "'layer_norm'"),
    "after": (lambda h: F.layer_norm(F.relu(h), (6,)), "'layer_norm'"),
    "scaled": (lambda h: F.relu(h) * 2.0, "'mul'"),
    "softmax": (lambda h: torch.softmax(h, -1), "'softmax'"),
    "two-activations": (lambda h: torch.tanh(F.relu(h)), "'tanh'"),
    "dropout-first": (lambda h: F.relu(F.dropout(h, 0.5, False)), "'dropout'"),
    "none": (lambda h: h, "without an activation"),
    "gated": (lambda h: h * torch.sigmoid(h), "read 2 times"),
    "edited": (lambda h: F.relu(h).mul_(2.0), "'mul'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_branch_cannot_repeat_is_refused_with_the_reason(name: str) -> None:
    between, reason = REFUSED[name]
    model = nn.Sequential(_Span(between), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    found = _find(model, torch.randn(5, 4))
    assert "0.first-0.second" not in {plan.info.name for plan in found.sites} and len(found.sites) == 1
    assert reason in _reasons(found)["0.first"]


class _Kept(nn.Module):
    """The hidden layer is read again later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x), inplace=True)
        return torch.relu(self.b(h)) + self.c(h)


def test_a_hidden_layer_with_two_readers_opens_no_span() -> None:
    with pytest.raises(SiteError, match="a: its output is read 2 times"):
        _find(_Kept(), torch.randn(2, 3))


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[4].weight = model[2].weight
    return model


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight.requires_grad_(False)
    return model


def _parametrised() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[2])
    return model


def _shared() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), layer)


class _Repeat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


def test_a_layer_that_runs_twice_is_skipped() -> None:
    model = nn.Sequential(_Repeat(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    found = _find(model, torch.randn(3, 4))
    assert _only(found).info.name == "1-3" and _reasons(found)["0.layer"] == "runs 2 times a forward"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_tied, "tied to 0.4.weight"),
        (_shared, "tied to 0.4.weight"),
        (_frozen, "frozen"),
        (_parametrised, "parametrised ("),
    ],
)
def test_unusable_weights_are_skipped_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    found = _find(model, torch.randn(3, 4))
    assert [plan.info.name for plan in found.sites] == ["1-3"]
    assert reason in _reasons(found)["0.2"]
    assert _reasons(found)["0.0"] == "leads to a layer that cannot end a span"


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), "groups=2"),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(4, 8, 3, padding="same"), "padding='same'"),
    ],
)
def test_other_convolutions_are_skipped(conv: nn.Conv2d, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), conv)
    found = _find(model, torch.randn(2, 4, 6, 6))
    assert _only(found).info.name == "0-2" and reason in _reasons(found)["4"]


def test_multi_head_attention_is_left_alone() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.ffn = nn.MultiheadAttention(8, 2, batch_first=True), Block()
            self.unused = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x + self.attention(x, x, x, need_weights=False)[0])

    found = _find(Layer().train(), torch.randn(2, 5, 8))
    assert _only(found).info.name == "ffn.up-down"
    assert "NonDynamicallyQuantizableLinear" in _reasons(found)["attention.out_proj"]
    assert _reasons(found)["unused"] == "did not run in the probe forward"


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "relu": (nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, torch.relu_, lambda h: h.relu()),
    "gelu": (nn.GELU(), nn.GELU("tanh"), F.gelu),
    "silu": (nn.SiLU(), F.silu),
    "tanh": (nn.Tanh(), torch.tanh, lambda h: h.tanh()),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "leaky_relu": (nn.LeakyReLU(0.3), lambda h: F.leaky_relu(h, 0.2)),
    "elu": (nn.ELU(0.5), F.elu),
    "selu": (nn.SELU(), torch.selu),
    "celu": (nn.CELU(2.0), F.celu),
    "mish": (nn.Mish(), F.mish),
    "hardswish": (nn.Hardswish(), F.hardswish),
    "relu6": (nn.ReLU6(), F.relu6),
    "softplus": (nn.Softplus(2.0, 10.0), F.softplus, lambda h: F.softplus(h, beta=3.0)),
    "hardtanh": (nn.Hardtanh(-0.2, 0.4), F.hardtanh),
    "softsign": (nn.Softsign(), F.softsign),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_repeated_with_its_arguments(name: str) -> None:
    for activation in ACTIVATIONS[name]:
        plan = _only(_find(_Span(activation), torch.randn(5, 4)))
        assert plan.geometry.activation is not None
        assert plan.geometry.activation.name in (name, "hardtanh")  # torch.nn.ReLU6 is a Hardtanh
        h = torch.randn(50) * 3
        assert torch.equal(plan.geometry.activation(h.clone()), activation(h.clone()))


def test_every_known_activation_is_tested() -> None:
    from esper.kasmina.geometry import _ACTIVATIONS

    assert set(ACTIVATIONS) == set(_ACTIVATIONS)


# ----------------------------------------------------------------------------------------------------------------------
# Choosing


def _stack() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.ReLU())], nn.Linear(4, 2))


def test_include_and_exclude() -> None:
    x = torch.randn(2, 4)
    names = lambda **config: [plan.info.name for plan in _find(_stack(), x, **config).sites]  # noqa: E731
    assert names() == ["0-2", "2-4", "4-6", "6-8"]
    assert names(include=("0-*", "6-8")) == ["0-2", "6-8"]
    assert names(exclude=("[24]-*",)) == ["0-2", "6-8"]
    assert names(layers=True, include=("?",)) == ["0", "2", "4", "6", "8"]


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_names_near_ones(field: str) -> None:
    model, x = nn.ModuleDict({"blocks": nn.ModuleList([Block()])}), torch.randn(2, 3, 8)
    with pytest.raises(SiteError) as raised:
        discover(model.eval(), lambda: model["blocks"][0](x), SitesConfig(**{field: ("block.0.up-down",)}))  # type: ignore[index]
    assert "'block.0.up-down' matches none of 1 sites" in str(raised.value)
    assert "'blocks.0.up-down' (1)" in str(raised.value) and "'blocks.*' (1)" in str(raised.value)


def test_chunks_are_checked_against_the_features() -> None:
    assert _find(_stack(), torch.randn(2, 4), chunks=2).sites[0].info.num_chunks == 2
    with pytest.raises(SiteError, match=r"between 1 and out_features=2, got 3; pass chunks=2"):
        _find(_stack(), torch.randn(2, 4), chunks=3)


def test_nothing_to_grow_says_why() -> None:
    with pytest.raises(SiteError, match="no Linear or convolution layers"):
        _find(nn.Sequential(nn.Embedding(3, 4)), torch.tensor([1]))
    with pytest.raises(SiteError, match=r"0: its output is read 0 times.*SitesConfig\(layers=True\)"):
        _find(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))


def test_layers_are_sites_of_their_own() -> None:
    found = _find(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), layers=True)
    plan = _only(found)
    assert plan.info.kind is SiteKind.LINEAR_LAYER and plan.head is plan.tail and not found.skipped
    conv = _only(_find(nn.Sequential(nn.Conv2d(3, 2, 3)), torch.randn(2, 3, 5, 5), layers=True))
    assert conv.info.kind is SiteKind.CONV_LAYER and conv.geometry.head_conv == conv.geometry.tail_conv


def test_finding_leaves_the_model_as_it_was(unchanged_rng: None) -> None:
    rng = torch.get_rng_state()
    model = nn.Sequential(Residual())
    x = torch.randn(2, 4, 8, 8)
    torch.set_rng_state(rng)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _find(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
