"""Norms, embeddings, attention and recurrent layers as sites: found, refused with a reason, left alone, added to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.example_sites import attached, plant
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from esper.config import SitesConfig
from esper.kasmina.capture import Capture
from esper.kasmina.discovery import Discovery, discover
from esper.kasmina.execution import Kasmina
from esper.protocol import SiteKind

pytestmark = pytest.mark.component


class Host(nn.Module):
    """One module behind a Linear layer, called in a way of its own."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 6), layer
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, self.first(x))


def _first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def _attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(query=x, key=x, value=x)[0]


def _find(model: nn.Module, x: Tensor) -> Discovery:
    return discover(model.eval(), lambda: model(x).sum(), SitesConfig(layers=True))


SEQUENCES, IMAGES, ROWS = torch.randn(3, 4, 6), torch.randn(2, 3, 5, 6), torch.randn(5, 6)
FOUND: list[tuple[nn.Module, Any, Tensor, SiteKind, int | None]] = [
    (nn.LayerNorm(6), None, ROWS, SiteKind.NORM_LAYER, None),
    (nn.RMSNorm(6), None, SEQUENCES, SiteKind.NORM_LAYER, 1),
    (nn.BatchNorm1d(6), None, ROWS, SiteKind.CHANNEL_NORM_LAYER, None),
    (nn.BatchNorm1d(4), None, SEQUENCES, SiteKind.CHANNEL_NORM_LAYER, None),
    (nn.BatchNorm2d(3), None, IMAGES, SiteKind.CHANNEL_NORM_LAYER, None),
    (nn.BatchNorm3d(3), lambda m, x: m(x[..., None]), IMAGES, SiteKind.CHANNEL_NORM_LAYER, None),
    (nn.GroupNorm(3, 3), None, IMAGES, SiteKind.CHANNEL_NORM_LAYER, None),
    (nn.MultiheadAttention(6, 2, batch_first=True), _attend, SEQUENCES, SiteKind.ATTENTION_LAYER, 1),
    (nn.MultiheadAttention(6, 2), _attend, SEQUENCES, SiteKind.ATTENTION_LAYER, 0),
    (nn.LSTM(6, 4, 2), _first, SEQUENCES, SiteKind.RECURRENT_LAYER, 0),
    (nn.GRU(6, 5, bidirectional=True, batch_first=True), _first, SEQUENCES, SiteKind.RECURRENT_LAYER, 1),
    (nn.RNN(6, 5), _first, ROWS, SiteKind.RECURRENT_LAYER, None),
]


@pytest.mark.parametrize(("layer", "call", "x", "kind", "axis"), FOUND, ids=lambda v: getattr(v, "value", None))
def test_every_kind_is_found_with_its_sizes(
    layer: nn.Module, call: Any, x: Tensor, kind: SiteKind, axis: int | None
) -> None:
    model = Host(layer, call)
    (plan,) = [plan for plan in _find(model, x).sites if plan.info.name == "layer"]
    out = model(x)
    assert plan.info.kind is kind and plan.geometry.sequence_axis == axis
    assert plan.info.out_features == out.shape[1 if kind.channels_first else -1]
    assert plan.geometry.y_shape == tuple(out.shape)
    assert plan.weight.requires_grad and any(p is plan.weight for p in layer.parameters())


def test_an_embeddings_ids_are_its_input() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2))
    (plan,) = [p for p in _find(model, torch.randint(9, (3, 4))).sites if p.info.name == "0"]
    assert (plan.info.kind, plan.info.in_features, plan.info.out_features) == (SiteKind.EMBEDDING_LAYER, 9, 6)
    assert plan.geometry.captured_features == 1 and plan.geometry.sequence_axis == 1


def test_other_layers_go_by_the_models_own_sequence_layers() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), Host(nn.GRU(6, 6), _first))
    axes = {p.info.name: p.geometry.sequence_axis for p in _find(model, SEQUENCES).sites}
    assert axes == {"0": 0, "1": 0, "2.first": 0, "2.layer": 0}


