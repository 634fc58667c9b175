"""Growth of single layers at export: several blueprints on one layer, layers that spans have widened, whole files."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.example_sites import attached, plant, settle
from tests.span_hosts import FusedGatedFfn, GatedFfn, Gpt2Mlp
from torch import Tensor, fx, nn

from esper.errors import ExportError
from esper.export import check_equal, grown_sites, merged, structure
from esper.kasmina.execution import Kasmina

pytestmark = pytest.mark.component


def _grow(kasmina: Kasmina, site: str, *blueprints: str) -> None:
    for number, blueprint in enumerate(blueprints, 1):
        plant(kasmina, site, blueprint, cohort=number)
        settle(kasmina, site, cohort=number)


X = torch.randn(5, 4, 6)


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 6), nn.LayerNorm(6, bias=False))


@pytest.mark.parametrize(
    "blueprints",
    [("affine", "low_rank"), ("low_rank", "affine", "low_rank"), ("affine", "affine"), ("attention", "affine"),
     ("affine", "attention", "attention", "low_rank")],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("site", ["0", "2"])
def test_several_blueprints_on_one_layer_are_exported_as_they_ran(site: str, blueprints: tuple[str, ...]) -> None:
    model = _net()
    kasmina = attached(model, X, layers=True)
    _grow(kasmina, site, *blueprints)
    plain = merged(model, kasmina)
    torch.testing.assert_close(plain(X), model(X), atol=1e-5, rtol=1e-5)
    beside = isinstance(plain.get_submodule(site), fx.GraphModule)
    assert beside == ("attention" in blueprints)


def test_a_bias_is_added_where_a_shift_needs_one() -> None:
    model = _net()
    kasmina = attached(model, X, layers=True)
    _grow(kasmina, "0", "affine")
    _grow(kasmina, "3", "affine")
    plain = merged(model, kasmina)
    assert plain[0].bias is not None and plain[3].bias is not None and model[0].bias is None
    torch.testing.assert_close(plain(X), model(X), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("blueprint", ["affine", "low_rank", "attention"])
@pytest.mark.parametrize("site", ["0", "2"])
def test_a_layer_that_a_span_has_widened_keeps_both(site: str, blueprint: str) -> None:
    model = _net()
    kasmina = attached(model, X, layers=True)
    _grow(kasmina, "0-2", "bottleneck")
    _grow(kasmina, site, blueprint)
    plain = merged(model, kasmina)
    torch.testing.assert_close(plain(X), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blueprint", ["affine", "low_rank", "depthwise_conv"])
@pytest.mark.parametrize("site", ["0", "1", "3"])
def test_the_same_on_convolutions(site: str, blueprint: str) -> None:
    if site == "1" and blueprint != "affine":
        return
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2))
    x = torch.randn(3, 2, 7, 7)
    model(x)
    model.eval()
    kasmina = attached(model, x, layers=True)
    _grow(kasmina, "0-3", "bottleneck_conv")
    _grow(kasmina, site, blueprint)
    plain = merged(model, kasmina)
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)


class Fused(FusedGatedFfn):
    """Without a bias in the layer that makes both factors, so that a shift has to add one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12, bias=False)


