"""Credit from branches: several actions tried from one and the same snapshot, under the same random numbers.

What an action is worth is then its return against those of its siblings, and no critic has to guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.errors import ConfigError
from esper.learning.ppo import Rollout

X = TypeVar("X")
Floats = npt.NDArray[np.float64]


def relative_advantages(returns: Floats, *, scaled: bool = True) -> Floats:
    """Each branch's return over the mean of its siblings (itself left out, so that the baseline does not know it).

    Parameters
    ----------
    returns:
        ``(G, K)``: K branches of each of G decision points; NaN where a branch failed.
    scaled:
        Divide everything by one deviation, pooled within groups over all of them. A deviation for each group would
        blow up those groups in which every action is as good as any other.

    Returns
    -------
    numpy.ndarray
        ``(G, K)``; 0 where a branch failed, and in groups with fewer than two that did not.
    """
    known = np.isfinite(returns)
    num = known.sum(axis=1, keepdims=True)
    total = np.where(known, returns, 0.0).sum(axis=1, keepdims=True)
    others = (total - np.where(known, returns, 0.0)) / np.maximum(num - 1, 1)
    found = np.where(known & (num > 1), returns - others, 0.0)
    if not scaled:
        return found
    spread = within_deviation(returns)
    return found / spread if spread > 0 else found


def within_deviation(returns: Floats) -> float:
    """Standard deviation of branches about the mean of their group, pooled; 0 where nothing can be compared."""
    known = np.isfinite(returns)
    num = known.sum(axis=1, keepdims=True)
    means = np.where(known, returns, 0.0).sum(axis=1, keepdims=True) / np.maximum(num, 1)
    squares = np.where(known, np.square(returns - means), 0.0).sum()
    freedom = int(np.maximum(num - 1, 0).sum())
    return float(np.sqrt(squares / freedom)) if freedom else 0.0


def rollout_of_branches(
    looks: Sequence[X], actions: Tensor, log_probs: Tensor, returns: Floats, *, scaled: bool = True
) -> Rollout[X]:
    """What :func:`esper.learning.ppo.learn` learns from when actions were branched; the critic is left alone.

    Parameters
    ----------
    looks:
        G decision points.
    actions, log_probs:
        ``(G, K, H)`` and ``(G, K)``: what was tried at each, and how likely the policy was to do it.
    returns:
        ``(G, K)``; NaN where a branch failed: it teaches nothing.

    Raises
    ------
    ConfigError
        Shapes that do not go together.
    """
    if not len(looks) == len(actions) == len(log_probs) == len(returns) or actions.shape[:2] != returns.shape:
        raise ConfigError(
            f"branches need one row a decision point, got {len(looks)} looks, actions {tuple(actions.shape)}, "
            f"log_probs {tuple(log_probs.shape)} and returns {returns.shape}; give (G, K, H), (G, K) and (G, K)"
        )
    advantages = relative_advantages(returns, scaled=scaled)
    kept = np.argwhere(np.isfinite(returns))
    rows = torch.from_numpy(kept[:, 0] * returns.shape[1] + kept[:, 1])
    nothing = torch.full((len(kept),), torch.nan)
    return Rollout(
        looks=[looks[group] for group in kept[:, 0].tolist()],
        actions=actions.flatten(0, 1)[rows],
        log_probs=log_probs.flatten()[rows],
        values=nothing,
        advantages=torch.from_numpy(advantages.flatten()).float()[rows],
        returns=nothing,
    )
