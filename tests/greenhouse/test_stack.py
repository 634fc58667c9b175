"""The stacked forward, backward and AdamW against PyTorch's own, host by host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.greenhouse.bodies.mlp import MLP as Body
from esper.greenhouse.layout import HOST, VOID, Layout, Part, annex, live, num_groups, owners
from esper.greenhouse.stack import Moments, Rates, adamw, losses, output_gradient
from esper.runs.hosts import MLP

pytestmark = pytest.mark.unit

NUM, ROWS = 3, 5
WIDTHS = ((4, 7), (2, 3), (8, 1))
BODY = Body(6, 2, 3)
widths = st.lists(st.integers(1, 20), min_size=1, max_size=3)


def made(layout: Layout) -> torch.Tensor:
    rows = [
        BODY.first(layout, width, torch.Generator().manual_seed(n), torch.float64) for n, width in enumerate(WIDTHS)
    ]
    return torch.stack(rows)


def as_modules(layout: Layout, values: torch.Tensor) -> list[MLP]:
    found: list[MLP] = []
    for number, width in enumerate(WIDTHS):
        model = MLP(6, width, 3).double()
        linears = [layer for layer in model if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer, (weight, bias) in zip(linears, layout.views(values), strict=True):
                layer.weight.copy_(weight[number, : layer.out_features, : layer.in_features])
                layer.bias.copy_(bias[number, : layer.out_features])
        found.append(model)
    return found


@pytest.mark.parametrize("labels", [True, False])
def test_gradients_and_losses_are_those_of_autograd(labels: bool) -> None:
    layout = BODY.layout((8, 7))
    values, gradients = made(layout), torch.full((NUM, layout.length), torch.nan, dtype=torch.float64)
    x = torch.randn(NUM, ROWS, 6, dtype=torch.float64)
    y = torch.randint(3, (NUM, ROWS)) if labels else torch.randn(NUM, ROWS, 3, dtype=torch.float64)
    run = BODY.forward(layout.views(values), x)
    loss, delta = output_gradient(run.output, y)
    deltas = BODY.backward(layout.views(values), layout.views(gradients), run, delta)
    assert torch.isfinite(gradients).all() and len(deltas) == 3
    torch.testing.assert_close(losses(run.output, y), loss)
    torch.testing.assert_close(losses(run.output, y, per_row=True).mean(1), loss)
    for number, model in enumerate(as_modules(layout, values)):
        plain = nn.functional.cross_entropy if labels else nn.functional.mse_loss
        wanted = plain(model(x[number]), y[number])
        wanted.backward()
        torch.testing.assert_close(loss[number], wanted.detach())
        linears = [layer for layer in model if isinstance(layer, nn.Linear)]
        for layer, (weight, bias) in zip(linears, layout.views(gradients), strict=True):
            rows, columns = layer.weight.shape
            torch.testing.assert_close(weight[number, :rows, :columns], layer.weight.grad)
            torch.testing.assert_close(bias[number, :rows], layer.bias.grad)
            assert weight[number, rows:].count_nonzero() == weight[number, :, columns:].count_nonzero() == 0


def test_alpha_blends_units_in_and_scales_their_gradients() -> None:
    layout = BODY.layout((8, 7))
    values, gradients = made(layout), torch.zeros(NUM, layout.length, dtype=torch.float64)
    x, y = torch.randn(NUM, ROWS, 6, dtype=torch.float64), torch.randint(3, (NUM, ROWS))
    alphas = [torch.rand(NUM, room, dtype=torch.float64) for room in layout.hidden]
    leaf = values.clone().requires_grad_()
    h = x
    for layer, (weight, bias) in enumerate(layout.views(leaf)):
        z = torch.einsum("nbi,noi->nbo", h, weight) + bias[:, None]
        h = torch.relu(z) * alphas[layer][:, None] if layer < 2 else z
    losses(h, y).sum().backward()
    run = BODY.forward(layout.views(values), x, alphas)
    BODY.backward(layout.views(values), layout.views(gradients), run, output_gradient(run.output, y)[1], alphas)
    assert leaf.grad is not None
    torch.testing.assert_close(gradients, leaf.grad)


@pytest.mark.parametrize("grouped", [True, False])
def test_adamw_is_pytorchs(grouped: bool) -> None:
    """Two hosts, two groups of weights: each at its own learning rate and count of steps."""
    torch.manual_seed(1)
    values = torch.randn(2, 10, dtype=torch.float64)
    owner = torch.full((2, 10), HOST)
    if grouped:
        owner[:, 5:] = annex(0)
    lr = np.array([[0.0, 0.1, 0.3, 0.0], [0.0, 0.02, 0.04, 0.0]])
    parameters = {(n, g): values[n, owner[n] == g].clone().requires_grad_() for n in range(2) for g in (1, 2)}
    optimizers = {k: torch.optim.AdamW([p], lr=lr[k], weight_decay=0.01) for k, p in parameters.items()}
    moments = Moments(torch.zeros_like(values), torch.zeros_like(values))
    for step in range(1, 5):
        gradient = torch.randn(2, 10, dtype=torch.float64)
        parts = (lr / (1 - 0.9**step), np.full((2, 4), (1 - 0.999**step) ** -0.5), 1 - lr * 0.01, np.ones((2, 4)))
        adamw(values, gradient, moments, Rates(*map(torch.from_numpy, parts)), owner if grouped else None)
        for (host, group), parameter in parameters.items():
            parameter.grad = gradient[host, owner[host] == group]
            optimizers[host, group].step()
    for (host, group), parameter in parameters.items():
        torch.testing.assert_close(values[host, owner[host] == group], parameter.detach(), rtol=1e-6, atol=1e-9)


def test_what_does_not_learn_stays_with_its_moments() -> None:
    values, gradient = torch.randn(1, 4), torch.randn(1, 4)
    moments = Moments(torch.randn(1, 4), torch.rand(1, 4))
    before = values.clone(), moments.first.clone(), moments.second.clone()
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    adamw(values, gradient, moments, Rates(zero, one, one, zero), torch.full((1, 4), live(0)))
    assert torch.equal(values, before[0])
    assert torch.equal(moments.first, before[1]) and torch.equal(moments.second, before[2])


# ----------------------------------------------------------------------------------------------------------------------
# Layout


@settings(max_examples=30, deadline=None)
@given(widths, st.integers(1, 5), st.integers(1, 5))
def test_views_share_the_row_and_cover_it(hidden: list[int], inputs: int, outputs: int) -> None:
    layout = Body(inputs, len(hidden), outputs).layout(hidden)
    flat = torch.zeros(2, layout.length)
    for weight, bias in layout.views(flat):
        weight += 1
        bias += 1
    assert bool((flat == 1).all()) and all(room % 8 == 0 for room in layout.hidden)
    assert all(room >= units > room - 8 for room, units in zip(layout.hidden, hidden, strict=True))


@settings(max_examples=20, deadline=None)
@given(widths, st.data())
def test_moving_to_a_wider_layout_keeps_every_weight(hidden: list[int], data: st.DataObject) -> None:
    body = Body(3, len(hidden), 2)
    old = body.layout(hidden)
    wider = body.layout([units + data.draw(st.integers(0, 20)) for units in hidden])
    flat = torch.randn(2, old.length)
    moved = old.moved(flat, wider)
    assert moved.shape == (2, wider.length)
    for (weight, bias), (kept, kept_bias) in zip(old.views(flat), wider.views(moved), strict=True):
        rows, columns = weight.shape[1:]
        assert torch.equal(kept[:, :rows, :columns], weight) and torch.equal(kept_bias[:, :rows], bias)
    torch.testing.assert_close(moved.sum(1), flat.sum(1))


few = st.integers(1, 4)
sites = st.none() | st.integers(0, 1)
some_parts = st.lists(
    st.builds(
        Part, name=st.just("any"), rows=few, columns=few, rows_of=sites, columns_of=sites, taps=st.sampled_from((1, 9)),
        bias=st.booleans(), uses=st.integers(0, 5),
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(some_parts, st.tuples(few, few), st.tuples(st.integers(0, 20), st.integers(0, 20)))
def test_parts_of_every_kind_have_their_places(
    found: list[Part], hidden: tuple[int, int], more: tuple[int, int]
) -> None:
    """With taps and without a bias: the row is covered once, moves whole, and what has no site is the host's."""
    old = Layout.of(tuple(found), hidden)
    wider = Layout.of(old.parts, [units + added for units, added in zip(hidden, more, strict=True)])
    flat = torch.arange(2.0 * old.length).view(2, old.length)
    assert torch.cat([part.flatten(1) for pair in old.views(flat) for part in pair], 1).equal(flat)
    moved = old.moved(flat, wider)
    assert moved.sum() == flat.sum() and set(flat[1].tolist()) <= {*moved[1].tolist(), 0.0}
    owner = owners(old, [torch.full((room,), VOID) for room in old.hidden])
    for part, (weight, bias) in zip(old.parts, old.views(owner[None]), strict=True):
        is_fixed = part.rows_of is None and part.columns_of is None
        assert bool((weight == (HOST if is_fixed else VOID)).all())
        assert bias.shape[1] == part.bias * weight.shape[1]
        rows, columns = part.shape(old.hidden)
        assert weight.shape[1:3] == (rows, columns) and part.params(old.hidden) == weight.numel() + bias.numel()
        assert part.flops(old.hidden) == 2 * part.uses * weight.numel()


def test_who_owns_which_weight() -> None:
    layout = Layout(Body(1, 2, 1).parts, (8, 8))
    first = torch.tensor([HOST, annex(0), live(0)] + [VOID] * 5)
    second = torch.tensor([HOST, annex(1), live(1)] + [VOID] * 5)
    (w1, b1), (w2, b2), (w3, b3) = layout.views(owners(layout, [first, second])[None])
    assert torch.equal(w1[0, :, 0], first) and torch.equal(b1[0], first) and torch.equal(b2[0], second)
    assert w2[0, :3, :3].tolist() == [
        [HOST, annex(0), live(0)],
        [annex(1), annex(1), VOID],  # a unit on trial is read by the host alone
        [live(1), live(1), VOID],
    ]
    assert bool((w2[0, 3:] == VOID).all() and (w2[0, :, 3:] == VOID).all())
    assert torch.equal(w3[0, 0], second) and b3[0, 0] == HOST
    assert num_groups(2) == 1 + live(1)
