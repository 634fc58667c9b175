from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.protocol import Lifecycle, Verdict
from esper.tamiyo.stopping import gain_per_cost, reason_to_stop

pytestmark = pytest.mark.unit

Build = Callable[..., Verdict]


def test_gain_per_cost(verdict: Build) -> None:
    assert gain_per_cost(verdict(gain=0.1, cost=0.25), 2.0) == pytest.approx(0.2)
    assert gain_per_cost(verdict(gain=0.1, cost=0.25), -2.0) == pytest.approx(0.2)  # log-likelihoods may be negative


@pytest.mark.parametrize(
    ("gain", "cost", "held_out"),
    [(math.nan, 0.1, 1.0), (0.1, math.nan, 1.0), (0.1, 0.0, 1.0), (0.1, 0.1, math.nan), (0.1, 0.1, 0.0)],
)
def test_unknown_gain_per_cost(verdict: Build, gain: float, cost: float, held_out: float) -> None:
    assert math.isnan(gain_per_cost(verdict(gain=gain, cost=cost), held_out))
    assert reason_to_stop([verdict(gain=gain, cost=cost)], held_out, 0.02, 1) is not None


def test_goes_on_while_it_pays(verdict: Build) -> None:
    assert reason_to_stop([], 1.0, 0.02, 1) is None
    assert reason_to_stop([verdict()] * 5, 1.0, 0.02, 1) is None


def test_reason_below_threshold(verdict: Build) -> None:
    poor = [verdict(gain=0.0008, cost=0.1), verdict(gain=0.0011, cost=0.1)]
    assert reason_to_stop(poor[:1], 1.0, 0.02, 2) is None
    assert reason_to_stop(poor, 1.0, 0.02, 2) == "gain per cost below threshold: 0.011 < 0.02 for 2 cohorts in a row"
    assert reason_to_stop(poor[:1], 1.0, 0.02, 1) == "gain per cost below threshold: 0.008 < 0.02 for 1 cohort"


def test_reason_rejected(verdict: Build) -> None:
    culled = verdict(Lifecycle.CULLED, gain=math.nan, reason="gain not above zero")
    back = verdict(Lifecycle.ROLLED_BACK)
    assert reason_to_stop([back, culled], 1.0, 0.02, 2) == "2 cohorts in a row rejected (last: gain not above zero)"
    assert reason_to_stop([culled, back], 1.0, 0.02, 2) == "2 cohorts in a row rejected (last: no reason given)"


def test_reason_mixed(verdict: Build) -> None:
    row = [verdict(gain=0.0011, cost=0.1), verdict(Lifecycle.CULLED, reason="p = .41")]
    assert reason_to_stop(row, 1.0, 0.02, 2) == (
        "2 cohorts in a row did not pay: 1 rejected (last: p = .41), 1 with gain per cost 0.011 < 0.02"
    )


def test_reason_unknown(verdict: Build) -> None:
    assert reason_to_stop([verdict(gain=math.nan)], 1.0, 0.02, 1) == (
        "gain per cost below threshold: unknown < 0.02 for 1 cohort"
    )


def test_success_interrupts_and_cancelled_does_not(verdict: Build) -> None:
    good, bad, cancelled = verdict(), verdict(Lifecycle.CULLED), verdict(Lifecycle.CANCELLED)
    assert reason_to_stop([bad, good, bad], 1.0, 0.02, 2) is None
    assert reason_to_stop([bad, cancelled, bad], 1.0, 0.02, 2) is not None
    assert reason_to_stop([cancelled] * 9, 1.0, 0.02, 1) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.text("gbc", max_size=12), patience=st.integers(1, 4))
def test_stops_exactly_after_patience_failures(verdict: Build, row: str, patience: int) -> None:
    kinds = {"g": verdict(), "b": verdict(Lifecycle.CULLED), "c": verdict(Lifecycle.CANCELLED)}
    trailing = row.replace("c", "").rpartition("g")[2]
    stops = reason_to_stop([kinds[kind] for kind in row], 1.0, 0.02, patience) is not None
    assert stops == (len(trailing) >= patience)
