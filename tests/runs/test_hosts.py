from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from esper.runs.hosts import build, widen

pytestmark = pytest.mark.unit

SPECS: dict[str, tuple[dict[str, Any], torch.Tensor, tuple[int, ...]]] = {
    "mlp": ({"kind": "mlp", "in_features": 6, "widths": [3, 5], "num_classes": 4}, torch.zeros(2, 6), (2, 4)),
    "byte_transformer": (
        {"kind": "byte_transformer", "widths": [4, 6], "dim": 8, "num_heads": 2, "context": 7},
        torch.zeros(2, 5, dtype=torch.int64),
        (2, 5, 256),
    ),
    "resnet": (
        {"kind": "resnet", "widths": [2, 3, 4, 5], "trunk": [4, 8], "in_channels": 3, "num_classes": 4},
        torch.zeros(2, 3, 8, 8),
        (2, 4),
    ),
}


@pytest.mark.parametrize("kind", SPECS)
def test_output_shapes_and_inner_widths(kind: str) -> None:
    spec, x, shape = SPECS[kind]
    model = build(spec).eval()
    assert model(x).shape == shape
    inner = {
        "mlp": lambda m: [m[0].out_features, m[2].out_features],
        "byte_transformer": lambda m: [block.mlp.fc1.out_features for block in m.blocks],
        "resnet": lambda m: [block.conv1.out_channels for block in m.blocks],
    }[kind](model)
    assert inner == spec["widths"]


def test_transformer_looks_back_only() -> None:
    model = build(SPECS["byte_transformer"][0]).eval()
    tokens = torch.randint(256, (1, 6))
    later = tokens.clone()
    later[0, 4:] = (later[0, 4:] + 1) % 256
    assert torch.allclose(model(tokens)[0, :4], model(later)[0, :4], atol=1e-6)
    assert not torch.allclose(model(tokens)[0, 4:], model(later)[0, 4:], atol=1e-3)


LAYERS: dict[str, dict[str, dict[str, int]]] = {
    "mlp": {"0": {"in_features": 6, "out_features": 9}, "2": {"in_features": 9, "out_features": 5}},
    "byte_transformer": {
        "blocks.1.mlp.fc1": {"in_features": 8, "out_features": 11},
        "blocks.1.mlp.fc2": {"in_features": 11, "out_features": 8},
    },
    "resnet": {
        "blocks.2.conv1": {"in_channels": 4, "out_channels": 7},
        "blocks.2.norm1": {"num_features": 7},
        "blocks.2.conv2": {"in_channels": 7, "out_channels": 8},
    },
}


@pytest.mark.parametrize("kind", SPECS)
def test_widened_layers_keep_everything_but_their_size(kind: str) -> None:
    spec, x, shape = SPECS[kind]
    plain, model = build(spec), widen(build(spec), LAYERS[kind])
    assert model(x).shape == shape
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    assert list(before) == list(after), "names, biases and their order"
    changed = {name.rpartition(".")[0] for name in before if before[name].shape != after[name].shape}
    assert changed == set(LAYERS[kind])
    for name in LAYERS[kind]:
        old, new = plain.get_submodule(name), model.get_submodule(name)
        assert type(old) is type(new)
        if isinstance(old, nn.Conv2d) and isinstance(new, nn.Conv2d):
            assert (old.kernel_size, old.stride, old.padding) == (new.kernel_size, new.stride, new.padding)


def test_layers_that_never_grow() -> None:
    with pytest.raises(TypeError, match="norm is a LayerNorm, which never grows"):
        widen(build(SPECS["byte_transformer"][0]), {"norm": {"num_features": 9}})
