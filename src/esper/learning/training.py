"""Training a policy: updates in a row, what is told of each, and a state to go on from bit for bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch

from esper.learning.environment import HostEnvironment
from esper.learning.health import dead_critic, wait_collapse
from esper.learning.ppo import Collector, Learned, PPOConfig, Rollout, explained_variance, learn
from esper.tamiyo.actions import Operation
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.ranges import Ranges
from esper.tamiyo.sight import Sight

_QUIET = 0.05
"""Returns that vary less than this share of the most so far say nothing of the critic: the policy has settled."""
_NOISE = 0.1
"""Advantages are divided by at least this share of their largest deviation so far."""


@dataclass
class History:
    """What is remembered from update to update besides the network."""

    updates: int = 0
    steps: int = 0
    """Decision points."""
    episodes: int = 0
    explained: list[float] = field(default_factory=list[float])
    returns: list[float] = field(default_factory=list[float])
    """Mean return of the episodes that ended in each update; NaN where none did."""
    waits: list[float] = field(default_factory=list[float])
    most_spread: float = 0.0
    """Largest variance of returns, and largest deviation of advantages, so far."""
    most_deviation: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong by now."""
        found = [dead_critic(self.explained), wait_collapse(self.waits, self.returns)]
        return [text for text in found if text is not None]


class Training:
    """One policy, one environment, one stream of random numbers.

    Parameters
    ----------
    seed:
        Of the environment and of whatever is drawn; the policy has its own weights already.
    """

    def __init__(self, environment: HostEnvironment, policy: Policy, config: PPOConfig, *, seed: int) -> None:
        self.environment, self.policy, self.config = environment, policy, config
        self.optimizer = torch.optim.Adam(policy.parameters(), config.lr, eps=1e-5)
        self.generator = torch.Generator().manual_seed(seed)
        self.collector: Collector[Sight] = Collector(environment, self.generator)
        self.collector.reset(seed)
        self.history = History()
        self.ranges: Ranges | None = None

    def update(self) -> dict[str, Any]:
        """Collect and learn once; returns a line of the curves."""
        rollout, finished = self.collector.collect(self.policy, self.config)
        history = self.history
        returns, deviation = rollout.returns.double().numpy(), float(rollout.advantages.std())
        history.most_spread = max(history.most_spread, float(np.var(returns)))
        history.most_deviation = max(history.most_deviation, deviation)
        explained = explained_variance(rollout.values.double().numpy(), returns, least=_QUIET * history.most_spread)
        learned = learn(
            self.policy, self.optimizer, rollout, self.config, generator=self.generator, update=history.updates,
            least_deviation=_NOISE * history.most_deviation,
        )  # fmt: skip
        shares = operation_shares(rollout)
        history.updates, history.steps = history.updates + 1, history.steps + len(rollout)
        history.episodes += len(finished)
        history.explained.append(explained)
        history.returns.append(float(np.mean(finished)) if finished else math.nan)
        history.waits.append(shares["wait"])
        self._widen(rollout)
        return self._line(learned, shares)

    def _widen(self, rollout: Rollout[Sight]) -> None:
        seen = Ranges.of(sight.features for sight in rollout.looks)
        self.ranges = seen if self.ranges is None else self.ranges.joined(seen)

    def _line(self, learned: Learned, shares: dict[str, float]) -> dict[str, Any]:
        history = self.history
        return {
            "update": history.updates,
            "steps": history.steps,
            "episodes": history.episodes,
            "mean_return": _plain(history.returns[-1]),
            "explained_variance": _plain(history.explained[-1]),
            "policy_loss": learned.policy_loss,
            "value_loss": learned.value_loss,
            "kl": learned.kl,
            "clipped": learned.clipped,
            "grad_norm": learned.grad_norm,
            "epochs": learned.epochs,
            "entropy": {head: _plain(value) for head, value in zip(self.policy.heads, learned.entropies, strict=True)},
            "operations": shares,
            "problems": history.problems(),
        }

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`load` needs, as a state tree; the tensors are its own, not copies."""
        return {
            "policy": dict(self.policy.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "environment": self.environment.state(),
            "running": self.collector.running,
            "history": dict(vars(self.history)),
            "ranges": None if self.ranges is None else msgspec.to_builtins(self.ranges),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on exactly from what :meth:`state` returned, with a training that was built alike."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.environment.load(state["environment"])
        self.collector.running = state["running"]
        self.history = History(**state["history"])
        self.ranges = None if state["ranges"] is None else msgspec.convert(state["ranges"], Ranges)


def operation_shares(rollout: Rollout[Sight]) -> dict[str, float]:
    """How often each operation was chosen, where there was a choice."""
    rows = [row for row, sight in enumerate(rollout.looks) if not sight.masks.forced]
    counts = torch.bincount(rollout.actions[rows, 0], minlength=len(Operation)).tolist()
    return {operation.name.lower(): counts[operation] / max(1, len(rows)) for operation in Operation}


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
