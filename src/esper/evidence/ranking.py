"""Which seeds of a large cohort are worth grafting: first-order gains of all of them from one backward pass.

A branch enters the forward pass as ``alpha * branch(x)``. With alpha a leaf at 0, the gradient of the held-out loss
gives ``-dL/dalpha``, the loss that each seed would save to first order, for any number of seeds at once. A branch that
adds nothing yet (zero output, or zero input weights) has no such slope; what it has is the size of the gradient that
its own weights receive, which is how fast it begins to learn (GradMax's measure: Evci et al. 2022).

This ranks seeds; it proves nothing of any of them. The judge has the last word on the cohort.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.evidence.evaluator import Evaluator
from esper.kasmina.isolation import undisturbed
from esper.kasmina.site import Site

BY_ALPHA = "-dL/dalpha"
BY_GRADIENT = "the size of their gradient"

Gains = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """``scores[site]``: ``(S,)`` float64, larger is better; ``measures`` names what it is. ``reason`` says why not."""

    scores: dict[str, Gains] = field(default_factory=dict[str, Gains])
    measures: dict[str, str] = field(default_factory=dict[str, str])
    reason: str = "its gradient is not finite or does not reach the seeds"


def best(scores: Gains | None, keep: int | None) -> npt.NDArray[np.int64]:
    """Positions of the ``keep`` largest finite scores, ascending; ties go to the first. Empty where none is known."""
    if scores is None or keep is None:
        return np.zeros(0, dtype=np.int64)
    known = np.flatnonzero(np.isfinite(scores))
    order = known[np.argsort(-scores[known], kind="stable")]
    return np.sort(order[:keep]).astype(np.int64)


def rank(
    evaluator: Evaluator, sites: Mapping[str, Site], cohort: int, members: Mapping[str, bool], indices: Sequence[int]
) -> Ranking:
    """Rank a cohort's seeds on the sites ``members`` over the held-out batches ``indices``.

    ``members`` says of each site whether its branches add nothing yet. Nothing of the host or the branches changes;
    three forward passes a batch are booked as evidence.
    """
    sums: dict[str, list[Tensor]] = {}
    with undisturbed(evaluator.model), _quiet(sites), _exposed(sites, cohort, members) as leaves, torch.enable_grad():
        flat = [leaf for group in leaves.values() for leaf in group]
        for index in indices:
            loss = evaluator.loss(evaluator.model, evaluator.batches[index])
            if not getattr(loss, "requires_grad", False):  # a user's loss may return a plain number
                return Ranking(reason="loss(model, batch) returns no gradient; return the loss as a tensor")
            try:
                gradients = iter(_gradients(loss, flat))
            except RuntimeError as error:  # reentrant checkpointing, or a graph that the model has detached
                return Ranking(reason=f"the backward pass failed: {error}")
            for name, group in leaves.items():
                new = [next(gradients) for _ in group]
                sums[name] = [a + b for a, b in zip(sums[name], new, strict=True)] if name in sums else new
    evaluator.ledger.add("evidence", 3.0 * evaluator.forward_cost(len(indices)))
    scores = {name: _score(sums[name], zero) / len(indices) for name, zero in members.items()}
    return Ranking(scores, {name: BY_GRADIENT if zero else BY_ALPHA for name, zero in members.items()})


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """NaN for what the backward pass does not reach: that (a reentrant checkpoint hides it) is unknown, not zero."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    pairs: list[tuple[Tensor | None, Tensor]] = list(zip(found, leaves, strict=True))
    return [torch.full_like(leaf, float("nan")) if gradient is None else gradient for gradient, leaf in pairs]


def _score(gradients: list[Tensor], zero: bool) -> Gains:
    if not zero:
        return -gradients[0].double().cpu().numpy()
    squares = torch.stack([gradient.double().flatten(1).square().sum(1) for gradient in gradients])
    return squares.sum(0).sqrt().cpu().numpy()


@contextmanager
def _quiet(sites: Mapping[str, Site]) -> Generator[None, None, None]:
    """No telemetry, captures or counts: this is no training step."""
    before = [(site, site.recording) for site in sites.values()]
    try:
        for site, _ in before:
            site.recording = False
        yield
    finally:
        for site, recording in before:
            site.recording = recording
            site.refresh()


@contextmanager
def _exposed(
    sites: Mapping[str, Site], cohort: int, members: Mapping[str, bool]
) -> Generator[dict[str, list[Tensor]], None, None]:
    """The cohort in the forward pass: at alpha 0 with alpha a leaf, or at 1 with its weights as leaves."""
    banks = {name: sites[name].banks[cohort] for name in members}
    alphas = {name: bank.alpha for name, bank in banks.items()}
    leaves: dict[str, list[Tensor]] = {}
    try:
        for name, bank in banks.items():
            if members[name]:
                bank.alpha = torch.ones_like(alphas[name])
                bank.set_learning(True)
                leaves[name] = list(bank.params.values())
            else:
                bank.alpha = torch.zeros_like(alphas[name]).requires_grad_()
                leaves[name] = [bank.alpha]
            sites[name].grafted.add(cohort)
            sites[name].refresh()
        yield leaves
    finally:
        for name, bank in banks.items():
            bank.alpha = alphas[name]
            bank.set_learning(False)
            sites[name].grafted.discard(cohort)
            sites[name].refresh()
