"""One backward pass gives the slope that each seed's alpha has, and leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.evidence.cohorts import mean_squared_error
from tests.example_sites import attached, plant
from tests.models import Pair, assert_same_state, rows, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.evidence.evaluator import Evaluator
from esper.evidence.ranking import BY_ALPHA, BY_GRADIENT, best, rank
from esper.kasmina.execution import Kasmina

pytestmark = pytest.mark.component

SITE, COHORT = "fc1-fc2", 1
INDICES = (0, 3, 5)


def _trial(zero: bool = False) -> tuple[nn.Module, Kasmina, Evaluator]:
    model = Pair()
    held_out = rows(8)
    kasmina = attached(model, held_out[0][0])
    bank = plant(kasmina, SITE, "bottleneck", units=2, columns=torch.arange(4).view(4, 1), alpha=0.0)
    kasmina.sites[SITE].grafted.discard(COHORT)
    if zero:
        bank.scale_output(0.0)
    kasmina.refresh()
    evaluator = Evaluator(
        model, mean_squared_error, held_out, calibration_share=0.3, confirm_share=0.3, seed=0
    )  # fmt: skip
    return model, kasmina, evaluator


def test_equals_finite_differences_seed_by_seed() -> None:
    _, kasmina, evaluator = _trial()
    ranking = rank(evaluator, kasmina.sites, COHORT, {SITE: False}, INDICES)
    site, h = kasmina.sites[SITE], 1e-2
    site.grafted.add(COHORT)
    kasmina.refresh()
    for slot in range(4):
        losses = []
        for sign in (1, -1):
            site.banks[COHORT].alpha.zero_()[slot] = sign * h
            losses.append(np.mean(evaluator.losses(INDICES)))
        assert ranking.scores[SITE][slot] == pytest.approx(-(losses[0] - losses[1]) / (2 * h), rel=1e-2, abs=1e-5)
    assert ranking.measures == {SITE: BY_ALPHA}


def test_seeds_that_add_nothing_are_ranked_by_their_gradient() -> None:
    model, kasmina, evaluator = _trial(zero=True)
    ranking = rank(evaluator, kasmina.sites, COHORT, {SITE: True}, INDICES)
    bank, site = kasmina.sites[SITE].banks[COHORT], kasmina.sites[SITE]
    assert ranking.measures == {SITE: BY_GRADIENT}
    site.grafted.add(COHORT)
    kasmina.refresh()
    bank.alpha.fill_(1.0)
    bank.set_learning(True)
    model.eval()
    for index in INDICES:
        mean_squared_error(model, evaluator.batches[index]).backward()
    grad = bank.params["w2"].grad
    assert grad is not None
    assert np.allclose(ranking.scores[SITE], (grad / len(INDICES)).flatten(1).norm(dim=1).numpy(), rtol=1e-4)


def test_leaves_no_trace_and_books_its_cost() -> None:
    model, kasmina, evaluator = _trial()
    evaluator.forward_cost = lambda num: 10.0 * num
    site = kasmina.sites[SITE]
    kasmina.watch(True)
    bank = site.banks[COHORT]
    before, alpha = snapshot(model), bank.alpha
    kept = copy.deepcopy({name: value.detach() for name, value in bank.params.items()})
    model.train()
    state = torch.get_rng_state()
    rank(evaluator, kasmina.sites, COHORT, {SITE: False}, INDICES)
    assert_same_state(before, snapshot(model))
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert bank.alpha is alpha and not bank.alpha.requires_grad and not bank.learning
    assert_same_state(kept, {name: value.detach() for name, value in bank.params.items()})
    assert site.grafted == set() and site.recording and site.engaged
    assert site.telemetry is not None and not site.telemetry.reported and site.take_counts() == (0, 0, 0)
    assert evaluator.ledger.spent["evidence"] == 3 * 10.0 * len(INDICES)


def test_a_loss_without_a_gradient_ranks_nothing() -> None:
    _, kasmina, evaluator = _trial()
    evaluator.loss = lambda model, batch: mean_squared_error(model, batch).detach()
    ranking = rank(evaluator, kasmina.sites, COHORT, {SITE: False}, INDICES)
    assert ranking.scores == {} and "returns no gradient" in ranking.reason
    assert best(ranking.scores.get(SITE), 2).size == 0


def _hidden(model: nn.Module, x: Tensor) -> Tensor:
    """The whole model in a reentrant checkpoint: a gradient does not reach what is inside."""
    return checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)


def _beyond(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, model(x), use_reentrant=True)


@pytest.mark.parametrize(
    ("call", "reason"), [(_hidden, "does not reach the seeds"), (_beyond, "the backward pass failed: ")]
)
def test_a_slope_that_cannot_be_had_is_unknown_and_not_zero(
    call: Callable[[nn.Module, Tensor], Tensor], reason: str
) -> None:
    model, kasmina, evaluator = _trial()
    evaluator.loss = lambda model, batch: call(model, batch[0]).square().mean()
    ranking = rank(evaluator, kasmina.sites, COHORT, {SITE: False}, INDICES)
    assert best(ranking.scores.get(SITE), 2).size == 0 and reason in ranking.reason
    assert not kasmina.sites[SITE].banks[COHORT].alpha.requires_grad and all(p.grad is None for p in model.parameters())


def test_best_takes_the_largest_known_scores_and_breaks_ties_by_order() -> None:
    scores = np.array([1.0, np.nan, 3.0, 3.0, -1.0, 3.0, np.inf])
    assert best(scores, 2).tolist() == [2, 3]
    assert best(scores, 4).tolist() == [0, 2, 3, 5]
    assert best(scores, 99).tolist() == [0, 2, 3, 4, 5]
    assert best(np.full(3, np.nan), 2).size == 0
