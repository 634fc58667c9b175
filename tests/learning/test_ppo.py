"""PPO against known answers: credit, losses, masks, what stops it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper.errors import ConfigError
from esper.learning.environment import Ints, Stepped
from esper.learning.ppo import (
    Collector,
    PPOConfig,
    Rollout,
    clipped_objective,
    explained_variance,
    gae,
    head_entropies,
    learn,
    left_of,
    value_loss,
)
from esper.tamiyo.neural.choice import choose
from esper.tamiyo.neural.policy import Decided

pytestmark = pytest.mark.unit

# ----------------------------------------------------------------------------------------------------------------------
# Credit


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_gae_by_hand() -> None:
    """gamma 0.9, lambda 0.5. Surprises: 1 + 0.9 * 3 - 2 = 1.7, 0 + 0.9 * 1 - 3 = -2.1, 2 + 0.9 * 4 - 1 = 4.6."""
    rewards, values, following = column(1, 0, 2), column(2, 3, 1), column(3, 1, 4)
    going = np.zeros((3, 1), dtype=np.bool_)
    found = gae(rewards, values, following, going, 0.9, 0.5)
    last = 4.6
    middle = -2.1 + 0.45 * last
    assert found[:, 0] == pytest.approx([1.7 + 0.45 * middle, middle, last])


def test_nothing_follows_the_end_and_the_critic_speaks_for_what_was_cut_short() -> None:
    rewards, values, ended = column(1, 1), column(0.5, 0.5), np.array([[True], [False]])
    terminated = gae(rewards, values, column(0, 2), ended, 1.0, 1.0)
    truncated = gae(rewards, values, column(7, 2), ended, 1.0, 1.0)
    assert terminated[:, 0].tolist() == [0.5, 2.5]
    assert truncated[:, 0].tolist() == [7.5, 2.5]


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.7, 1.0]))
def test_gae_is_the_sum_of_surprises_to_come(seed: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    shape = (7, 3)
    rewards, values, following = (rng.normal(size=shape) for _ in range(3))
    ended = rng.random(shape) < 0.3
    found = gae(rewards, values, following, ended, gamma, lam)
    surprises = rewards + gamma * following - values
    for n in range(3):
        for t in range(7):
            total, weight = 0.0, 1.0
            for later in range(t, 7):
                total += weight * surprises[later, n]
                weight *= gamma * lam
                if ended[later, n]:
                    break
            assert found[t, n] == pytest.approx(total)


def test_explained_variance() -> None:
    returns = np.array([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(np.full(4, 9.0), returns) == 0
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, np.ones(4)))
    assert math.isnan(explained_variance(returns, returns, least=5.0))


# ----------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 1.0, 1.0),
        (1.3, 1.0, 0.0),  # already likelier than the clip range lets it be rewarded for
        (0.7, 1.0, 0.7),  # became unlikely by mistake: it may come back
        (0.7, -1.0, 0.0),
        (1.3, -1.0, -1.3),
        (1.1, -2.0, -2.2),
    ],
)
def test_no_gradient_beyond_the_trust_region(ratio: float, advantage: float, slope: float) -> None:
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    clipped_objective(log_ratio, torch.tensor([advantage]), 0.2).sum().backward()
    assert log_ratio.grad is not None and float(log_ratio.grad) == pytest.approx(slope)


def test_value_loss_with_and_without_a_clip() -> None:
    values, before, returns = torch.tensor([2.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 1.0])
    assert value_loss(values, before, returns, None).tolist() == pytest.approx([0.0, 0.81])
    assert value_loss(values, before, returns, 0.5).tolist() == pytest.approx([2.25, 0.81])


def test_entropy_of_a_head_is_a_mean_over_where_it_had_a_choice() -> None:
    free = torch.tensor([[True, False], [True, False], [False, False]])
    entropy = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    nothing = torch.zeros(3)
    found = head_entropies(Decided(torch.zeros(3, 2), nothing, entropy, free, nothing)).tolist()
    assert found[0] == 0.75 and math.isnan(found[1])


def test_what_sinks() -> None:
    assert left_of(PPOConfig(), 99) == 1
    sinking = PPOConfig(decay_updates=10)
    assert [left_of(sinking, update) for update in (0, 5, 10, 20)] == [1, 0.5, 0, 0]


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"gamma": 1.1}, {"lam": -0.1}, {"lr": 0.0}, {"clip": 0.0}, {"minibatch": 0}]
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"ppo.{next(iter(changes))} must"):
        PPOConfig(**changes)


# ----------------------------------------------------------------------------------------------------------------------
# An actor of one table: logits of three actions, the same everywhere


class Table(nn.Module):
    heads = ("choice",)

    def __init__(self, value: float = 0.0, valid: Sequence[bool] = (True, True, True)) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))
        self.critic = nn.Parameter(torch.tensor(value))
        self.valid = torch.tensor(valid)

    def collate(self, seen: Sequence[Any]) -> int:
        return len(seen)

    def forward(self, num: int, actions: Tensor | None = None, generator: torch.Generator | None = None) -> Decided:
        found = choose(
            self.logits.expand(num, 3), self.valid.expand(num, 3), torch.ones(num, dtype=torch.bool),
            chosen=None if actions is None else actions[:, 0], generator=generator,
        )  # fmt: skip
        return Decided(
            found.value[:, None], found.log_prob, found.entropy[:, None], found.free[:, None], self.critic.expand(num)
        )


class Ones:
    """Reward 1 a step; every third step ends the episode in one of two ways. What is seen is the step's number."""

    def __init__(self, num: int, *, truncates: bool) -> None:
        self.num, self.truncates, self.turn = num, truncates, 0

    def reset(self, seed: int) -> None:
        self.turn = 0

    def look(self) -> list[int]:
        return [self.turn % 3] * self.num

    def step(self, actions: Ints) -> Stepped[int]:
        self.turn += 1
        ended = np.full(self.num, self.turn % 3 == 0)
        never = np.zeros(self.num, dtype=np.bool_)
        last = dict.fromkeys(range(self.num), 3) if ended[0] else {}
        if self.truncates:
            return Stepped(np.ones(self.num), never, ended, last)
        return Stepped(np.ones(self.num), ended, never)

    def state(self) -> dict[str, Any]:
        return {"turn": self.turn}

    def load(self, state: dict[str, Any]) -> None:
        self.turn = state["turn"]


