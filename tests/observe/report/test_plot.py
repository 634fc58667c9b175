"""Scales, ticks, ranges, thinning and safe SVG."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.observe.report import plot, svg

pytestmark = pytest.mark.unit

_FINITE = st.floats(-1e9, 1e9)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.31, 0.42, [0.325, 0.35, 0.375, 0.4]), (0, 0, [0]), (math.nan, 1, [])],
)
def test_ticks_known_answers(low: float, high: float, expected: list[float]) -> None:
    assert plot.ticks(low, high) == pytest.approx(expected)


@given(low=_FINITE, span=st.floats(1e-3, 1e9), count=st.integers(2, 10))
def test_ticks_are_inside_even_and_told_apart(low: float, span: float, count: int) -> None:
    values = plot.ticks(low, low + span, count)
    assert len(values) <= count + 2
    assert all(low - span * 1e-6 <= value <= low + span * (1 + 1e-6) for value in values)


@pytest.mark.parametrize(
    ("value", "step", "label"),
    [(1250, 250, "1.25k"), (1000, 500, "1k"), (500, 500, "500"), (0.35, 0.05, "0.35"), (0.025, 0.025, "0.025"),
     (0.5, 0.25, "0.5"), (0, 1, "0"), (2.5e6, 5e5, "2.5M"), (3e-7, 1e-7, "3.0e-07")],
)  # fmt: skip
def test_tick_labels(value: float, step: float, label: str) -> None:
    assert plot.tick_label(value, step) == label


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_a_range_is_never_empty(values: list[float]) -> None:
    values = [value for value in values if not math.isfinite(value) or abs(value) < 1e300]
    low, high = plot.robust_range(values)
    assert math.isfinite(low) and math.isfinite(high) and low < high


def test_outliers_do_not_flatten_the_rest() -> None:
    low, high = plot.robust_range([1.0] * 50 + [1.1] * 49 + [1e6], high=95.0)
    assert high < 1.2 and low < 1.0


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=600), st.integers(8, 60))
def test_thinning_keeps_ends_and_extremes_and_invents_nothing(ys: list[float], limit: int) -> None:
    points = [(float(x), y) for x, y in enumerate(ys)]
    kept = plot.thin(points, limit)
    assert set(kept) <= set(points) and len(kept) <= max(limit, 4) + 2
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert max(y for _, y in kept) == max(ys) and min(y for _, y in kept) == min(ys)
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})


@given(st.text())
def test_any_text_makes_well_formed_markup(text: str) -> None:
    shown = svg.element("g", svg.text(1.0, 2.0, text), data_tip=text)
    root = ElementTree.fromstring(shown)
    assert len(list(root.iter())) == 2
    assert "<script" not in svg.escape(text + "<script>") and '"' not in svg.escape(text + '"')


def test_a_gap_breaks_the_line_and_steps_hold_their_value() -> None:
    assert svg.polyline([(0, 1), (1, math.nan), (2, 3), (3, 4)], "x").count("M") == 2
    assert 'd="M0 1L2 1L2 5"' in svg.polyline([(0, 1), (2, 5)], "x", steps=True)
    assert svg.polyline([(0, math.nan)], "x") == "" and svg.band([(0, math.inf)], [(0, 0)], "x") == ""


def test_shorten_keeps_both_ends() -> None:
    shown = svg.shorten("encoder.layers.11.mlp.fc1", 12)
    assert len(shown) == 12 and shown.startswith("enco") and shown.endswith("fc1")
