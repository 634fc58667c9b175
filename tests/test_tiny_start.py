"""``tiny`` in a life: it is booked, starts from zero where nothing is left to solve for, ends without a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from tests.models import mse
from tests.rigs import Rig, attach
from torch import nn

import esper
from esper.kasmina.cohort import Cohort
from esper.protocol import Fitted, Lifecycle

pytestmark = pytest.mark.component


def host(hidden: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, 4))


def germinated(model: nn.Module) -> tuple[Rig, Cohort]:
    """A cohort on the span of ``model`` with batches of 16 rows, of which the default captures 8."""
    batches = [(torch.randn(16, 8), torch.randn(16, 4)) for _ in range(16)]
    rig = attach(model, batches=batches, held_out=batches, fit=esper.FitConfig(), capture=esper.CaptureConfig())
    rig.train(2)
    return rig, rig.germinate("0-2", start="tiny", width=9)


def through(rig: Rig, cohort: Cohort) -> Fitted:
    rig.until(cohort, Lifecycle.GRAFTING, limit=20)
    (event,) = [event for event in rig.events if isinstance(event, Fitted)]
    return event


def test_a_cohort_is_trimmed_to_its_rank_grafted_and_booked() -> None:
    rig, cohort = germinated(host())
    assert rig.bank(cohort).units == 4 and any("its rank" in note for note in cohort.notes)
    event = through(rig, cohort)
    assert event.start == "tiny" and math.isfinite(event.t_statistic) and event.flops > 0
    assert rig.grower.ledger.spent["fit"] == event.flops


def test_where_the_last_layer_explains_all_rows_units_start_from_zero_and_are_not_culled() -> None:
    """100 hidden units fit the gradient of 12 rows exactly: nothing is left for new ones."""
    torch.manual_seed(0)
    model = host(hidden=100)
    batches = [(torch.randn(2, 8), torch.randn(2, 4)) for _ in range(10)]
    rig = attach(model, batches=batches, fit=esper.FitConfig(), capture=esper.CaptureConfig())
    rig.train(2)
    cohort = rig.germinate("0-2", start="tiny", width=3)
    event = through(rig, cohort)
    assert event.explained == 0.0 and math.isnan(event.t_statistic)
    params = rig.bank(cohort).params
    assert cohort.members["0-2"].preserves_function and not params["w2"].any() and params["w1"].any()
    rig.train(3)
    assert params["w2"].any(), "they learn from there"


def test_without_any_gradient_it_ends() -> None:
    rig, cohort = germinated(host())
    for _ in range(10):
        loss = 0.0 * mse(rig.model, rig.batches[0])
        loss.backward()
        rig.optimizer.step()
        rig.optimizer.zero_grad()
        rig.grower.step(loss)
    assert not rig.grower.kasmina.cohorts and [verdict.cohort for verdict in rig.grower.verdicts] == [cohort.number]
    assert rig.grower.verdicts[0].state is Lifecycle.CULLED and "t statistic" in rig.grower.verdicts[0].reason
