"""A branch that computes its hidden units again in the backward pass gives the same values and gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from esper.kasmina.bank import Bank
from esper.kasmina.geometry import Activation, GateGeometry, Geometry
from esper.protocol import SiteKind

pytestmark = pytest.mark.component


def geometry(kind: SiteKind, dropout: float = 0.0) -> Geometry:
    gate = None
    if kind is SiteKind.LINEAR_GATED_SPAN:
        gate = GateGeometry(std=0.3, bias=True, fused=False, gate_first=True)
    return Geometry(
        kind=kind, in_features=6, out_features=8, hidden_features=5, head_std=0.4, tail_std=0.3, head_bias=True,
        activation=Activation("gelu"), dropout=dropout, gate=gate,
    )  # fmt: skip


def bank_of(blueprint: str, *, slots: int, learning: bool = True, dtype: torch.dtype = torch.float32) -> Bank:
    kind = SiteKind.LINEAR_SPAN if blueprint == "bottleneck" else SiteKind.LINEAR_GATED_SPAN
    columns = None if slots == 1 else torch.arange(8).reshape(slots, -1)
    bank = Bank(
        blueprint, geometry(kind), units=5, reads=6, columns=columns,
        generator=torch.Generator().manual_seed(1), device=torch.device("cpu"),
    )  # fmt: skip
    bank.params = {name: value.to(dtype) for name, value in bank.params.items()}
    bank.alpha = torch.linspace(0.5, 1.0, slots, dtype=dtype)
    bank.set_learning(learning)
    return bank


def grads(bank: Bank, x: Tensor, *, thrifty: bool) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    x = x.detach().requires_grad_()
    out = bank.branch(x, training=True, generator=None, thrifty=thrifty)
    out.float().square().sum().backward()
    found = [value.grad for value in bank.params.values()]
    for value in bank.params.values():
        value.grad = None
    assert x.grad is not None
    return out.detach(), x.grad, found


@pytest.fixture(params=["bottleneck", "gated"])
def blueprint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_those_of_the_plain_branch(
    blueprint: str, slots: int, learning: bool, autocast: bool
) -> None:
    bank = bank_of(blueprint, slots=slots, learning=learning)
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, thrifty = grads(bank, x, thrifty=False), grads(bank, x, thrifty=True)
    torch.testing.assert_close(thrifty[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(thrifty[1], plain[1])
    for one, two in zip(thrifty[2], plain[2], strict=True):
        assert (one is None) == (two is None) == (not learning)
        if one is not None and two is not None:
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("slots", [1, 4])
def test_first_and_second_derivatives_are_right(blueprint: str, slots: int) -> None:
    bank = bank_of(blueprint, slots=slots, dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    bank.alpha.requires_grad_()

    def run(x: Tensor, alpha: Tensor, *values: Tensor) -> Tensor:
        bank.params = dict(zip(bank.params, values, strict=True))
        return bank.branch(x, alpha=alpha, training=True, generator=None, thrifty=True)

    inputs = (x, bank.alpha, *bank.params.values())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_nothing_but_the_input_and_the_weights_is_kept(blueprint: str) -> None:
    bank = bank_of(blueprint, slots=1)
    x = torch.randn(64, 6, requires_grad=True)

    def kept(thrifty: bool) -> Iterator[int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            bank.branch(x, training=True, generator=None, thrifty=thrifty)
        return iter(sizes)

    assert max(kept(False)) == x.numel()  # what is read is larger than what is hidden here
    assert sum(size == 64 * 5 for size in kept(True)) == 0 < sum(size == 64 * 5 for size in kept(False))


def test_dropout_is_not_drawn_twice() -> None:
    bank = bank_of("bottleneck", slots=1)
    bank.geometry = geometry(SiteKind.LINEAR_SPAN, dropout=0.5)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 6, requires_grad=True)
    bank.branch(x, training=True, generator=generator, thrifty=True).sum().backward()
    expected, generator = x.grad, torch.Generator().manual_seed(3)
    x.grad = None
    bank.branch(x, training=True, generator=generator, thrifty=False).sum().backward()
    assert expected is not None and x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    assert bank.repeated_flops_per_row == 0
