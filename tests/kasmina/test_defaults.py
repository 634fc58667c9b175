"""First choices: every kind has a blueprint that can sit on it, and a start that is known."""

from __future__ import annotations

import dataclasses

import pytest

from esper.config import CaptureConfig
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.defaults import (
    MOST_TIMES_ITS_RANK,
    ROWS_A_WEIGHT,
    ROWS_FOR_A_FIT,
    default_blueprint,
    default_start,
    has_too_few,
    rows_to_solve_on,
)
from esper.kasmina.starts import STARTS
from esper.protocol import SiteKind

pytestmark = pytest.mark.unit

OTHERS = [kind for kind in SiteKind if kind not in (SiteKind.LINEAR_SPAN, SiteKind.LINEAR_GATED_SPAN)]


BATCHES = 8
CAPTURE = CaptureConfig(batches=BATCHES)
ENOUGH = ROWS_FOR_A_FIT // BATCHES
"""Rows of a batch with which a fit is tried."""


def chosen(kind: SiteKind, batch_rows: int, *, adaptive: bool = True, weights: int = 4, **capture: int) -> str:
    return default_start(
        kind, adaptive=adaptive, batch_rows=batch_rows, capture=dataclasses.replace(CAPTURE, **capture), weights=weights
    )


@pytest.mark.parametrize("kind", SiteKind)
def test_every_kind_has_a_blueprint_and_a_start(kind: SiteKind) -> None:
    assert kind in BLUEPRINTS[default_blueprint(kind)].kinds
    for adaptive in (False, True):
        for batch_rows in (1, ENOUGH):
            assert chosen(kind, batch_rows, adaptive=adaptive) in STARTS


@pytest.mark.parametrize(
    ("kind", "with_few"), [(SiteKind.LINEAR_SPAN, "tiny"), (SiteKind.LINEAR_GATED_SPAN, "random_zero")]
)
def test_a_fit_is_tried_with_enough_rows_under_an_adaptive_optimizer(kind: SiteKind, with_few: str) -> None:
    assert chosen(kind, ENOUGH) == "negative_gradient"
    assert chosen(kind, ENOUGH - 1) == with_few
    for batch_rows in (ENOUGH, ENOUGH - 1):
        assert chosen(kind, batch_rows, adaptive=False) == "random_zero"


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("batch_rows", [1, ENOUGH - 1, 10 * ENOUGH])
def test_nothing_else_is_fitted_or_solved_for_by_default(kind: SiteKind, batch_rows: int) -> None:
    assert chosen(kind, batch_rows) == "random_zero"


def test_solving_needs_two_rows_for_each_weight_that_is_solved_for() -> None:
    assert ROWS_A_WEIGHT == 2
    span = SiteKind.LINEAR_SPAN
    for weights, start in ((0, "tiny"), (300, "tiny"), (301, "random_zero")):
        assert chosen(span, 100, weights=weights) == start, "a quarter of the 800 rows is for checking"
    assert chosen(span, 100, weights=10**6, batches=20) == "negative_gradient", "a fit by steps needs no such number"


def test_rows_to_solve_on_are_those_that_are_kept_and_not_checked_on() -> None:
    assert rows_to_solve_on(64, CaptureConfig(batches=4)) == 192
    assert rows_to_solve_on(64, CaptureConfig(batches=2)) == 64
    assert rows_to_solve_on(64, CaptureConfig(batches=8, rows=32)) == 24
    assert chosen(SiteKind.LINEAR_SPAN, 16, weights=40, rows=32) == "random_zero"
    assert chosen(SiteKind.LINEAR_SPAN, 16, weights=40) == "tiny"


def test_a_start_is_no_default_for_more_than_three_times_as_many_units_as_it_has_directions() -> None:
    assert MOST_TIMES_ITS_RANK == 3
    assert not has_too_few(5, 5) and not has_too_few(5, 15) and has_too_few(5, 16) and has_too_few(0, 1)
