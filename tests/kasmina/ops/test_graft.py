"""The reference of the graft op: one seed after the other by hand, its gradients by autograd, and compiled graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from esper.kasmina.ops.graft import LARGEST, Seats, graft, reference

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def _draw(seed: int, seeds: int, width: int, units: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    shapes = ((seeds, units, width), (seeds, units), (seeds, width, units), (seeds,))
    return [torch.randn(shape, generator=source, dtype=dtype) for shape in shapes]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 4), st.data())
def test_every_seed_reads_and_writes_its_own_columns(
    seeds: int, width: int, units: int, rows: int, data: st.DataObject
) -> None:
    features = data.draw(st.integers(seeds * width, seeds * width + 5))
    columns = torch.tensor(data.draw(st.permutations(range(features)))[: seeds * width]).view(seeds, width)
    w1, b1, w2, alpha = _draw(seeds, seeds, width, units)
    y = torch.randn(rows, features, generator=torch.Generator().manual_seed(rows))
    kept = y.clone()
    found = graft(y, w1, b1, w2, alpha, Seats.of(columns, features, CPU), writable=True)
    wanted = y.clone()
    for seed in range(seeds):
        here = columns[seed]
        wanted[:, here] += alpha[seed] * F.silu(y[:, here] @ w1[seed].T + b1[seed]) @ w2[seed].T
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(y, kept), "the CPU has nothing to gain from writing into what it was given"


@pytest.mark.parametrize("seeds", [1, 3])
def test_gradients_by_hand_are_those_of_autograd(seeds: int) -> None:
    params = [value.requires_grad_() for value in _draw(0, seeds, 2, 4, torch.float64)]
    x = torch.randn(7, seeds * 2, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, seeds * 2, dtype=torch.float64)
    w1, b1, w2, alpha = params
    out = reference.project(reference.hidden(x, w1, b1), w2, alpha)
    gx, g1, gb, g2, galpha = torch.autograd.grad(out, [x, *params], g)
    found = reference.gradients(g, x, w1, b1, w2, alpha)
    for got, wanted in zip(found, (gx, g1, gb, g2 / alpha[:, None, None]), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close((found[3] * w2).sum((1, 2)), galpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_keeps_the_hosts_type(dtype: torch.dtype) -> None:
    seats = Seats.of(torch.tensor([[4, 1], [0, 3]]), 5, CPU)
    y = torch.randn(3, 5).to(dtype)
    assert graft(y, *_draw(1, 2, 2, 3), seats).dtype == dtype


def test_seats_know_what_can_be_read_at_once() -> None:
    def runs(columns: Tensor, features: int = 100) -> tuple[int, int, bool]:
        seats = Seats.of(columns, features, CPU)
        return seats.runs, seats.own_runs, seats.whole

    assert runs(torch.arange(32).view(8, 4)) == (16, 16, False)
    assert runs(torch.arange(32).view(8, 4), 32) == (16, 16, True)
    assert runs(torch.arange(8, 40).view(8, 4)) == (16, 16, False)
    assert runs(torch.arange(4, 36).view(8, 4)) == (4, 16, False), "not aligned for more"
    assert runs(torch.arange(2, 34).view(8, 4)) == (2, 16, False)
    assert runs(torch.arange(1, 33).view(8, 4)) == (1, 16, False)
    assert runs(torch.arange(28).view(7, 4)) == (4, 4, False), "no whole number of groups"
    assert runs(torch.arange(30).view(10, 3)) == (1, 1, False), "three columns fill no run"
    assert runs(torch.arange(32).flip(0).view(8, 4)) == (1, 16, False)
    assert runs(torch.arange(64)[None]) == (16, 16, False)
    scattered = torch.tensor([5, 0, 9])[:, None] * 4 + torch.arange(4)
    assert runs(scattered) == (4, 4, False)
    assert runs(torch.cat([torch.arange(40, 48), torch.arange(8, 16)])[None]) == (8, 16, False)


def test_large_seeds_are_dense_products() -> None:
    """Beyond the kernels' size a seed is a matrix product of its own, by the same call."""
    width = max(LARGEST.values()) + 1
    params = _draw(2, 1, width, 3)
    seats = Seats.of(torch.arange(width)[None], width, CPU)
    y = torch.randn(4, width)
    w1, b1, w2, alpha = params
    wanted = y + alpha * F.silu(y @ w1[0].T + b1[0]) @ w2[0].T
    torch.testing.assert_close(graft(y, *params, seats), wanted, atol=1e-4, rtol=1e-4)


def test_alpha_and_weights_change_without_a_recompilation() -> None:
    seats = Seats.of(torch.tensor([[4, 1], [0, 3]]), 5, CPU)
    params = _draw(3, 2, 2, 3)
    traced: list[int] = []

    def backend(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        traced.append(1)
        return module

    run = torch.compile(lambda y: graft(y, *params, seats), fullgraph=True, backend=backend)
    y = torch.randn(6, 5)
    for _ in range(3):
        torch.testing.assert_close(run(y), reference.graft(y, *params, seats.flat))
        for value in params:
            value.mul_(0.5)
    assert len(traced) == 1
