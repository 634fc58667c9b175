"""The start of a seed where nobody names one: what is solved for where that has enough to go by, else a random one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.models import Pair, mse
from tests.rigs import Rig, adamw, attach, keep_visible, momentum_sgd
from torch import nn

import esper
from esper.kasmina.cohort import Cohort
from esper.protocol import Cancel, Fitted, Lifecycle

pytestmark = pytest.mark.component


def host(outputs: int = 4, inputs: int = 8, hidden: int = 6, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, outputs))


def germinated(model: nn.Module, *, fit_start: str | None = None, sgd: bool = False, **plan: Any) -> tuple[Rig, Cohort]:
    """A cohort on the span of ``model`` with batches of 16 rows, of which the default captures 8."""
    optimizer = (momentum_sgd if sgd else adamw)(model)
    inputs, outputs = model[0].in_features, model[2].out_features  # type: ignore[index]
    batches = [(torch.randn(16, inputs), torch.randn(16, outputs)) for _ in range(16)]
    rig = attach(
        model, optimizer, batches=batches, held_out=batches, fit=esper.FitConfig(start=fit_start),
        capture=esper.CaptureConfig(),
    )  # fmt: skip
    rig.train(2)
    return rig, rig.germinate("0-2", **{"start": None, "width": 4, **plan})


def start_of(rig: Rig, cohort: Cohort) -> str:
    return cohort.members["0-2"].start


def test_a_small_linear_span_starts_as_tiny() -> None:
    assert start_of(*germinated(host())) == "tiny"
    assert start_of(*germinated(host(), sgd=True)) == "random_zero"
    assert start_of(*germinated(host(), fit_start="random_zero")) == "random_zero"
    assert start_of(*germinated(host(), start="gradmax", fit_start="random_zero")) == "gradmax"


@pytest.mark.parametrize(
    ("asked", "start", "width"), [(2, "tiny", 2), (3, "tiny", 2), (6, "tiny", 2), (7, "random_zero", 7)]
)
def test_a_default_is_trimmed_to_its_rank_and_left_where_that_is_too_little(asked: int, start: str, width: int) -> None:
    """Two outputs: two directions."""
    rig, cohort = germinated(host(outputs=2), width=asked)
    assert (start_of(rig, cohort), rig.bank(cohort).units) == (start, width)
    told = [note for note in cohort.notes if "its rank" in note]
    assert bool(told) == (width < asked)


def test_what_was_asked_for_by_name_is_trimmed_however_few_its_directions() -> None:
    for found in (
        germinated(host(outputs=2), width=9, start="tiny"),
        germinated(host(outputs=2), width=9, fit_start="tiny"),
    ):
        assert (start_of(*found), found[0].bank(found[1]).units) == ("tiny", 2)


def test_seeds_of_a_site_have_their_own_few_directions() -> None:
    """Of four seeds on eight outputs each writes two: of seven units a seed tiny makes too few."""
    rig, cohort = germinated(host(outputs=8), seeds=4, width=6)
    assert start_of(rig, cohort) == "tiny" and rig.bank(cohort).units == 2
    rig, cohort = germinated(host(outputs=8), seeds=4, width=7)
    assert start_of(rig, cohort) == "random_zero" and rig.bank(cohort).units == 7


def test_a_plan_that_is_scaled_has_a_draw_to_scale() -> None:
    rig, cohort = germinated(host(), scale=2.0)
    assert (start_of(rig, cohort), cohort.members["0-2"].scale) == ("random_zero", 2.0)
    same, twin = germinated(host(), start="random_zero")
    assert torch.equal(rig.bank(cohort).params["w1"], 2.0 * same.bank(twin).params["w1"])
    assert start_of(*germinated(host(), lr_scale=0.5)) == "tiny"


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus()])
def test_where_tiny_cannot_be_made_the_default_is_random(activation: nn.Module) -> None:
    """An activation that is not 0 at 0."""
    rig = attach(Pair(act=activation))
    assert rig.germinate(start=None).members["fc1-fc2"].start == "random_zero"


@pytest.mark.parametrize(
    ("inputs", "hidden", "start"), [(47, 6, "tiny"), (48, 6, "random_zero"), (8, 47, "tiny"), (8, 48, "random_zero")]
)
def test_solving_needs_twice_as_many_rows_as_it_solves_for_weights(inputs: int, hidden: int, start: str) -> None:
    """Eight batches of 16 rows, six of them to solve on: 96, for units of at most 47 inputs and a bias."""
    assert start_of(*germinated(host(inputs=inputs, hidden=hidden))) == start
    assert start_of(*germinated(host(inputs=inputs, hidden=hidden), start="tiny")) == "tiny"


def test_what_has_grown_counts_among_the_weights() -> None:
    rig, _ = germinated(host(hidden=60))
    rig.order(Cancel(cohort=1, reason="test"))
    rig.grower.kasmina.table.embargo_until[:] = 0
    keep_visible(rig, "0-2", 4)
    assert start_of(rig, rig.germinate("0-2", start=None)) == "random_zero"


# ----------------------------------------------------------------------------------------------------------------------
# What becomes of it


def through(rig: Rig, cohort: Cohort) -> Fitted:
    rig.until(cohort, Lifecycle.GRAFTING, limit=20)
    (event,) = [event for event in rig.events if isinstance(event, Fitted)]
    return event


def test_a_default_cohort_is_grafted_and_booked() -> None:
    rig, cohort = germinated(host())
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
