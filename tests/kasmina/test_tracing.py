"""The probe's record: who made a value, who reads it, how often a module ran."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.tracing import Trace, trace

pytestmark = pytest.mark.unit


def _trace(function: object, *inputs: Tensor) -> Trace:
    assert callable(function)
    return trace(nn.Identity(), lambda: function(*inputs))


def _names(recorded: Trace) -> list[str]:
    return [operation.name for operation in recorded.operations]


def test_operations_in_order_with_their_plain_arguments() -> None:
    weight = torch.randn(3, 4)
    recorded = _trace(lambda x: F.leaky_relu(F.linear(x, weight), 0.3), torch.randn(2, 4))
    assert _names(recorded) == ["linear", "leaky_relu"]
    linear, activation = recorded.operations
    assert linear.weight == id(weight) and activation.weight is None
    assert activation.arguments["negative_slope"] == 0.3
    assert activation.inputs == linear.outputs
    assert recorded.sole_consumer(linear.outputs[0]) is activation


def test_arguments_of_functions_without_a_signature() -> None:
    recorded = _trace(lambda x: F.gelu(F.softplus(x, 2.0, 5.0), approximate="tanh"), torch.randn(3))
    assert [o.arguments for o in recorded.operations] == [{"_1": 2.0, "_2": 5.0}, {"approximate": "tanh"}]


def test_an_in_place_operation_makes_a_new_value() -> None:
    def function(x: Tensor) -> Tensor:
        h = x * 1.0
        torch.relu_(h)
        return h + 1.0

    first, relu, last = (recorded := _trace(function, torch.randn(3))).operations
    assert (first.name, relu.name, last.name) == ("mul", "relu", "add")
    assert relu.inputs == first.outputs and last.inputs == relu.outputs and relu.outputs != relu.inputs
    assert recorded.sole_consumer(first.outputs[0]) is relu


def test_two_readers_and_none() -> None:
    def function(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return h.exp() + h

    recorded = _trace(function, torch.randn(3))
    tanh, add = recorded.operations[0], recorded.operations[-1]
    assert recorded.sole_consumer(tanh.outputs[0]) is None and len(recorded.consumers[tanh.outputs[0]]) == 2
    assert recorded.sole_consumer(add.outputs[0]) is None and add.outputs[0] not in recorded.consumers


def test_lists_of_tensors_count_on_both_sides() -> None:
    recorded = _trace(lambda x: torch.cat([*x.chunk(2), x]), torch.randn(4))
    chunk, cat = recorded.operations
    assert len(chunk.outputs) == 2 and set(chunk.outputs) | set(chunk.inputs) == set(cat.inputs)


def test_looking_at_shapes_is_not_reading() -> None:
    recorded = _trace(lambda x: torch.tanh(x).reshape(x.shape[0], -1), torch.randn(2, 3))
    assert _names(recorded) == ["tanh", "reshape"]


def test_statistics_of_a_batch_norm() -> None:
    norm = nn.BatchNorm2d(3).eval()
    recorded = _trace(norm, torch.randn(2, 3, 4, 4))
    assert [o.statistics for o in recorded.operations if o.name == "batch_norm"] == [id(norm.running_mean)]


def test_module_calls_are_counted_and_hooks_removed_even_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, layer)
    recorded = trace(model, lambda: model(torch.randn(1, 2)))
    assert recorded.calls[id(layer)] == 2 and recorded.calls[id(model)] == 1
    with pytest.raises(RuntimeError):
        trace(model, lambda: model(torch.randn(1, 3)))
    assert not layer._forward_hooks and not model._forward_hooks
    assert torch.is_grad_enabled()
