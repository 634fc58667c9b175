"""Clopper-Pearson bounds against closed forms and the binomial sum they are defined by."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import EvidenceError
from esper.evidence.rates import Rate, lower_bound, upper_bound

pytestmark = pytest.mark.unit


def at_most(events: int, trials: int, rate: float) -> float:
    """P(X <= events), summed."""
    return math.fsum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(events + 1))


@pytest.mark.parametrize("trials", [1, 20, 59, 1000])
def test_nothing_seen_has_a_closed_form(trials: int) -> None:
    assert upper_bound(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials), abs=1e-9)
    assert lower_bound(trials, trials) == pytest.approx(0.05 ** (1 / trials), abs=1e-9)
    assert lower_bound(0, trials) == 0.0 and upper_bound(trials, trials) == 1.0


def test_known_answers() -> None:
    """Tables: 59 of 59 show 95% at 95% confidence; 4 of 205 is what decision 0014 states."""
    assert lower_bound(59, 59) > 0.95 > lower_bound(58, 58)
    assert upper_bound(4, 205) == pytest.approx(0.0441, abs=5e-5)


@given(st.integers(1, 60), st.data())
def test_bounds_are_where_the_binomial_tail_is_five_percent(trials: int, data: st.DataObject) -> None:
    events = data.draw(st.integers(0, trials))
    rate = Rate(events, trials)
    assert rate.low <= rate.share <= rate.high
    if events < trials:
        assert at_most(events, trials, rate.high) == pytest.approx(0.05, abs=1e-6)
    if events:
        assert 1 - at_most(events - 1, trials, rate.low) == pytest.approx(0.05, abs=1e-6)


def test_no_trials_tell_nothing() -> None:
    nothing = Rate(0, 0)
    assert math.isnan(nothing.share) and (nothing.low, nothing.high) == (0.0, 1.0)


@pytest.mark.parametrize(("events", "trials"), [(-1, 3), (4, 3)])
def test_counts_that_cannot_be_are_refused(events: int, trials: int) -> None:
    with pytest.raises(EvidenceError, match="count each trial once"):
        Rate(events, trials)