@pytest.mark.parametrize("blueprint", ["affine", "low_rank", "attention"])
@pytest.mark.parametrize(
    ("host", "span", "site"),
    [
        (FusedGatedFfn, "proj-out", "proj"),
        (FusedGatedFfn, "proj-out", "out"),
        (Fused, "proj-out", "proj"),
        (GatedFfn, "gate_proj-down_proj", "gate_proj"),
        (GatedFfn, "gate_proj-down_proj", "up_proj"),
        (GatedFfn, "gate_proj-down_proj", "down_proj"),
        (Gpt2Mlp, "c_fc-c_proj", "c_fc"),
        (Gpt2Mlp, "c_fc-c_proj", "c_proj"),
    ],
)
@pytest.mark.parametrize("columns", [None, torch.tensor([[1, 3]])], ids=["whole", "two-columns"])
def test_the_same_on_gated_spans_and_on_transposed_layers(
    host: type[nn.Module], span: str, site: str, blueprint: str, columns: Tensor | None
) -> None:
    model, x = host(), torch.randn(3, 5, 8)
    kasmina = attached(model, x, layers=True)
    _grow(kasmina, span, "bottleneck" if host is Gpt2Mlp else "gated")
    plant(kasmina, site, blueprint, columns=columns)
    settle(kasmina, site)
    plain = merged(model, kasmina)
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)
    told = check_equal(model, plain, _loss, x, tolerance=1e-4, plans=grown_sites(kasmina))
    assert site in told.layers and max(told.layers.values()) < 1e-5


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("blueprint", ["affine", "low_rank", "depthwise_conv"])
def test_and_on_convolutions_of_other_dimensions(dims: int, blueprint: str) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(conv(2, 4, 3, padding=1), nn.ReLU(), conv(4, 3, 3, stride=2))
    x = torch.randn(3, 2, *[5] * dims)
    kasmina = attached(model, x, layers=True)
    _grow(kasmina, "0-2", "bottleneck_conv")
    for site in ("0", "2"):
        _grow(kasmina, site, blueprint, "low_rank")
    plain = merged(model, kasmina)
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_the_difference_of_each_grown_layer_is_told() -> None:
    model = _net()
    kasmina = attached(model, X, layers=True)
    _grow(kasmina, "2", "low_rank")
    plain = merged(model, kasmina)
    exact = check_equal(model, plain, _loss, X, tolerance=1e-4, plans=grown_sites(kasmina))
    assert set(exact.layers) == {"2"} and exact.layers["2"] < 1e-6
    with torch.no_grad():
        plain[2].weight.add_(0.01)
    worse = check_equal(model, plain, _loss, X, tolerance=1.0, plans=grown_sites(kasmina))
    assert worse.layers["2"] > 1e-3


def test_structure_counts_the_branches_beside_a_layer() -> None:
    model = _net()
    kasmina = attached(model, X, layers=True)
    _grow(kasmina, "2", "attention", "affine")
    _grow(kasmina, "3", "affine")
    assert structure(merged(model, kasmina), kasmina) == {"2": {"branches": 2}, "3": {}}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("site", ["layer.norm1", "layer.self_attn"])
def test_torchs_own_transformer_layer_takes_what_folds_and_refuses_the_rest(site: str) -> None:
    model = Encoder().eval()
    kasmina = attached(model, X, layers=True)
    _grow(kasmina, site, "affine")
    plain = merged(model, kasmina)
    check_equal(model, plain, _loss, X, tolerance=1e-4, plans=grown_sites(kasmina))
    _grow(kasmina, site, "attention")
    with pytest.raises(ExportError, match=r"must be used by calling it.*grow 'affine' or 'low_rank' there"):
        check_equal(model, merged(model, kasmina), _loss, X, tolerance=1e-4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        zeros = torch.zeros(1, x.shape[0], 5)
        out, (h, _) = self.lstm(x, hx=(zeros, zeros))
        return F.relu(out).mean(1) + h[0]


def test_a_recurrent_layer_with_branches_is_called_as_before_and_can_be_trained_and_saved() -> None:
    model = Recurrent()
    kasmina = attached(model, X, layers=True)
    _grow(kasmina, "lstm", "low_rank", "affine", "attention")
    plain = merged(model, kasmina)
    torch.testing.assert_close(plain(X), model(X), atol=1e-6, rtol=1e-5)
    plain(X).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    assert plain.lstm.hidden_size == 5, "plain settings can still be read"
    saved = io.BytesIO()
    torch.save(plain.lstm, saved)
    saved.seek(0)
    again = torch.load(saved, weights_only=False)
    assert torch.equal(again(X)[0], plain.lstm(X)[0])
