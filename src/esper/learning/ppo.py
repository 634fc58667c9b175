"""Proximal policy optimisation (Schulman et al. 2017), in one file.

::

    collect   act `steps` times in every episode; an episode that was cut short is worth what the critic says of its
              last look, one that came to its end is worth nothing further
    credit    advantages by GAE(lambda) (Schulman et al. 2016), returns = advantages + values
    learn     some epochs of minibatches: clipped objective, value loss, a floor under the entropy of each head;
              stops early when the policy has moved too far from the one that acted

Generic in what is seen and in the network: an :class:`Actor` puts looks side by side and decides. Decision points at
which there was nothing to choose teach the critic, never the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esper.errors import ConfigError
from esper.learning.environment import VectorEnvironment
from esper.tamiyo.neural.policy import Decided

X = TypeVar("X")
Seen = TypeVar("Seen", contravariant=True)
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


_LEAST_RATE = 0.05


class Actor(Protocol[Seen]):
    """A network that decides: :class:`~esper.tamiyo.neural.policy.Policy`, or another one for other environments."""

    @property
    def heads(self) -> Sequence[str]:
        """Names of the factors of an action."""
        ...

    @property
    def collate(self) -> Callable[[Sequence[Seen]], Any]:
        """Puts looks side by side."""
        ...

    def __call__(self, batch: Any, actions: Tensor | None = None, generator: torch.Generator | None = None) -> Decided:
        """Decide (draw with ``generator``, the likeliest without), or judge ``actions (N, H)``."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """How it learns."""

    steps: int = 64
    """Decision points of each episode between two updates."""
    epochs: int = 4
    minibatch: int = 256
    """Decision points a gradient step."""
    lr: float = 3e-4
    gamma: float = 1.0
    """Discount; none where the reward comes at the end of a fixed horizon."""
    lam: float = 0.95
    """GAE's lambda: 1 trusts what happened, 0 the critic."""
    clip: float = 0.2
    value_clip: float | None = None
    """Farthest the critic may move in an update; ``None``: as far as it will."""
    value_weight: float = 0.5
    entropy_weight: float = 0.0
    """Weight of the mean normalised entropy of all heads."""
    floors: tuple[float, ...] = ()
    """For each head, the normalised entropy below which it is pulled up (empty: none)."""
    floor_weight: float = 0.1
    decay_updates: int | None = None
    """Updates over which learning rate and floors sink (the rate to a twentieth); ``None``: they stay."""
    max_grad_norm: float = 0.5
    target_kl: float | None = 0.03
    """Approximate KL divergence from the acting policy, on one minibatch, at which an update ends; ``None``: never."""
    normalise: bool = True
    """Shift and scale the advantages of an update to mean 0 and deviation 1."""

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("epochs", self.epochs), ("minibatch", self.minibatch)):
            if value < 1:
                raise ConfigError(f"ppo.{name} must be at least 1, got {value}; use {getattr(type(self), name)}")
        for name, value in (("gamma", self.gamma), ("lam", self.lam)):
            if not 0 <= value <= 1:
                raise ConfigError(f"ppo.{name} must lie between 0 and 1, got {value}; use {getattr(type(self), name)}")
        for name, value in (("lr", self.lr), ("clip", self.clip), ("max_grad_norm", self.max_grad_norm)):
            if not value > 0:
                raise ConfigError(f"ppo.{name} must be positive, got {value}; use {getattr(type(self), name)}")


# ----------------------------------------------------------------------------------------------------------------------
# Credit


def gae(rewards: Floats, values: Floats, following: Floats, ended: Bools, gamma: float, lam: float) -> Floats:
    """Generalised advantage estimates.

    Parameters
    ----------
    rewards, values:
        ``(T, N)``: reward of each step, value of what was seen before it.
    following:
        ``(T, N)``: value of what was seen after it, in the same episode: 0 where that was its end, of its last look
        where it was cut short.
    ended:
        ``(T, N)``: the episode went no further, for either reason.

    Returns
    -------
    numpy.ndarray
        ``(T, N)`` advantages.
    """
    found = np.zeros_like(rewards)
    later = np.zeros(rewards.shape[1])
    for t in range(len(rewards) - 1, -1, -1):
        surprise = rewards[t] + gamma * following[t] - values[t]
        later = surprise + gamma * lam * np.where(ended[t], 0.0, later)
        found[t] = later
    return found


