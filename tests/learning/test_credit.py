"""Credit from branches against known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.learning.test_ppo import Table

from esper.errors import ConfigError
from esper.learning.credit import relative_advantages, rollout_of_branches, within_deviation
from esper.learning.ppo import PPOConfig, learn

pytestmark = pytest.mark.unit
NAN = float("nan")


def test_by_hand() -> None:
    returns = np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    plain = relative_advantages(returns, scaled=False)
    assert plain.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    deviation = np.sqrt((4 + 1 + 9) / 4)
    assert within_deviation(returns) == pytest.approx(deviation)
    np.testing.assert_allclose(relative_advantages(returns), plain / deviation)


def test_failed_branches_teach_nothing_and_do_not_count() -> None:
    returns = np.array([[1.0, NAN, 3.0], [NAN, NAN, 4.0], [NAN, NAN, NAN]])
    assert relative_advantages(returns, scaled=False).tolist() == [[-2.0, 0.0, 2.0], [0, 0, 0], [0, 0, 0]]
    assert within_deviation(np.full((2, 1), 3.0)) == 0


def test_equal_branches_earn_exactly_nothing() -> None:
    """A against A under the same random numbers: no drift may be read as credit."""
    returns = np.repeat(np.random.default_rng(0).normal(size=(10, 1)), 8, axis=1)
    assert abs(relative_advantages(returns)).max() < 1e-12


@settings(max_examples=50)
@given(seed=st.integers(0, 9999), shift=st.sampled_from([0.0, -100.0, 3.0]), scale=st.sampled_from([1.0, 10.0]))
def test_neither_the_level_of_a_group_nor_the_unit_matters(seed: int, shift: float, scale: float) -> None:
    returns = np.random.default_rng(seed).normal(size=(4, 5))
    moved = scale * returns + shift * np.arange(4)[:, None]
    np.testing.assert_allclose(relative_advantages(returns), relative_advantages(moved), atol=1e-9)
    np.testing.assert_allclose(relative_advantages(returns).sum(axis=1), 0, atol=1e-9)


def test_learning_from_branches_without_a_critic() -> None:
    """Action 2 pays 1 more than the others at every decision point, whose own worth varies far more."""
    actor = Table()
    optimizer = torch.optim.Adam(actor.parameters(), 0.05)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for _ in range(25):
        decided = actor(16 * 4, generator=generator)
        actions, logs = decided.actions.reshape(16, 4, 1), decided.log_prob.detach().reshape(16, 4)
        returns = (actions[..., 0] == 2).double().numpy() + 50 * rng.normal(size=(16, 1))
        returns[0, 0] = NAN
        rollout = rollout_of_branches(list(range(16)), actions, logs, returns)
        assert len(rollout) == 63 and rollout.looks[:4] == [0, 0, 0, 1]
        learn(actor, optimizer, rollout, PPOConfig(lr=0.05, normalise=False, target_kl=None), generator=generator)
    assert torch.softmax(actor.logits, 0)[2].item() > 0.9
    assert actor.critic.item() == 0


def test_shapes_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="one row a decision point"):
        rollout_of_branches([0], torch.zeros(2, 4, 1), torch.zeros(2, 4), np.zeros((2, 4)))
