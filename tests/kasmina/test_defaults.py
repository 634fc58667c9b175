"""First choices: every kind has a blueprint that can sit on it, and a start that is known."""

from __future__ import annotations

import pytest

from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.defaults import ROWS_FOR_A_FIT, default_blueprint, default_start
from esper.kasmina.starts import STARTS
from esper.protocol import SiteKind

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", SiteKind)
def test_every_kind_has_a_blueprint_and_a_start(kind: SiteKind) -> None:
    assert kind in BLUEPRINTS[default_blueprint(kind)].kinds
    for adaptive in (False, True):
        assert default_start(kind, adaptive=adaptive, expected_rows=ROWS_FOR_A_FIT) in STARTS


@pytest.mark.parametrize("kind", [SiteKind.LINEAR_SPAN, SiteKind.LINEAR_GATED_SPAN])
def test_a_fit_is_tried_with_enough_rows_under_an_adaptive_optimizer(kind: SiteKind) -> None:
    assert default_start(kind, adaptive=True, expected_rows=ROWS_FOR_A_FIT) == "negative_gradient"
    assert default_start(kind, adaptive=True, expected_rows=ROWS_FOR_A_FIT - 1) == "random_zero"
    assert default_start(kind, adaptive=False, expected_rows=ROWS_FOR_A_FIT) == "random_zero"


def test_convolutions_are_never_fitted_by_default() -> None:
    assert default_start(SiteKind.CONV_SPAN, adaptive=True, expected_rows=10 * ROWS_FOR_A_FIT) == "random_zero"
