"""A branch that computes its hidden units again in the backward pass gives the same values and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tests.models import Pair, mse
from tests.rigs import QUICK, Rig, attach, graft, keep_visible
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.bank import Bank
from esper.kasmina.geometry import Activation, GateGeometry, Geometry
from esper.kasmina.recompute import Recipe, product, recomputed, weighted
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


@pytest.mark.parametrize("slots", [1, 2])
def test_an_activation_that_autocast_computes_in_fp32(slots: int) -> None:
    """As it does softplus on a GPU: the product behind it is in bf16 all the same."""

    def hidden(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.softplus(F.linear(x, params["w1"].flatten(0, 1)).float())

    source = torch.Generator().manual_seed(3)
    params = {
        "w1": torch.randn(slots, 5, 6, generator=source), "w2": torch.randn(slots, 4, 5, generator=source),
    }  # fmt: skip
    x, alpha = torch.randn(7, 6, generator=source), torch.ones(slots)
    leaves = [value.requires_grad_() for value in (*params.values(), x)]
    with torch.autocast("cpu", torch.bfloat16):
        out = recomputed(Recipe(hidden, "w2"), params, x, alpha)
        h = hidden(params, x)
        plain = product(h, weighted(params["w2"], alpha, h.dtype))
    assert out.dtype == torch.bfloat16
    found, wanted = (torch.autograd.grad(y.float().square().sum(), leaves) for y in (out, plain))
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, atol=0.05, rtol=0.02)


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

    def kept(thrifty: bool) -> list[int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            bank.branch(x, training=True, generator=None, thrifty=thrifty)
        return sizes

    assert kept(True).count(x.numel()) == 1
    assert kept(True).count(64 * 5) == 0 < kept(False).count(64 * 5)


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


# ----------------------------------------------------------------------------------------------------------------------
# In a host


def grown(*, recompute: bool, model: nn.Module | None = None) -> Rig:
    """A host with a cohort of visible size in its forward pass, and the same one for good below it."""
    torch.manual_seed(0)
    rig = attach(model or Pair(), graft=dataclasses.replace(QUICK["graft"], recompute=recompute))
    keep_visible(rig, rig.grower.sites()[0].name, 3)
    graft(rig)
    return rig


def gradients(rig: Rig, *, bf16: bool) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = mse(rig.model, rig.batches[0])
    loss.backward()
    found = {name: p.grad for name, p in rig.model.named_parameters() if p.grad is not None}
    for name, site in rig.grower.kasmina.sites.items():
        for number, bank in enumerate([*site.permanent, *site.banks.values()]):
            found |= {f"{name}/{number}/{k}": v.grad for k, v in bank.params.items() if v.grad is not None}
    return {**found, "loss": loss.detach()}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_host_computes_and_learns_the_same(bf16: bool) -> None:
    plain, thrifty = (gradients(grown(recompute=recompute), bf16=bf16) for recompute in (False, True))
    assert plain.keys() == thrifty.keys() and len(plain) > 8
    assert torch.equal(plain["loss"], thrifty["loss"])
    for name, value in plain.items():  # in bf16 head and branches add up what they send back in that precision
        torch.testing.assert_close(thrifty[name], value, rtol=0.05 if bf16 else 1e-5, atol=2e-3 if bf16 else 1e-7)


def test_head_and_branches_share_one_rounded_input() -> None:
    rig = grown(recompute=True)
    site = rig.grower.kasmina.sites["fc1-fc2"]
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        site.open()
        assert site.enter(x).dtype is torch.bfloat16
    site.open()
    assert site.enter(x) is x, "nothing rounds it"
    dormant = attach(Pair(), graft=dataclasses.replace(QUICK["graft"], recompute=True))
    with torch.autocast("cpu", torch.bfloat16):
        site = dormant.grower.kasmina.sites["fc1-fc2"]
        site.open()
        assert site.enter(x) is x, "a dormant site leaves the host alone"


class Checkpointed(nn.Module):
    """The whole host in one region."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.inside = Pair()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()  # a reentrant region without one has no gradients
        out: Tensor = checkpoint(self.inside, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_host_recomputes_branches_that_recompute(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpointed, "reentrant", reentrant)

    def found(recompute: bool) -> dict[str, Tensor]:
        rig = grown(recompute=recompute, model=Checkpointed())
        return gradients(rig, bf16=False)

    plain, thrifty = found(False), found(True)
    for name, value in plain.items():
        torch.testing.assert_close(thrifty[name], value)


def test_gradients_of_gradients_and_function_transforms_still_work() -> None:
    penalties: list[Tensor] = []
    for recompute in (False, True):
        rig = grown(recompute=recompute)
        x = rig.batches[0][0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(rig.model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert rig.model.fc1.weight.grad is not None  # type: ignore[union-attr]
        transformed = torch.func.grad(lambda x, rig=rig: rig.model(x).square().sum())(x.detach())
        torch.testing.assert_close(transformed, slope.detach())
        penalties.append(rig.model.fc1.weight.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(*penalties)


def test_what_is_computed_twice_is_booked() -> None:
    plain, thrifty = (grown(recompute=recompute).grower for recompute in (False, True))
    again = thrifty.kasmina.repeated_flops_per_step()
    assert plain.kasmina.repeated_flops_per_step() == 0 < again
    assert thrifty.accounts.training_flops == pytest.approx(plain.accounts.training_flops + again)
    assert again < thrifty.kasmina.added_flops_per_step(), "the product with the output weights is not repeated"


def test_what_branches_cost_is_worked_out_anew_after_every_change() -> None:
    rig = attach(Pair(), graft=dataclasses.replace(QUICK["graft"], recompute=True))
    kasmina, (x, wanted) = rig.grower.kasmina, rig.batches[0]
    rig.germinate(start="negative_gradient")
    seen: set[float] = set()
    for turn in range(30):
        rig.batches[:] = [(x[::2], wanted[::2]) if turn % 7 == 3 else (x, wanted)]
        rig.train()
        cost = 3.0 * kasmina.added_flops_per_step() + kasmina.repeated_flops_per_step()
        assert kasmina.branch_flops_per_step == cost
        seen.add(cost)
    assert len(seen) >= 3, "none before the graft, and that of two sizes of batches"


def test_passes_that_came_to_no_step_are_not_counted_to_a_later_one() -> None:
    """The scaler skips steps, say, until what is on trial is taken back, and with it all work of the hooks."""
    rig = attach(Pair())
    kasmina, (x, _) = rig.grower.kasmina, rig.batches[0]
    kasmina.watch(True)
    for _ in range(5):
        rig.model(x).sum().backward()
    rig.optimizer.zero_grad()
    kasmina.watch(False)
    kasmina.watch(True)
    rig.train()
    assert set(kasmina.rows_per_step.values()) == {len(x)}


def test_on_the_cpu_branches_keep_their_hidden_units_unless_told_otherwise() -> None:
    sites = attach(Pair()).grower.kasmina.sites.values()
    assert not any(site.thrifty for site in sites)
