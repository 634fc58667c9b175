"""Composed actions as probabilities: one masked choice a factor.

An invalid value has probability exactly zero. A factor that is not asked for, or that leaves nothing to choose, has
log-probability 0 and entropy 0, and gives no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """N choices of one factor.

    Attributes
    ----------
    value:
        ``(N,)`` int64; -1 where the factor is not asked for.
    log_prob:
        ``(N,)``: of that value, 0 where it is not asked for.
    entropy:
        ``(N,)``: over the log of the number of valid values, so that 1 is uniform; 0 where there is nothing to choose.
    free:
        ``(N,)`` bool: more than one value was valid.
    """

    value: Tensor
    log_prob: Tensor
    entropy: Tensor
    free: Tensor


def log_probabilities(logits: Tensor, valid: Tensor) -> Tensor:
    """``(N, V)`` log-probabilities, minus infinity where not ``valid``; rows without any valid value are uniform."""
    some = valid | ~valid.any(dim=-1, keepdim=True)
    return torch.log_softmax(logits.masked_fill(~some, -torch.inf), dim=-1)


def choose(
    logits: Tensor,
    valid: Tensor,
    asked: Tensor,
    *,
    chosen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Choice:
    """Make one choice a row, or look at those already ``chosen``.

    Parameters
    ----------
    logits, valid:
        ``(N, V)``.
    asked:
        ``(N,)`` bool: rows where the factor is asked for; each has a valid value.
    chosen:
        ``(N,)``; what is not asked for is not read. ``None`` draws with ``generator``, or takes the likeliest value
        (the first of equals) without one.
    """
    logs = log_probabilities(logits, valid)
    if chosen is None:
        value = logs.argmax(-1) if generator is None else _drawn(logs, generator)
    else:
        value = chosen.clamp(min=0)
    num = valid.sum(-1)
    free = asked & (num > 1)
    taken = logs.gather(-1, value[:, None]).squeeze(-1)
    log_prob = torch.where(free, taken, torch.zeros_like(taken))
    finite = logs.masked_fill(~torch.isfinite(logs), 0.0)
    raw = -(finite.exp() * finite * valid).sum(-1)
    unit = num.clamp(min=2).to(raw.dtype).log()
    entropy = torch.where(free, raw / unit, torch.zeros_like(raw))
    return Choice(torch.where(asked, value, -1), log_prob, entropy, free)


def _drawn(logs: Tensor, generator: torch.Generator) -> Tensor:
    """One value a row by inverting the distribution function with one uniform number a row."""
    steps = logs.double().exp().cumsum(-1)
    at = torch.rand((len(logs), 1), generator=generator, dtype=torch.float64, device=logs.device) * steps[:, -1:]
    # A value of probability zero is never the first whose sum exceeds the number, which is below the whole.
    return (steps <= at).sum(-1).clamp(max=logs.shape[-1] - 1)
