"""A chunked layer is its base layer while nothing grows, and grows under the real Grower."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from tests.example_sites import attached, plant, settle
from tests.models import Batch, assert_same_state, mse, rows, same_bits
from tests.rigs import EVERY, Rig, attach, make_visible
from tests.span_hosts import Conv1D
from torch import Tensor, nn

import esper
from esper.compat import ChunkedKasminaLayer, connect, unwrap
from esper.compat.layer import _say_clamped
from esper.export import merged
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.defaults import default_blueprint
from esper.kasmina.strategies import STRATEGIES
from esper.protocol import Lifecycle, SiteKind

pytestmark = pytest.mark.component

S = Lifecycle
Wrap = Callable[[nn.Module], nn.Module]


def wrapped(layer: nn.Module) -> nn.Module:
    return ChunkedKasminaLayer(layer, 3)


def bare(layer: nn.Module) -> nn.Module:
    return layer


def dense(wrap: Wrap) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(wrap(nn.Linear(8, 6)), nn.ReLU(inplace=True), wrap(nn.Linear(6, 4)))


def convolutional(wrap: Wrap) -> nn.Module:
    torch.manual_seed(3)
    body = nn.Sequential(
        wrap(nn.Conv2d(3, 6, 3, padding=1)), nn.ReLU(inplace=True), wrap(nn.Conv2d(6, 5, 3, padding=1))
    )
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), wrap(nn.Linear(5, 4)))


def pictures(num: int) -> list[Batch]:
    source = torch.Generator().manual_seed(2)
    return [(torch.randn(4, 3, 5, 5, generator=source), torch.randn(4, 4, generator=source)) for _ in range(num)]


def rig_of(model: nn.Module, *, conv: bool = False, **settings: object) -> Rig:
    batches = pictures(10) if conv else rows(10)
    return attach(model, batches=batches, held_out=pictures(16) if conv else None, telemetry=EVERY, **settings)


def unprefixed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("base_layer.", ""): value for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Dormant


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("build", "conv"), [(dense, False), (convolutional, True)], ids=["dense", "convolutional"])
def test_dormant_is_the_base_layer_bit_for_bit(
    build: Callable[[Wrap], nn.Module], conv: bool, bf16: bool, deterministic: None
) -> None:
    """Outputs, gradients and weights over twelve steps, under a Grower that watches every step."""
    plain, chunked = build(bare), build(wrapped)
    assert_same_state(plain.state_dict(), unprefixed(chunked.state_dict()))
    rig = rig_of(chunked, conv=conv)
    optimizer = torch.optim.AdamW(plain.parameters(), 3e-3)
    for step in range(12):
        outputs, gradients = [], []
        for model, stepper in ((plain, optimizer), (chunked, rig.optimizer)):
            x, wanted = rig.batches[step % len(rig.batches)]
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = model(x)
            loss = (out.float() - wanted).square().mean()
            loss.backward()
            outputs.append(out)
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            stepper.step()
            stepper.zero_grad()
        rig.grower.step(loss)
        assert same_bits(*outputs)
        assert_same_state(gradients[0], unprefixed(gradients[1]))
        assert len(gradients[0]) == len(list(plain.parameters()))
    assert_same_state(plain.state_dict(), unprefixed(chunked.state_dict()))
    assert rig.grower.kasmina.params == sum(p.numel() for p in plain.parameters())


def test_the_base_layer_keeps_its_own_state() -> None:
    layer = nn.Linear(4, 5)
    chunked = ChunkedKasminaLayer(layer)
    assert chunked.base_layer is layer
    assert_same_state(chunked.base_layer.state_dict(), layer.state_dict())
    assert list(chunked.state_dict()) == ["base_layer.weight", "base_layer.bias"]
    other = ChunkedKasminaLayer(nn.Linear(4, 5))
    other.load_state_dict(chunked.state_dict())
    x = torch.randn(3, 4)
    assert same_bits(other(input=x), layer(x))


def test_chunks_are_clamped_to_the_features_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    _say_clamped.cache_clear()
    with caplog.at_level(logging.WARNING, logger="esper.compat"):
        layers = [ChunkedKasminaLayer(nn.Linear(4, 64)) for _ in range(3)]
        assert ChunkedKasminaLayer(nn.Conv2d(1, 7, 1), 7).num_chunks == 7, "as many as features is no clamp"
    assert [layer.num_chunks for layer in layers] == [64] * 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "chunks_per_layer must be at most the layer's 64 output features, got 1000; going on with 64, one a feature"
    )
    assert ChunkedKasminaLayer(nn.Linear(4, 3000)).chunk_manager.num_chunks == 1000
    assert tuple(ChunkedKasminaLayer(nn.Linear(4, 64), 10).state_tensor.shape) == (10, 4)


def test_chunk_manager_splits_this_layers_output() -> None:
    linear, conv = ChunkedKasminaLayer(nn.Linear(3, 8), 3), ChunkedKasminaLayer(nn.Conv2d(3, 8, 1), 3)
    y, image = linear(torch.randn(2, 5, 3)), conv(torch.randn(2, 3, 4, 4))
    assert [part.shape[-1] for part in linear.chunk_manager.split(y)] == [3, 3, 2]
    assert [part.shape[1] for part in conv.chunk_manager.split(image)] == [3, 3, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChunkedKasminaLayer(nn.ReLU()), "must have out_features or out_channels, got ReLU; wrap a Linear"),
        (lambda: ChunkedKasminaLayer(wrapped(nn.Linear(2, 2))), "got ChunkedKasminaLayer; wrap a Linear"),
        (lambda: ChunkedKasminaLayer(nn.Linear(2, 2), 0), "chunks must be at least 1, got 0"),
        (lambda: ChunkedKasminaLayer(nn.Linear(2, 2), 1.5), "chunks must be a whole number, got 1.5"),  # type: ignore[arg-type]
        (lambda: ChunkedKasminaLayer(nn.LazyLinear(2)), "must know its shapes, got LazyLinear; run it once"),
        (lambda: ChunkedKasminaLayer(None), "got NoneType; wrap a Linear"),  # type: ignore[arg-type]
        (lambda: ChunkedKasminaLayer(nn.Linear(2, 2)).site, r"got none; call connect\(grower\) first"),
        (lambda: ChunkedKasminaLayer(nn.Linear(2, 2)).request_germination(0), r"call connect\(grower\) first"),
        (
            lambda: ChunkedKasminaLayer(nn.Linear(2, 2)).connect(rig_of(dense(bare)).grower),
            "in another model",
        ),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(esper.SiteError, match=message):
        make()


# ----------------------------------------------------------------------------------------------------------------------
# Under a Grower


def test_the_grower_finds_the_layers_and_their_chunks() -> None:
    rig = rig_of(dense(wrapped), sites=esper.SitesConfig(chunks=2))
    found = {site.name: (site.kind, site.num_chunks) for site in rig.grower.sites()}
    assert found == {
        "0.base_layer-2.base_layer": (SiteKind.LINEAR_SPAN, 3),
        "0.base_layer": (SiteKind.LINEAR_LAYER, 3),
    }, "a span where one ends at the layer, else the layer itself"
    assert connect(rig.grower) == {"0": "0.base_layer", "2": "0.base_layer-2.base_layer"}
    untouched = rig_of(dense(bare), sites=esper.SitesConfig(chunks=2))
    assert [(site.name, site.num_chunks) for site in untouched.grower.sites()] == [("0-2", 2)]


class Mixed(nn.Module):
    """Layers of every other kind, each in a wrapper, and one norm that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ChunkedKasminaLayer(nn.Embedding(9, 6), 2)
        self.mix = ChunkedKasminaLayer(nn.MultiheadAttention(6, 2, batch_first=True), 3)
        self.norm = ChunkedKasminaLayer(nn.LayerNorm(6), 6)
        self.reader = ChunkedKasminaLayer(nn.GRU(6, 4, batch_first=True), 4)
        self.last = nn.LayerNorm(4)
        self.out = ChunkedKasminaLayer(Conv1D(5, 4), 5)
        self.channels = ChunkedKasminaLayer(nn.GroupNorm(1, 3), 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = self.norm(x + self.mix(x, x, x, need_weights=False)[0])
        return self.channels(self.out(self.last(self.reader(x)[0])))


def test_norms_embeddings_attention_and_recurrent_layers_name_their_chunks_too() -> None:
    model, ids = Mixed(), torch.randint(9, (2, 3))
    kasmina = attached(model, ids)
    assert {name: (site.info.kind, site.info.num_chunks) for name, site in kasmina.sites.items()} == {
        "table.base_layer": (SiteKind.EMBEDDING_LAYER, 2),
        "mix.base_layer": (SiteKind.ATTENTION_LAYER, 3),
        "norm.base_layer": (SiteKind.NORM_LAYER, 6),
        "reader.base_layer": (SiteKind.RECURRENT_LAYER, 4),
        "out.base_layer": (SiteKind.LINEAR_LAYER, 5),
        "channels.base_layer": (SiteKind.CHANNEL_NORM_LAYER, 3),
    }, "what is not in a wrapper is no site by itself"
    before = model(ids)
    for name in kasmina.sites:
        plant(kasmina, name, default_blueprint(kasmina.sites[name].info.kind), columns=torch.tensor([[1]]))
        settle(kasmina, name)
    assert model(ids).shape == before.shape and not same_bits(model(ids), before)
    plain = unwrap(merged(model, kasmina))
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-5, atol=1e-6)
    y = model.table(ids)
    assert [part.shape[-1] for part in model.table.chunk_manager.split(y)] == [3, 3]
    assert model.channels.chunk_manager.dim == 1 and model.out.chunk_manager.dim == -1


