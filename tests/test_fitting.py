"""A fit costs no more than its share of the training that is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import Pair
from tests.rigs import QUICK, Rig, attach

import esper
from esper.protocol import Fitted, Lifecycle

pytestmark = pytest.mark.component


def _fitted(total: int | None, share: float | None, start: str = "negative_gradient", steps: int = 200) -> Rig:
    torch.manual_seed(0)
    fit: dict[str, Any] = {"steps": steps, "batch_rows": 32, "min_t": -1e9, "max_share": share}
    rig = attach(Pair(), **{**QUICK, "fit": esper.FitConfig(**fit), "total_steps": total})
    cohort = rig.germinate(start=start)
    rig.until(cohort, Lifecycle.GRAFTING)
    return rig


def _cost(rig: Rig) -> float:
    (event,) = [event for event in rig.events if isinstance(event, Fitted)]
    return event.flops


def test_a_fit_is_shortened_to_its_share_of_what_is_left() -> None:
    free = _cost(_fitted(None, 0.1))
    assert _cost(_fitted(100_000, 0.1)) == free  # a long run affords all of it
    rig = _fitted(400, 0.1)
    training = rig.grower.accounts.training_flops * 400
    assert free / 20 < _cost(rig) < free
    # the fit itself; the check on other rows comes on top. The cohort's own cost counts as training that is left.
    assert rig.grower.ledger.spent["fit"] < 0.1 * training * 2.5
    assert _cost(_fitted(400, None)) == free


def test_a_fit_that_is_too_short_to_be_one_is_left_out() -> None:
    rig = _fitted(60, 0.01)
    (event,) = [event for event in rig.events if isinstance(event, Fitted)]
    assert event.start == "random_zero" and event.flops == 0.0
    (cohort,) = rig.grower.kasmina.cohorts.values()
    assert float(rig.bank(cohort).params["w2"].detach().abs().max()) == 0.0 or cohort.alpha == 1.0
    reasons = [event.reason for event in rig.events if type(event).__name__ == "Transitioned"]
    assert any("sanity" in reason for reason in reasons)


def test_starts_that_fit_nothing_are_not_limited() -> None:
    rig = _fitted(60, 0.0, start="gradmax")
    (event,) = [event for event in rig.events if isinstance(event, Fitted)]
    assert event.start == "gradmax"