def explained_variance(values: Floats, returns: Floats, *, least: float = 0.0) -> float:
    """Share of the returns' variance that the critic foretold; NaN where that variance is not above ``least``."""
    spread = float(np.var(returns))
    return 1.0 - float(np.var(returns - values)) / spread if spread > max(least, 1e-12) else float("nan")


# ----------------------------------------------------------------------------------------------------------------------
# Experience


@dataclass(frozen=True)
class Rollout(Generic[X]):
    """M decision points, with what was done and what came of it. ``returns`` may be NaN where there is no critic."""

    looks: list[X]
    actions: Tensor
    """``(M, H)`` int64."""
    log_probs: Tensor
    """``(M,)``, of the policy that acted."""
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.looks)


@dataclass
class Collector(Generic[X]):
    """Acts in an environment; remembers what its running episodes have earned so far."""

    environment: VectorEnvironment[X]
    generator: torch.Generator
    running: Floats = field(default_factory=lambda: np.zeros(0))

    def reset(self, seed: int) -> None:
        """Begin anew."""
        self.environment.reset(seed)
        self.running = np.zeros(self.environment.num)

    def collect(self, actor: Actor[X], config: PPOConfig) -> tuple[Rollout[X], list[float]]:
        """Act ``config.steps`` times everywhere; also the returns of the episodes that ended meanwhile."""
        num, shape = self.environment.num, (config.steps, self.environment.num)
        looks: list[X] = []
        decided: list[Decided] = []
        rewards, following, ended = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.bool_)
        finished: list[float] = []
        seen = self.environment.look()
        for t in range(config.steps):
            looks += seen
            decided.append(self._decide(actor, seen))
            stepped = self.environment.step(decided[-1].actions.numpy())
            rewards[t], ended[t] = stepped.rewards, stepped.terminated | stepped.truncated
            cut: list[int] = np.flatnonzero(stepped.truncated & ~stepped.terminated).tolist()
            if cut:
                following[t, cut] = _values(self._decide(actor, [stepped.last[row] for row in cut]))
            self.running += stepped.rewards
            finished += self.running[ended[t]].tolist()
            self.running[ended[t]] = 0.0
            seen = self.environment.look()
        values = np.stack([_values(found) for found in decided])
        after = np.concatenate([values[1:], _values(self._decide(actor, seen))[None]])
        following = np.where(ended, following, after)
        advantages = gae(rewards, values, following, ended, config.gamma, config.lam)
        flat = [torch.from_numpy(part.reshape(config.steps * num)).float() for part in (values, advantages)]
        rollout = Rollout(
            looks=looks, actions=torch.cat([found.actions for found in decided]),
            log_probs=torch.cat([found.log_prob for found in decided]), values=flat[0], advantages=flat[1],
            returns=flat[0] + flat[1],
        )  # fmt: skip
        return rollout, finished

    def _decide(self, actor: Actor[X], seen: Sequence[X]) -> Decided:
        with torch.no_grad():
            return actor(actor.collate(seen), generator=self.generator)