def test_a_single_layer_is_a_model_too() -> None:
    model = ChunkedKasminaLayer(nn.Linear(8, 4), 2)
    rig = rig_of(model)
    assert connect(rig.grower) == {"": "base_layer"}
    assert rig.grower.sites()[0].num_chunks == 2


def test_an_excluded_layer_says_so() -> None:
    rig = rig_of(dense(wrapped), sites=esper.SitesConfig(exclude=("0.base_layer",)))
    with pytest.raises(esper.SiteError, match=r"'0.base_layer' ends none \(it is excluded\); see grower.sites\(\)"):
        connect(rig.grower)


def test_a_layer_that_cannot_grow_says_why() -> None:
    model = dense(wrapped)
    model[0].requires_grad_(False)  # type: ignore[index]
    rig = rig_of(model)
    with pytest.raises(esper.SiteError, match=r"'0.base_layer' ends none \(frozen \(requires_grad is False\)\)"):
        connect(rig.grower)


def test_requests_become_seeds_that_the_state_shows() -> None:
    model = dense(wrapped)
    rig = rig_of(model)
    layer = model[2]  # type: ignore[index]
    assert isinstance(layer, ChunkedKasminaLayer)
    connect(rig.grower)
    rig.train(2)
    assert layer.state_tensor.tolist() == [[0, -1, 0, -1]] * 3
    assert layer.request_germination(1, "bottleneck", "drift_controlled")
    assert layer.request_germination(2, BLUEPRINTS.code("bottleneck"))
    rig.train()
    state = layer.state_tensor
    assert state.dtype == torch.int32 and state[0].tolist() == [0, -1, 0, -1]
    bottleneck = BLUEPRINTS.code("bottleneck")
    assert state[1].tolist()[1::2] == [bottleneck, STRATEGIES.code("drift_controlled")]
    assert state[2].tolist()[1::2] == [bottleneck, STRATEGIES.code("fixed_ramp")]
    assert (state[1:, 0] >= S.GERMINATED).all()
    assert not layer.request_germination(1), "it has a seed"
    for outside in (-1, 3):
        with pytest.raises(esper.SiteError, match=f"seed_id must be between 0 and 2, got {outside}"):
            layer.request_germination(outside)
    assert not rig.refused()