class Tied(nn.Module):
    def __init__(self, by_use: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.by_use = by_use
        if not by_use:
            self.head.weight = self.layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.layer(tokens)
        return F.linear(h, self.layer.weight) + self.head(h) if self.by_use else self.head(h)


class Subclass(nn.LayerNorm):
    pass


def _packed(layer: nn.Module, x: Tensor) -> Tensor:
    packed, _ = layer(pack_padded_sequence(x, torch.tensor([4, 3, 2]), batch_first=True))
    return pad_packed_sequence(packed, batch_first=True)[0]


def _frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def _twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(layer(x))


REFUSED: list[tuple[nn.Module, Tensor, str]] = [
    (Host(_frozen(nn.LayerNorm(6))), ROWS, "frozen"),
    (Host(nn.LayerNorm(6, elementwise_affine=False)), ROWS, "elementwise_affine=False"),
    (Host(nn.LayerNorm((4, 6))), SEQUENCES, "2 axes"),
    (Host(nn.BatchNorm1d(6, affine=False)), ROWS, "affine=False"),
    (Host(Subclass(6)), ROWS, "a Subclass, whose inner workings are not known"),
    (Host(nn.LayerNorm(6), _twice), ROWS, "runs 2 times"),
    (Host(nn.LayerNorm(6), lambda _, x: x), ROWS, "did not run"),
    (Tied(by_use=False), torch.randint(9, (3, 4)), "tied to 0.head.weight"),
    (Tied(by_use=True), torch.randint(9, (3, 4)), "read 2 times"),
    (Host(nn.LSTM(6, 5, batch_first=True), _packed), SEQUENCES, "packed sequences"),
    (Host(nn.GRU(6, 5), lambda m, x: m(x)[1]), SEQUENCES, "only its last state"),
    (Host(nn.utils.parametrizations.weight_norm(nn.LayerNorm(6))), ROWS, "inner workings"),
]


@pytest.mark.parametrize(("model", "x", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_what_cannot_be_a_site_is_reported_with_a_reason(model: nn.Module, x: Tensor, reason: str) -> None:
    if isinstance(model, Tied):
        model = nn.Sequential(model, nn.Linear(9, 9))  # something must be able to grow
    found = _find(model, x)
    reasons = [skipped.reason for skipped in found.skipped if skipped.name.endswith("layer")]
    assert any(reason in given for given in reasons), reasons
    assert not any(plan.info.name.endswith("layer") for plan in found.sites)


def test_an_embedding_that_rescales_its_rows_is_refused() -> None:
    found = _find(nn.Sequential(nn.Embedding(9, 6, max_norm=1.0), nn.Linear(6, 2)), torch.randint(9, (3, 4)))
    assert [s.reason for s in found.skipped] == ["rescales its own rows (max_norm=1.0)"]


@pytest.mark.filterwarnings("ignore:.*quantize")  # torch moves its quantised layers elsewhere; there are models
def test_quantised_layers_are_reported() -> None:
    found = _find(nn.Sequential(nn.Linear(6, 6), torch.ao.nn.quantized.dynamic.Linear(6, 6)), ROWS)
    assert {s.name: s.reason for s in found.skipped}["1"].startswith("quantised")


def test_packed_sequences_in_training_are_refused_at_run_time() -> None:
    model = Host(nn.LSTM(6, 5, batch_first=True), _first)
    kasmina = attached(model, SEQUENCES, layers=True)
    kasmina.watch(True)
    model.call = _packed
    model(SEQUENCES)
    assert "packed sequences" in str(kasmina.sites["layer"].refused)


def _grown(layer: nn.Module, call: Any, x: Tensor, blueprint: str) -> tuple[Host, Kasmina, Tensor]:
    model = Host(layer, call)
    kasmina = attached(model, x, layers=True)
    before = model(x)
    plant(kasmina, "layer", blueprint)
    return model, kasmina, before


def test_branches_read_and_add_to_the_first_of_several() -> None:
    model, kasmina, before = _grown(nn.LSTM(6, 5), _first, SEQUENCES, "low_rank")
    bank = kasmina.sites["layer"].banks[1]
    added = bank.branch(model.first(SEQUENCES), training=False, generator=None)
    torch.testing.assert_close(model(SEQUENCES), before + added)
    outputs, state = model.layer(SEQUENCES)
    alone = nn.LSTM(6, 5)
    alone.load_state_dict(model.layer.state_dict())
    assert torch.equal(state[0], alone(SEQUENCES)[1][0]) and outputs.shape == (3, 4, 5)


def test_attention_sees_no_later_position() -> None:
    model, _, _ = _grown(nn.LayerNorm(6), None, SEQUENCES, "attention")
    x = SEQUENCES.clone().requires_grad_()
    model(x)[:, 1].sum().backward()
    assert x.grad is not None and bool((x.grad[:, 2:] == 0).all()) and bool((x.grad[:, 0] != 0).any())


def test_attention_of_a_sequence_first_layer_keeps_samples_apart() -> None:
    model, _, _ = _grown(nn.MultiheadAttention(6, 2), _attend, SEQUENCES, "attention")
    x = SEQUENCES.clone().requires_grad_()
    model(x)[:, 1].sum().backward()
    assert x.grad is not None and bool((x.grad[:, [0, 2, 3]] == 0).all())


def test_a_copy_carries_what_stands_beside_the_annex() -> None:
    model, kasmina, _ = _grown(nn.LayerNorm(6), None, SEQUENCES, "attention")
    site = kasmina.sites["layer"]
    site.beside.append(site.banks.pop(1))
    site.grafted.clear()
    kasmina.refresh()
    wanted, twin = model(SEQUENCES), copy.deepcopy(model)
    with torch.no_grad():
        site.beside[0].params["wo"].zero_()
    assert torch.equal(twin(SEQUENCES), wanted) and not torch.equal(model(SEQUENCES), wanted)


def test_a_sequence_first_capture_counts_samples_not_positions() -> None:
    model = Host(nn.GRU(6, 5), _first)
    geometry = attached(model, SEQUENCES, layers=True).sites["layer"].geometry
    capture = Capture(geometry, num_batches=2, rows_per_batch=12, generator=torch.Generator())
    for _ in range(2):
        x = SEQUENCES.clone()
        y = torch.randn(3, 4, 5, requires_grad=True) * 1.0
        capture.record(x, y)
        y.square().sum().backward()
    rows = capture.rows()
    assert set(rows.cluster.tolist()) == set(range(8)), "four samples in each of two batches"
