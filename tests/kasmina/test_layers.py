"""Host layers behind one view: matrices of any layer, and wider layers of the same class."""

from __future__ import annotations

import pytest
import torch
from tests.span_hosts import Conv1D
from torch import nn

from esper.kasmina.layers import (
    features,
    is_growable,
    is_known,
    is_transposed,
    rebuilt,
    sizes,
    weight_matrix,
    with_columns,
    with_rows,
)

pytestmark = pytest.mark.unit

LAYERS = {
    "linear": (nn.Linear(3, 5), (2, 3)),
    "linear without bias": (nn.Linear(3, 5, bias=False), (2, 4, 3)),
    "transposed": (Conv1D(5, 3), (2, 4, 3)),
    "conv1d": (nn.Conv1d(3, 5, 3, 2, 1, 2), (2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 5, (3, 1), padding=(1, 0), bias=False), (2, 3, 5, 4)),
    "conv3d": (nn.Conv3d(3, 5, (1, 3, 3), (1, 2, 1), (0, 1, 1)), (2, 3, 3, 5, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_more_outputs_leave_the_first_ones_as_they_are(name: str, unchanged_rng: None) -> None:
    layer, shape = LAYERS[name]
    inputs, outputs = features(layer)
    assert (inputs, outputs) == (3, 5) and is_growable(layer) and is_known(layer)
    matrix = weight_matrix(layer)
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(2, *matrix.shape[1:], generator=source)
    wide = with_rows(layer, rows, torch.ones(2))
    x = torch.randn(shape, generator=source)
    axis = 1 if name.startswith("conv") else -1
    y = wide(x)
    torch.testing.assert_close(y.narrow(axis, 0, 5), layer(x))
    wanted = rebuilt(layer, rows, None if layer.bias is None else torch.ones(2))(x)
    torch.testing.assert_close(y.narrow(axis, 5, 2), wanted)
    assert type(wide) is type(layer) and features(wide) == (3, 7)
    assert all(getattr(wide, key) == value for key, value in sizes(wide).items())


@every_layer
def test_more_inputs_add_their_own_share(name: str) -> None:
    layer, shape = LAYERS[name]
    matrix = weight_matrix(layer)
    columns = torch.randn(5, 2, *matrix.shape[2:])
    wide = with_columns(layer, columns)
    axis = 1 if name.startswith("conv") else -1
    x = torch.randn(shape)
    extra = torch.randn([2 if i == axis % len(shape) else size for i, size in enumerate(shape)])
    zero = None if layer.bias is None else torch.zeros(5)
    torch.testing.assert_close(wide(torch.cat([x, extra], axis)), layer(x) + rebuilt(layer, columns, zero)(extra))
    assert features(wide) == (5, 5)


def test_dtype_and_the_users_attributes_move_along() -> None:
    layer = Conv1D(4, 3).double()
    layer.note = "mine"
    wide = with_rows(layer, torch.zeros(1, 3), torch.zeros(1))
    assert wide.weight.dtype == torch.float64 and wide.note == "mine" and (wide.nf, wide.nx) == (5, 3)
    assert list(dict(wide.named_parameters())) == ["weight", "bias"] and layer.nf == 4
    del layer.nx  # older versions of transformers have none
    assert not hasattr(with_rows(layer, torch.zeros(1, 3), torch.zeros(1)), "nx")


def test_only_the_layer_with_its_attributes_is_transposed() -> None:
    assert is_transposed(Conv1D(4, 3)) and not is_transposed(nn.Conv1d(4, 3, 1)) and not is_transposed(nn.Linear(3, 4))
    other = Conv1D(4, 3)
    other.nf = 3
    assert not is_transposed(other) and not is_growable(other)


def test_subclasses_may_compute_anything() -> None:
    class Mine(nn.Linear):
        pass

    assert is_growable(Mine(2, 2)) and not is_known(Mine(2, 2))