@pytest.mark.e2e
def test_it_grows_through_the_real_gates_and_unwraps_to_a_plain_model() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(ChunkedKasminaLayer(nn.Linear(8, 2)), nn.GELU(), ChunkedKasminaLayer(nn.Linear(2, 4), 4))
    rig = attach(
        model, torch.optim.AdamW(model.parameters(), 1e-2), batches=rows(20, size=64),
        held_out=rows(32, seed=7, size=64),
        graft=esper.GraftConfig(ramp_steps=40, stabilize_steps=10, fine_tune_steps=20, warmup_steps=10),
    )  # fmt: skip
    rig.train(100)
    sites = connect(rig.grower)
    cohort = rig.germinate(sites["2"], start="random_zero", width=24)
    layer = model[2]
    assert isinstance(layer, ChunkedKasminaLayer)
    seen = set()
    for _ in range(600):
        rig.train()
        seen.add(int(layer.state_tensor[0, 0]))
        if not rig.grower.kasmina.cohorts:
            break
    (verdict,) = rig.grower.verdicts
    assert verdict.cohort == cohort.number and verdict.state is S.FOSSILIZED, verdict
    assert {S.GRAFTING, S.STABILIZATION, S.FINE_TUNING, S.DORMANT} <= seen
    rig.grower.finish()
    exported = rig.grower.export()
    x = rig.batches[0][0]
    plain = unwrap(exported)
    assert isinstance(plain, nn.Sequential) and [type(part) for part in plain] == [nn.Linear, nn.GELU, nn.Linear]
    assert plain[0].out_features == plain[2].in_features == 26  # type: ignore[union-attr]
    torch.testing.assert_close(plain(x), rig.model(x), rtol=1e-5, atol=1e-6)


