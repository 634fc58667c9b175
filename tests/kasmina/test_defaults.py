"""First choices: every kind has a blueprint that can sit on it, and a start that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import Pair, rows
from tests.rigs import Rig, adamw, attach, momentum_sgd
from torch import nn

import esper
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.cohort import Cohort
from esper.kasmina.defaults import (
    MOST_TIMES_ITS_RANK,
    ROWS_A_WEIGHT,
    ROWS_FOR_A_FIT,
    default_blueprint,
    default_start,
    has_too_few,
)
from esper.kasmina.starts import STARTS
from esper.protocol import Lifecycle, SiteKind

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", SiteKind)
def test_every_kind_has_a_blueprint_and_a_start(kind: SiteKind) -> None:
    assert kind in BLUEPRINTS[default_blueprint(kind)].kinds
    for adaptive in (False, True):
        for expected_rows in (1, ROWS_FOR_A_FIT):
            assert default_start(kind, adaptive=adaptive, expected_rows=expected_rows) in STARTS


@pytest.mark.parametrize(
    ("kind", "with_few"), [(SiteKind.LINEAR_SPAN, "tiny"), (SiteKind.LINEAR_GATED_SPAN, "random_zero")]
)
def test_a_fit_is_tried_with_enough_rows_under_an_adaptive_optimizer(kind: SiteKind, with_few: str) -> None:
    assert default_start(kind, adaptive=True, expected_rows=ROWS_FOR_A_FIT) == "negative_gradient"
    assert default_start(kind, adaptive=True, expected_rows=ROWS_FOR_A_FIT - 1) == with_few
    for expected_rows in (ROWS_FOR_A_FIT, ROWS_FOR_A_FIT - 1):
        assert default_start(kind, adaptive=False, expected_rows=expected_rows) == "random_zero"


@pytest.mark.parametrize("kind", set(SiteKind) - {SiteKind.LINEAR_SPAN, SiteKind.LINEAR_GATED_SPAN})
@pytest.mark.parametrize("expected_rows", [1, ROWS_FOR_A_FIT - 1, 10 * ROWS_FOR_A_FIT])
def test_nothing_else_is_fitted_or_solved_for_by_default(kind: SiteKind, expected_rows: int) -> None:
    assert default_start(kind, adaptive=True, expected_rows=expected_rows) == "random_zero"


def test_a_start_is_no_default_for_more_than_four_times_as_many_units_as_it_has_directions() -> None:
    assert MOST_TIMES_ITS_RANK == 4
    assert not has_too_few(5, 5) and not has_too_few(5, 20) and has_too_few(5, 21) and has_too_few(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# In a germination


def host(outputs: int = 4, inputs: int = 8, hidden: int = 6, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, outputs))


def germinated(model: nn.Module, *, fit_start: str | None = None, sgd: bool = False, **plan: Any) -> tuple[Rig, Cohort]:
    """A cohort on the span of ``model`` with batches of 16 rows, of which the default captures 8."""
    optimizer = (momentum_sgd if sgd else adamw)(model)
    inputs, outputs = model[0].in_features, model[2].out_features  # type: ignore[index]
    batches = [(torch.randn(16, inputs), torch.randn(16, outputs)) for _ in range(10)]
    rig = attach(
        model, optimizer, batches=batches, held_out=batches[:4], fit=esper.FitConfig(start=fit_start),
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
    ("asked", "start", "width"), [(2, "tiny", 2), (3, "tiny", 2), (8, "tiny", 2), (9, "random_zero", 9)]
)
def test_a_default_is_trimmed_to_its_rank_and_left_where_that_is_too_little(asked: int, start: str, width: int) -> None:
    """Two outputs: two directions."""
    rig, cohort = germinated(host(outputs=2), width=asked)
    assert (start_of(rig, cohort), rig.bank(cohort).units) == (start, width)
    told = [note for note in cohort.notes if "its rank" in note]
    assert bool(told) == (width < asked)


def test_what_was_asked_for_by_name_is_trimmed_however_few_its_directions() -> None:
    for found in (germinated(host(outputs=2), width=9, start="tiny"), germinated(host(outputs=2), width=9, fit_start="tiny")):
        assert (start_of(*found), found[0].bank(found[1]).units) == ("tiny", 2)


def test_seeds_of_a_site_have_their_own_few_directions() -> None:
    """Of four seeds on eight outputs each writes two: of nine units a seed tiny makes too few."""
    rig, cohort = germinated(host(outputs=8), seeds=4, width=8)
    assert start_of(rig, cohort) == "tiny" and rig.bank(cohort).units == 2
    rig, cohort = germinated(host(outputs=8), seeds=4, width=9)
    assert start_of(rig, cohort) == "random_zero" and rig.bank(cohort).units == 9


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
