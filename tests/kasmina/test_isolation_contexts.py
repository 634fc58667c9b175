"""What runs inside these contexts leaves no trace, not even after an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

import numpy as np
import pytest
import torch
from torch import nn

from esper.kasmina.isolation import preserved_buffers, preserved_modes, preserved_rng, undisturbed

pytestmark = pytest.mark.unit


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3))
    model.register_buffer("seen", torch.zeros(2))
    model[1].eval()
    return model


def _inside(context: AbstractContextManager[None], work: Callable[[], object], *, fail: bool) -> None:
    with suppress(ZeroDivisionError), context:
        work()
        if fail:
            raise ZeroDivisionError


every_end = pytest.mark.parametrize("fail", [False, True], ids=["ends", "raises"])


@every_end
def test_random_streams(fail: bool, unchanged_rng: None) -> None:
    drawn: list[float] = []

    def draw() -> None:
        drawn.extend([random.random(), np.random.rand(), float(torch.rand(()))])

    _inside(preserved_rng(), draw, fail=fail)
    _inside(preserved_rng(), draw, fail=fail)
    assert drawn[:3] == drawn[3:]


@every_end
def test_training_flags_module_by_module(fail: bool) -> None:
    model = _model()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2
    _inside(preserved_modes(model), model.eval, fail=fail)
    assert [module.training for module in model.modules()] == before


@every_end
def test_buffers_written_in_place_or_replaced(fail: bool) -> None:
    model = _model()
    kept = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}

    def work() -> None:
        model.train()(torch.randn(4, 2, 3, 3))
        model.seen = torch.ones(2)
        model[1].running_mean = None

    _inside(preserved_buffers(model), work, fail=fail)
    for name, buffer in model.named_buffers():
        assert buffer is kept[name][0] and torch.equal(buffer, kept[name][1])
    assert {name for name, _ in model.named_buffers()} == set(kept)


@every_end
def test_undisturbed_is_all_of_it_in_evaluation_mode_without_gradients(
    fail: bool, request: pytest.FixtureRequest
) -> None:
    model = _model()
    request.getfixturevalue("unchanged_rng")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]

    def work() -> None:
        assert not model.training and not torch.is_grad_enabled()
        model.train()
        model(torch.randn(4, 2, 3, 3))

    _inside(undisturbed(model), work, fail=fail)
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
