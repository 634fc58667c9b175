"""Fossilising moves a cohort into the annex without changing the network or what Adam knows of each unit."""

from __future__ import annotations

import pytest
import torch
from tests.example_sites import attached, plant, settle
from torch import Tensor, nn

from esper.kasmina.bank import Bank, Moments
from esper.kasmina.execution import Kasmina
from esper.kasmina.optim import Hyperparameters, SlotAdamW

pytestmark = pytest.mark.component

BETAS = (0.9, 0.999)
ADAM = Hyperparameters("adamw", 0.01, 0.0, BETAS)
OPTIMIZER = SlotAdamW(lr_boost=1.0, warmup_steps=1)


def _mlp() -> tuple[nn.Sequential, Kasmina, Tensor]:
    model, x = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6)), torch.randn(9, 5)
    return model, attached(model, x), x


def _conv() -> tuple[nn.Sequential, Kasmina, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1))
    x = torch.randn(4, 3, 5, 5)
    model(x)
    return model, attached(model, x), x


HOSTS = {"mlp": (_mlp, "0-2", "bottleneck"), "conv-norm": (_conv, "0-3", "bottleneck_conv")}
every_host = pytest.mark.parametrize("host", HOSTS)
PARTIAL = torch.tensor([[5, 0], [2, 3]])


