"""First choices: every kind has a blueprint that can sit on it, and a start that is known."""

from __future__ import annotations

import pytest

from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.defaults import (
    MOST_TIMES_ITS_RANK,
    ROWS_A_WEIGHT,
    ROWS_FOR_A_FIT,
    default_blueprint,
    default_start,
    has_too_few,
)
from esper.kasmina.starts import STARTS
from esper.protocol import SiteKind

pytestmark = pytest.mark.unit

OTHERS = [kind for kind in SiteKind if kind not in (SiteKind.LINEAR_SPAN, SiteKind.LINEAR_GATED_SPAN)]


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


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("expected_rows", [1, ROWS_FOR_A_FIT - 1, 10 * ROWS_FOR_A_FIT])
def test_nothing_else_is_fitted_or_solved_for_by_default(kind: SiteKind, expected_rows: int) -> None:
    assert default_start(kind, adaptive=True, expected_rows=expected_rows) == "random_zero"


def test_solving_needs_two_rows_for_each_weight_that_is_solved_for() -> None:
    assert ROWS_A_WEIGHT == 2
    for weights, start in ((0, "tiny"), (250, "tiny"), (251, "random_zero")):
        assert default_start(SiteKind.LINEAR_SPAN, adaptive=True, expected_rows=500, weights=weights) == start
    fit = default_start(SiteKind.LINEAR_SPAN, adaptive=True, expected_rows=ROWS_FOR_A_FIT, weights=10**6)
    assert fit == "negative_gradient", "a fit by gradient steps needs no such number"


def test_a_start_is_no_default_for_more_than_three_times_as_many_units_as_it_has_directions() -> None:
    assert MOST_TIMES_ITS_RANK == 3
    assert not has_too_few(5, 5) and not has_too_few(5, 15) and has_too_few(5, 16) and has_too_few(0, 1)