def _values(decided: Decided) -> Floats:
    return decided.value.detach().double().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def clipped_objective(log_ratio: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """``(M,)``: the smaller of the plain and the clipped objective, to be made large.

    Its gradient is zero where the ratio has left ``1 +- clip`` in the direction that the advantage asks for.
    """
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(values: Tensor, before: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """``(M,)`` squared errors; with ``clip`` at least those of a critic that is held within it of ``before``."""
    plain = (values - returns).square()
    if clip is None:
        return plain
    held = before + (values - before).clamp(-clip, clip)
    return torch.maximum(plain, (held - returns).square())


def head_entropies(decided: Decided) -> Tensor:
    """``(H,)``: mean normalised entropy of each head where it had something to choose; NaN where it never had."""
    counts = decided.free.sum(0)
    return torch.where(counts > 0, decided.entropy.sum(0) / counts.clamp(min=1), torch.nan)


def left_of(config: PPOConfig, update: int) -> float:
    """What is left of learning rate and floors at an update: 1 at first."""
    return 1.0 if config.decay_updates is None else max(0.0, 1.0 - update / config.decay_updates)


# ----------------------------------------------------------------------------------------------------------------------
# Learning


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What one update did, in means over its minibatches (``kl``: of the last one)."""

    policy_loss: float
    value_loss: float
    kl: float
    clipped: float
    """Share of decision points beyond the clip range."""
    entropies: tuple[float, ...]
    grad_norm: float
    epochs: int
    """Epochs that were begun."""


def learn(
    actor: Actor[X], optimizer: torch.optim.Optimizer, rollout: Rollout[X], config: PPOConfig, *,
    generator: torch.Generator, update: int = 0, least_deviation: float = 0.0,
) -> Learned:  # fmt: skip
    """Improve the actor on a rollout.

    Parameters
    ----------
    generator:
        Orders the minibatches.
    update:
        Its number, for what sinks.
    least_deviation:
        Advantages are divided by at least this: when all actions are as good as each other, their differences are
        noise, and should not be made as large as those of an update with something to learn.
    """
    advantages = _normalised(rollout, least_deviation) if config.normalise else rollout.advantages
    left, told, epoch = left_of(config, update), list[_Told](), 0
    floors = torch.tensor(config.floors) * left
    for group in optimizer.param_groups:
        group["lr"] = config.lr * max(left, _LEAST_RATE)
    limit = float("inf") if config.target_kl is None else config.target_kl
    while epoch < config.epochs and not (told and told[-1].kl > limit):
        epoch += 1
        for rows in torch.randperm(len(rollout), generator=generator).split(config.minibatch):
            told.append(_descend(actor, optimizer, rollout, rows, advantages[rows], floors, config, limit))
            if told[-1].kl > limit:
                break
    return Learned(
        policy_loss=float(np.mean([step.policy_loss for step in told])),
        value_loss=float(np.mean([step.value_loss for step in told])),
        kl=told[-1].kl,
        clipped=float(np.mean([step.clipped for step in told])),
        entropies=tuple(torch.stack([step.entropies for step in told]).nanmean(0).tolist()),
        grad_norm=float(np.mean([step.grad_norm for step in told])),
        epochs=epoch,
    )


@dataclass(frozen=True)
class _Told:
    """What one gradient step tells."""

    policy_loss: float
    value_loss: float
    kl: float
    clipped: float
    grad_norm: float
    entropies: Tensor


def _descend(
    actor: Actor[X], optimizer: torch.optim.Optimizer, rollout: Rollout[X], rows: Tensor, advantages: Tensor,
    floors: Tensor, config: PPOConfig, limit: float,
) -> _Told:  # fmt: skip
    """One gradient step on the decision points ``rows``, unless the policy has moved further than ``limit`` there."""
    decided = actor(actor.collate([rollout.looks[row] for row in rows.tolist()]), rollout.actions[rows])
    parts, heads = _losses(decided, rollout, rows, advantages, config), head_entropies(decided)
    loss = parts.policy + config.value_weight * parts.value - _entropy_bonus(heads, floors, config)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(list(actor.parameters()), config.max_grad_norm)
    if parts.kl <= limit:
        optimizer.step()
    told = parts.policy.item(), parts.value.item(), parts.kl, parts.clipped, norm.item()
    return _Told(*told, heads.detach())


@dataclass(frozen=True)
class _Parts:
    policy: Tensor
    value: Tensor
    kl: float
    clipped: float


def _losses(decided: Decided, rollout: Rollout[X], rows: Tensor, advantages: Tensor, config: PPOConfig) -> _Parts:
    free = decided.free.any(1)
    log_ratio = (decided.log_prob - rollout.log_probs[rows])[free]
    policy = -_safe_mean(clipped_objective(log_ratio, advantages[free], config.clip))
    returns = rollout.returns[rows]
    judged = torch.isfinite(returns)
    value = _safe_mean(
        value_loss(decided.value[judged], rollout.values[rows][judged], returns[judged], config.value_clip)
    )
    with torch.no_grad():
        kl = _safe_mean(log_ratio.exp() - 1 - log_ratio)  # Schulman's estimate: positive, small variance
        clipped = _safe_mean(((log_ratio.exp() - 1).abs() > config.clip).float())
    return _Parts(policy, value, float(kl), float(clipped))


def _safe_mean(values: Tensor) -> Tensor:
    """0 for nothing."""
    return values.sum() / max(1, values.numel())


def _entropy_bonus(heads: Tensor, floors: Tensor, config: PPOConfig) -> Tensor:
    known = torch.isfinite(heads)
    bonus = config.entropy_weight * _safe_mean(heads[known])
    if len(floors):
        bonus = bonus - config.floor_weight * (floors[known] - heads[known]).clamp(min=0).sum()
    return bonus


def _normalised(rollout: Rollout[Any], least: float) -> Tensor:
    """Advantages over those decision points that teach the policy; what is forced has no say in mean and deviation.

    A forced step is one whose action had probability one.
    """
    some = rollout.advantages[rollout.log_probs < 0]
    if some.numel() < 2:
        return rollout.advantages
    return (rollout.advantages - some.mean()) / max(float(some.std()), least, 1e-8)