def test_seeds_of_chunks_change_their_own_columns_only() -> None:
    model = dense(wrapped)
    rig = rig_of(model)
    layer = model[2]  # type: ignore[index]
    assert isinstance(layer, ChunkedKasminaLayer)
    connect(rig.grower)
    rig.train(2)
    x = rig.batches[0][0]
    cohort = rig.germinate(layer.site, chunks=(1,), start="random_zero")
    rig.until(cohort, S.GRAFTING)
    make_visible(rig.bank(cohort))
    with torch.no_grad():
        grown = layer.chunk_manager.split(model(x))
        rig.grower.kasmina.set_alpha(cohort, 0.0)
        host = layer.chunk_manager.split(model(x))
    assert [same_bits(one, two) for one, two in zip(grown, host, strict=True)] == [True, False, True]


def test_copies_leave_the_grower_behind() -> None:
    model = dense(wrapped)
    rig = rig_of(model)
    connect(rig.grower)
    rig.train()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layer = twin[2]
        assert isinstance(layer, ChunkedKasminaLayer) and layer._grower is None
        assert layer.state_tensor.tolist() == [[0, -1, 0, -1]] * 3
        assert same_bits(twin(rig.batches[0][0]), model(rig.batches[0][0]))


def test_unwrap_keeps_everything_else() -> None:
    model = convolutional(wrapped)
    plain = unwrap(copy.deepcopy(model))
    assert not any(isinstance(module, ChunkedKasminaLayer) for module in plain.modules())
    assert_same_state(plain.state_dict(), unprefixed(model.state_dict()))
    assert list(plain.state_dict()) == list(convolutional(bare).state_dict())
    inner = nn.Linear(2, 2)
    assert unwrap(ChunkedKasminaLayer(inner)) is inner
    assert mse(plain, pictures(1)[0]).isfinite()