@pytest.mark.parametrize("truncates", [False, True])
def test_an_episode_cut_short_is_worth_what_the_critic_says(truncates: bool) -> None:
    """At gamma 0.5 and value 2 everywhere, one more step of reward 1 is no surprise; the end of it all is one."""
    collector = Collector(Ones(2, truncates=truncates), torch.Generator().manual_seed(0))
    collector.reset(0)
    rollout, finished = collector.collect(Table(value=2.0), PPOConfig(steps=7, gamma=0.5, lam=0.0))
    surprises = rollout.advantages.reshape(7, 2)
    ends = torch.tensor([False, False, True, False, False, True, False])
    assert (surprises[~ends] == 0).all()
    assert (surprises[ends] == (0.0 if truncates else -1.0)).all()
    assert torch.equal(rollout.returns, rollout.values + rollout.advantages)
    assert finished == [3.0] * 4 and collector.running.tolist() == [1.0, 1.0]
    assert len(rollout) == 14 and rollout.looks[:4] == [0, 0, 1, 1]


def rollout_of(actor: Table, advantages: Sequence[float], returns: float = 1.0) -> Rollout[int]:
    num = len(advantages)
    decided = actor(num, generator=torch.Generator().manual_seed(0))
    return Rollout(
        looks=[0] * num, actions=decided.actions, log_probs=decided.log_prob.detach(), values=torch.zeros(num),
        advantages=torch.tensor(advantages), returns=torch.full((num,), returns),
    )  # fmt: skip


