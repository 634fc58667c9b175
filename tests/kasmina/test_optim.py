"""SlotAdamW is the host's optimizer, slot by slot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.example_sites import EXAMPLES, make_bank
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from esper.kasmina.bank import Bank
from esper.kasmina.optim import Hyperparameters, SlotAdamW, hyperparameters, is_adaptive
from esper.protocol import SiteKind

pytestmark = pytest.mark.unit

EXAMPLE = EXAMPLES[SiteKind.LINEAR_SPAN][0]
PLAIN = SlotAdamW(lr_boost=1.0, warmup_steps=1)
ADAM = Hyperparameters("adamw", 0.01, 0.0)

HOSTS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, 0.02, betas=(0.8, 0.95), eps=1e-6),
    "adam-decay": lambda p: torch.optim.Adam(p, 0.02, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1, betas=(0.85, 0.99)),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, torch.tensor(0.02), weight_decay=0.1, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
}


def _bank(slots: int = 1, seed: int = 0) -> Bank:
    bank = make_bank("bottleneck", EXAMPLE, slots=slots, seed=seed)
    bank.set_learning(True)
    return bank


def _give(bank: Bank, seed: int, *, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in bank.params.values():
        value.grad = scale * torch.randn(value.shape, generator=generator)


def _state(bank: Bank) -> dict[str, Tensor]:
    moments = {f"1{k}": v for k, v in bank.moments.first.items()} | {f"2{k}": v for k, v in bank.moments.second.items()}
    return {k: v.detach().clone() for k, v in (bank.params | moments | {"steps": bank.moments.steps}).items()}


@pytest.mark.parametrize("name", HOSTS)
def test_equals_the_hosts_optimizer_step_by_step(name: str) -> None:
    bank = _bank()
    reference = [value.detach().clone().requires_grad_() for value in bank.params.values()]
    optimizer = HOSTS[name](reference)
    for step in range(12):
        _give(bank, step)
        for value, like in zip(reference, bank.params.values(), strict=True):
            assert like.grad is not None
            value.grad = like.grad.clone()
        host = hyperparameters(optimizer, optimizer.param_groups[0])
        optimizer.step()
        PLAIN.step(bank, host)
        for value, ours in zip(reference, bank.params.values(), strict=True):
            torch.testing.assert_close(ours.detach(), value.detach(), atol=2e-6, rtol=1e-5)
            assert ours.grad is None


@pytest.mark.parametrize("scheduler", ["step", "cosine", "one-cycle", "lambda", "exponential"])
def test_follows_the_hosts_schedule(scheduler: str) -> None:
    bank = _bank()
    reference = [value.detach().clone().requires_grad_() for value in bank.params.values()]
    optimizer = torch.optim.AdamW(reference, 0.02)
    schedules: dict[str, Callable[[], Any]] = {
        "step": lambda: lr_scheduler.StepLR(optimizer, 3, 0.3),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "one-cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12),  # moves beta1 as well
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "exponential": lambda: lr_scheduler.ExponentialLR(optimizer, 0.7),
    }
    schedule = schedules[scheduler]()
    rates: set[float] = set()
    for step in range(10):
        _give(bank, step)
        for value, like in zip(reference, bank.params.values(), strict=True):
            assert like.grad is not None
            value.grad = like.grad.clone()
        host = hyperparameters(optimizer, optimizer.param_groups[0])
        rates.add(host.lr)
        optimizer.step()
        PLAIN.step(bank, host)
        schedule.step()
        for value, ours in zip(reference, bank.params.values(), strict=True):
            torch.testing.assert_close(ours.detach(), value.detach(), atol=2e-6, rtol=1e-5)
    assert len(rates) > 2


def test_a_fresh_slot_beside_an_old_one_steps_as_if_alone() -> None:
    both, alone = _bank(2), _bank(2)
    old = torch.tensor([True, False])
    for step in range(40):
        _give(both, step)
        PLAIN.step(both, ADAM, learning=old)
    for name, value in alone.params.items():
        value.data[1] = both.params[name].data[1]
    before = _state(both)
    _give(both, 99), _give(alone, 99)
    PLAIN.step(both, ADAM), PLAIN.step(alone, ADAM)
    assert both.moments.steps.tolist() == [41.0, 1.0]
    for name in both.params:
        assert torch.equal(both.params[name][1], alone.params[name][1])
        step = (both.params[name][1] - before[name][1]).abs()
        torch.testing.assert_close(step, torch.full_like(step, 0.01), atol=1e-5, rtol=1e-3)  # Adam's first step is lr


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
def test_masked_slots_are_not_touched(rule: str) -> None:
    host = Hyperparameters(rule, 0.1, 0.1, momentum=0.9, nesterov=True)
    bank = _bank(3)
    _give(bank, 0)
    PLAIN.step(bank, host)
    before = _state(bank)
    _give(bank, 1)
    PLAIN.step(bank, host, learning=torch.tensor([True, False, True]))
    after = _state(bank)
    for name, value in before.items():
        assert torch.equal(value[1], after[name][1]), name
        assert not torch.equal(value[0], after[name][0]), name


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(rule: str, bad: float) -> None:
    host = Hyperparameters(rule, 0.1, 0.1, momentum=0.9)
    bank = _bank(2)
    _give(bank, 0)
    PLAIN.step(bank, host)
    before = _state(bank)
    _give(bank, 1)
    grad = bank.params["w1"].grad
    assert grad is not None
    grad[0, 0, 0] = bad
    PLAIN.step(bank, host)
    assert all(torch.equal(value, before[name]) for name, value in _state(bank).items())
    assert int(bank.bad_steps) == 1
    assert all(value.grad is None for value in bank.params.values())
    _give(bank, 2)
    PLAIN.step(bank, host)
    assert int(bank.bad_steps) == 1 and bank.moments.steps.tolist() == [2.0, 2.0]


def test_without_gradients_nothing_happens() -> None:
    bank = _bank()
    before = _state(bank)
    PLAIN.step(bank, ADAM)
    assert all(torch.equal(value, before[name]) for name, value in _state(bank).items())
    assert bank.moments.steps.tolist() == [0.0]


def test_the_loss_scale_is_undone() -> None:
    scaled, plain = _bank(), _bank()
    host = Hyperparameters("sgd", 0.1, 0.0)
    _give(scaled, 0, scale=1024.0), _give(plain, 0)
    PLAIN.step(scaled, host, inverse_scale=1 / 1024)
    PLAIN.step(plain, host)
    assert all(torch.equal(scaled.params[name], plain.params[name]) for name in plain.params)


def test_warm_up_rises_linearly_from_each_slots_own_first_step() -> None:
    optimizer, bank = SlotAdamW(lr_boost=2.0, warmup_steps=4), _bank(2)
    host = Hyperparameters("adamw", 0.01, 0.0)
    sizes: list[list[float]] = []
    for step in range(6):
        before = bank.params["w2"].detach().clone()
        for value in bank.params.values():
            value.grad = torch.ones_like(value)
        optimizer.step(bank, host, learning=torch.tensor([True, step >= 2]))
        sizes.append((before - bank.params["w2"].detach()).abs().amax(dim=(1, 2)).tolist())
    # boosted to 0.02, a quarter more each step
    assert [s[0] for s in sizes] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02, 0.02], rel=1e-3)
    assert [s[1] for s in sizes] == pytest.approx([0, 0, 0.005, 0.01, 0.015, 0.02], rel=1e-3)


def _first_step(optimizer: SlotAdamW, host: Hyperparameters) -> float:
    bank = _bank()
    before = bank.params["w2"].detach().clone()
    for value in bank.params.values():
        value.grad = torch.ones_like(value)
    optimizer.step(bank, host)
    return float((before - bank.params["w2"].detach()).abs().max())


@pytest.mark.parametrize(
    ("ceiling", "lr", "peak", "expected"),
    [
        (None, 0.01, 0.01, 0.04),  # no ceiling: the whole boost
        (1.0, 0.01, 0.01, 0.01),  # at the host's peak: no boost
        (1.0, 0.01, 0.02, 0.02),  # later: as fast as the host ever was
        (1.0, 0.001, 0.02, 0.004),  # late: the whole boost again
        (0.5, 0.02, 0.02, 0.02),  # never slower than the host
    ],
)
def test_the_boost_stops_at_the_hosts_peak(ceiling: float | None, lr: float, peak: float, expected: float) -> None:
    optimizer = SlotAdamW(lr_boost=4.0, warmup_steps=1, lr_ceiling=ceiling)
    host = Hyperparameters("adamw", lr, 0.0, peak_lr=peak)
    assert _first_step(optimizer, host) == pytest.approx(expected, rel=1e-3)


def test_only_adaptive_rules_are_boosted() -> None:
    bank = _bank()
    before = bank.params["w2"].detach().clone()
    for value in bank.params.values():
        value.grad = torch.ones_like(value)
    SlotAdamW(lr_boost=2.0, warmup_steps=1).step(bank, Hyperparameters("sgd", 0.01, 0.0))
    torch.testing.assert_close(before - bank.params["w2"].detach(), torch.full_like(before, 0.01))


def test_which_optimizers_are_adaptive_and_how_they_are_read() -> None:
    parameters = [torch.zeros(2, requires_grad=True)]
    assert is_adaptive(torch.optim.NAdam(parameters)) and is_adaptive(torch.optim.RMSprop(parameters))
    assert not is_adaptive(torch.optim.SGD(parameters, 0.1))
    read = {
        "adamw": torch.optim.AdamW(parameters), "adam": torch.optim.Adam(parameters),
        "sgd": torch.optim.SGD(parameters, 0.1, momentum=0.9),
    }  # fmt: skip
    for rule, optimizer in read.items():
        assert hyperparameters(optimizer, optimizer.param_groups[0]).rule == rule
    decoupled = torch.optim.Adam(parameters, decoupled_weight_decay=True)
    assert hyperparameters(decoupled, decoupled.param_groups[0]).rule == "adamw"
    assert hyperparameters(read["sgd"], read["sgd"].param_groups[0]).betas == (0.0, 0.0)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("inverse_scale", [1.0, 0.37])
def test_banks_that_step_together_step_as_each_alone(name: str, inverse_scale: float) -> None:
    weight = torch.zeros(1, requires_grad=True)
    host = HOSTS[name]([weight])
    rule = hyperparameters(host, host.param_groups[0])
    learner = SlotAdamW(lr_boost=1.5, warmup_steps=4)
    together, alone = ([_bank(slots, seed=slots) for slots in (1, 2, 3, 3)] for _ in range(2))
    for banks in (together, alone):
        banks[3].lr_scale = 0.5
    for step in range(5):
        for banks in (together, alone):
            for number, bank in enumerate(banks):
                _give(bank, 10 * step + number)
            if step == 2:
                next(iter(banks[1].params.values())).grad[-1] = math.inf
            for value in banks[2].params.values() if step == 3 else ():
                value.grad = None
        learner.step_all([(bank, rule) for bank in together], inverse_scale=inverse_scale)
        for bank in alone:
            learner.step(bank, rule, inverse_scale=inverse_scale)
    for bank, like in zip(together, alone, strict=True):
        found, wanted = _state(bank), _state(like)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), "bit for bit"
        assert all(value.grad is None for value in bank.params.values())
        assert int(bank.bad_steps) == int(like.bad_steps)
    assert [int(bank.bad_steps) for bank in together] == [0, 1, 0, 0]
    assert together[2].moments.steps.tolist() == [4.0] * 3