def _learn(bank: Bank, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank.set_learning(True)
    for _ in range(steps):
        for value in bank.params.values():
            value.grad = torch.randn(value.shape, generator=generator) + 0.3
        OPTIMIZER.step(bank, ADAM)


@every_host
@pytest.mark.parametrize("columns", [None, PARTIAL], ids=["whole", "two-slots"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
def test_the_output_stays(host: str, columns: Tensor | None, alpha: float, training: bool) -> None:
    make, site, blueprint = HOSTS[host]
    model, kasmina, x = make()
    model.train(training)
    bank = plant(kasmina, site, blueprint, units=3, columns=columns, alpha=alpha)
    before = model(x).detach()
    annex = settle(kasmina, site)
    torch.testing.assert_close(model(x).detach(), before, atol=1e-6, rtol=1e-5)
    here = kasmina.sites[site]
    assert here.annex is annex and not here.grafted and not here.banks
    assert annex.units == bank.units * bank.num_slots == here.grown_units
    assert annex.num_slots == 1 and annex.columns is None and annex.learning
    assert all(value.requires_grad and value.is_leaf for value in annex.params.values())


@every_host
def test_generations_add_up(host: str) -> None:
    make, site, blueprint = HOSTS[host]
    model, kasmina, x = make()
    model.eval()
    plain = model(x).detach()
    for cohort, (units, columns) in enumerate([(2, None), (3, PARTIAL), (1, torch.tensor([[4]]))], 1):
        plant(kasmina, site, blueprint, units=units, cohort=cohort, columns=columns)
        before = model(x).detach()
        settle(kasmina, site, cohort=cohort)
        torch.testing.assert_close(model(x).detach(), before, atol=1e-6, rtol=1e-5)
    annex = kasmina.sites[site].annex
    assert annex is not None and annex.units == 2 + 6 + 1
    assert {name: tuple(v.shape) for name, v in annex.moments.first.items()} == {}
    assert float((model(x) - plain).detach().abs().max()) > 0
    model(x).square().sum().backward()
    assert all(value.grad is not None for value in annex.params.values())


def test_columns_a_seed_did_not_have_get_zeros_and_can_learn() -> None:
    _, kasmina, _ = _mlp()
    bank = plant(kasmina, "0-2", "bottleneck", units=3, columns=PARTIAL)
    own = bank.params["w2"].detach().clone()
    w2 = settle(kasmina, "0-2").params["w2"].detach()[0]
    assert w2.shape == (6, 6)
    for slot in range(2):
        part = w2[:, 3 * slot : 3 * slot + 3]
        assert torch.equal(part[PARTIAL[slot]], own[slot])
        rest = [c for c in range(6) if c not in PARTIAL[slot].tolist()]
        assert not part[rest].any()


def _averages(bank: Bank, betas: tuple[float, float]) -> dict[str, Tensor]:
    """What Adam divides: bias-corrected moments of every parameter."""
    steps = float(bank.moments.steps[0])
    first = {f"1{k}": v / (1 - betas[0] ** steps) for k, v in bank.moments.first.items()}
    second = {f"2{k}": v / (1 - betas[1] ** steps) for k, v in bank.moments.second.items()}
    return {k: v.detach().clone() for k, v in (first | second).items()}


@pytest.mark.parametrize(("old", "young"), [(400, 60), (60, 400)])
def test_bias_corrected_moments_of_every_unit_stay(old: int, young: int) -> None:
    _, kasmina, _ = _mlp()
    first = plant(kasmina, "0-2", "bottleneck", units=2, cohort=1)
    _learn(first, old, 1)
    settle(kasmina, "0-2", cohort=1, betas=BETAS)
    annex = kasmina.sites["0-2"].annex
    second = plant(kasmina, "0-2", "bottleneck", units=3, cohort=2)
    _learn(second, young, 2)
    assert annex is not None
    parts = [_averages(annex, BETAS), _averages(second, BETAS)]
    merged = settle(kasmina, "0-2", cohort=2, betas=BETAS)
    assert float(merged.moments.steps[0]) == max(old, young)
    joined = _averages(merged, BETAS)
    for name in joined:
        unit = merged.plan.axes[name[1:]].unit
        torch.testing.assert_close(joined[name], torch.cat([part[name] for part in parts], dim=unit))


def test_the_next_adam_step_is_the_one_each_unit_would_have_taken() -> None:
    _, kasmina, _ = _mlp()
    old = plant(kasmina, "0-2", "bottleneck", units=2, cohort=1)
    _learn(old, 500, 1)
    annex = settle(kasmina, "0-2", cohort=1, betas=BETAS)
    young = plant(kasmina, "0-2", "bottleneck", units=3, cohort=2)
    _learn(young, 80, 2)
    apart = [annex.frozen_copy(), young.frozen_copy()]
    for twin, source in zip(apart, (annex, young), strict=True):
        twin.moments = _moments_of(source)
    merged = settle(kasmina, "0-2", cohort=2, betas=BETAS)
    before = {name: value.detach().clone() for name, value in merged.params.items()}
    gradients = {name: 0.3 + torch.randn(value.shape) for name, value in merged.params.items()}
    for name, value in merged.params.items():
        value.grad = gradients[name].clone()
        unit, start = merged.plan.axes[name].unit, 0
        for twin in apart:
            twin.params[name].grad = gradients[name].narrow(unit, start, twin.units).clone()
            start += twin.units
    for bank in (merged, *apart):
        OPTIMIZER.step(bank, ADAM)
    for name, value in merged.params.items():
        unit = merged.plan.axes[name].unit
        wanted = torch.cat([twin.params[name] for twin in apart], dim=unit) - before[name]
        # The old units step as if alone; the young ones differ by how fast the second moment takes up one gradient.
        taken = value.detach() - before[name]
        torch.testing.assert_close(taken.narrow(unit, 0, 2), wanted.narrow(unit, 0, 2), atol=1e-7, rtol=1e-4)
        assert float((taken - wanted).abs().max()) < 0.1 * ADAM.lr


def test_momentum_without_bias_correction_moves_along_as_it_is() -> None:
    _, kasmina, _ = _mlp()
    sgd = Hyperparameters("sgd", 0.01, 0.0, betas=(0.0, 0.0), momentum=0.9)
    banks: list[dict[str, Tensor]] = []
    for cohort, steps in ((1, 30), (2, 2)):
        bank = plant(kasmina, "0-2", "bottleneck", units=2, cohort=cohort)
        bank.set_learning(True)
        for _ in range(steps):
            for value in bank.params.values():
                value.grad = torch.ones_like(value)
            OPTIMIZER.step(bank, sgd)
        banks.append({name: value.clone() for name, value in bank.moments.first.items()})
        annex = settle(kasmina, "0-2", cohort=cohort, betas=sgd.betas)
    for name, value in annex.moments.first.items():
        assert torch.equal(value, torch.cat([bank[name] for bank in banks], dim=annex.plan.axes[name].unit))


def test_a_chain_of_spans_reads_on_what_has_grown_before_it() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(8, 4)
    kasmina = attached(model, x)
    second = plant(kasmina, "2-4", "bottleneck", units=2, cohort=1)
    plant(kasmina, "0-2", "bottleneck", units=3, cohort=2)
    before = model(x).detach()
    settle(kasmina, "0-2", cohort=2)
    assert second.reads == 5 + 3 and kasmina.sites["2-4"].reads == 8
    torch.testing.assert_close(model(x).detach(), before, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        second.params["w1"][..., 5:] = 1.0
    assert not torch.allclose(model(x), before), "the new weights read the upstream annex"


def _moments_of(bank: Bank) -> Moments:
    clone = {name: value.clone() for name, value in bank.moments.first.items()}
    return Moments(clone, {n: v.clone() for n, v in bank.moments.second.items()}, bank.moments.steps.clone())


def test_parameters_without_units_are_put_at_their_own_columns_moments_included() -> None:
    model, x = nn.Sequential(nn.LayerNorm(6)), torch.randn(9, 6)
    kasmina = attached(model, x, layers=True)
    bank = plant(kasmina, "0", "affine", columns=PARTIAL, alpha=0.5)
    _learn(bank, 4, seed=1)
    before, first = model(x).detach(), dict(bank.moments.first)
    annex = settle(kasmina, "0")
    torch.testing.assert_close(model(x).detach(), before, atol=1e-6, rtol=1e-5)
    assert annex.num_slots == 1 and annex.columns is None and set(annex.params) == {"scale", "shift"}
    for name in ("scale", "shift"):
        assert torch.equal(annex.moments.first[name][0, PARTIAL], first[name])
        assert not annex.moments.first[name][0, [1, 4]].any() and not annex.params[name][0, [1, 4]].any()
    plant(kasmina, "0", "affine", cohort=2, columns=PARTIAL.flip(0))
    before = model(x).detach()
    again = settle(kasmina, "0", cohort=2)
    torch.testing.assert_close(model(x).detach(), before, atol=1e-6, rtol=1e-5)
    assert again is kasmina.sites["0"].annex and again.num_params == 12, "scales and shifts of two generations add up"