def test_learns_what_pays() -> None:
    actor = Table()
    optimizer = torch.optim.Adam(actor.parameters(), 0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        decided = actor(64, generator=generator)
        paid = (decided.actions[:, 0] == 2).float()
        rollout = Rollout([0] * 64, decided.actions, decided.log_prob.detach(), torch.zeros(64), paid, paid)
        learn(actor, optimizer, rollout, PPOConfig(lr=0.05, minibatch=32, target_kl=None), generator=generator)
    assert torch.softmax(actor.logits, 0)[2].item() > 0.9


def test_a_forced_step_teaches_the_critic_only() -> None:
    actor = Table(valid=(False, True, False))
    optimizer = torch.optim.SGD(actor.parameters(), 0.1)
    rollout = rollout_of(actor, [5.0, -5.0, 3.0])
    told = learn(actor, optimizer, rollout, PPOConfig(epochs=1), generator=torch.Generator().manual_seed(0))
    assert actor.logits.tolist() == [0, 0, 0] and actor.critic.item() > 0
    assert told.policy_loss == 0 and math.isnan(told.entropies[0])


def test_floors_pull_a_head_up_and_nothing_else_does() -> None:
    for floors, moves in (((0.99,), True), ((0.1,), False), ((), False)):
        actor = Table()
        with torch.no_grad():
            actor.logits += torch.tensor([2.0, 0.0, 0.0])
        before = actor(1).entropy.item()
        config = PPOConfig(epochs=1, floors=floors, floor_weight=1.0, normalise=False, lr=0.1)
        optimizer = torch.optim.SGD(actor.parameters(), 0.1)
        learn(actor, optimizer, rollout_of(actor, [0.0] * 8), config, generator=torch.Generator().manual_seed(0))
        assert (actor(1).entropy.item() > before) == moves


def test_an_update_ends_when_the_policy_has_moved_too_far() -> None:
    def run(target_kl: float | None) -> tuple[int, float]:
        actor = Table()
        optimizer = torch.optim.SGD(actor.parameters(), 5.0)
        config = PPOConfig(epochs=20, minibatch=8, lr=5.0, target_kl=target_kl, max_grad_norm=10.0)
        rollout = rollout_of(actor, [1.0, -1.0] * 8)
        told = learn(actor, optimizer, rollout, config, generator=torch.Generator().manual_seed(0))
        return told.epochs, told.kl

    assert run(None)[0] == 20
    epochs, kl = run(0.01)
    assert epochs < 20 and kl > 0.01


def test_the_gradient_is_clipped() -> None:
    actor = Table()
    optimizer = torch.optim.SGD(actor.parameters(), 1.0)
    config = PPOConfig(epochs=1, lr=1.0, max_grad_norm=1e-3, normalise=False)
    told = learn(actor, optimizer, rollout_of(actor, [100.0] * 4, 50.0), config, generator=torch.Generator())
    moved = torch.cat([actor.logits.detach(), actor.critic.detach()[None]])
    assert told.grad_norm > 1 and moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_noise_is_not_blown_up() -> None:
    """Advantages that differ in their sixth digit move nothing when earlier ones differed by whole units."""
    moved: list[float] = []
    for least in (0.0, 0.1):
        actor = Table()
        rollout = rollout_of(actor, [1e-6, -1e-6, 2e-6, 0.0])
        learn(
            actor, torch.optim.SGD(actor.parameters(), 0.1), rollout, PPOConfig(epochs=1, lr=0.1),
            generator=torch.Generator().manual_seed(0), least_deviation=least,
        )  # fmt: skip
        moved.append(float(actor.logits.detach().abs().max()))
    assert moved[0] > 1e-3 and moved[1] < 1e-5


def test_advantages_are_normalised_over_what_teaches() -> None:
    actor = Table()
    rollout = rollout_of(actor, [1.0, 2.0, 3.0, 100.0])
    forced = dataclasses.replace(rollout, log_probs=rollout.log_probs * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    from esper.learning.ppo import _normalised

    found = _normalised(forced, 0.0)[:3]
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0]))
