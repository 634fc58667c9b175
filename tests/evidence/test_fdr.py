from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import EvidenceError
from esper.evidence.eprocess import PairedEProcess, robust_scale
from esper.evidence.fdr import OnlineFDR, discount

pytestmark = pytest.mark.unit


def test_discount_sums_to_one() -> None:
    num = 100_000
    head = sum(discount(t) for t in range(1, num + 1))
    # The rest, from n = num + 2 on, is the integral of 1 / (x log(x)^2): 1 / log(num + 1.5), scaled alike.
    tail = discount(1) * 2 * math.log(2) ** 2 / math.log(num + 1.5)
    assert head + tail == pytest.approx(1.0, abs=1e-9)


def test_thresholds_by_hand() -> None:
    fdr = OnlineFDR(0.05)
    assert fdr.threshold() == pytest.approx(40.545, abs=1e-3)  # 20 * 2 * log(2)^2 * 2.10974
    fdr.record(True)
    assert fdr.threshold() == pytest.approx(20 * 3 * math.log(3) ** 2 * 2.1097428 / 2, rel=1e-6)
    fdr.record(False)
    assert fdr.threshold() == pytest.approx(20 * 4 * math.log(4) ** 2 * 2.1097428 / 2, rel=1e-6)
    assert (fdr.num_tests, fdr.num_rejected) == (2, 1)


def simulate(rng: np.random.Generator, null_share: float, level: float) -> float:
    fdr, false = OnlineFDR(level), 0
    for _ in range(60):
        null = rng.random() < null_share
        # Likelihood ratio of N(3, 1) against N(0, 1): an e-value under the null.
        e_value = math.exp(3 * rng.normal(0.0 if null else 4.0) - 4.5)
        rejected = e_value >= fdr.threshold()
        false += int(rejected and null)
        fdr.record(rejected)
    return false / max(1, fdr.num_rejected)


@pytest.mark.parametrize("null_share", [0.5, 0.9, 1.0])
def test_false_discovery_rate(null_share: float) -> None:
    rng = np.random.default_rng(1)
    rates = [simulate(rng, null_share, 0.1) for _ in range(300)]
    assert np.mean(rates) <= 0.1 + 2 * np.std(rates) / math.sqrt(len(rates))


def test_dependent_nulls_keep_the_rate() -> None:
    """One shared draw behind all e-values of a run: the worst case for methods that need independence."""
    rng = np.random.default_rng(2)
    false_runs = 0
    for _ in range(2000):
        fdr, e_value = OnlineFDR(0.1), math.exp(3 * rng.normal() - 4.5)
        for _ in range(40):
            fdr.record(e_value >= fdr.threshold())
        false_runs += int(fdr.num_rejected > 0)
    assert false_runs / 2000 <= 0.1


def test_three_hundred_null_cohorts_are_almost_never_accepted() -> None:
    rng = np.random.default_rng(5)
    fdr = OnlineFDR(0.05)
    for _ in range(300):
        process = PairedEProcess(robust_scale(rng.standard_t(3, 8)))
        threshold = fdr.threshold()
        for difference in rng.standard_t(3, 20):
            process.update(float(difference))
        fdr.record(process.peak >= threshold)
    assert fdr.num_rejected <= 6


@given(st.lists(st.booleans(), max_size=40), st.floats(0.001, 0.5))
def test_state_round_trip_and_level_spent(outcomes: list[bool], level: float) -> None:
    fdr, spent = OnlineFDR(level), 0.0
    for rejected in outcomes:
        # e-LOND's invariant: alpha_t / (discoveries before + 1) sums to at most the level.
        spent += 1 / fdr.threshold() / (fdr.num_rejected + 1)
        fdr.record(rejected)
    assert spent <= level
    again = OnlineFDR(level)
    again.restore(json.loads(json.dumps(fdr.state())))
    assert again.threshold() == fdr.threshold() and again.state() == fdr.state()


def test_discoveries_lower_the_next_threshold() -> None:
    kept, refused = OnlineFDR(0.05), OnlineFDR(0.05)
    kept.record(True)
    refused.record(False)
    assert kept.threshold() == pytest.approx(refused.threshold() / 2)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan])
def test_level_out_of_range(level: float) -> None:
    with pytest.raises(EvidenceError, match="level must lie between 0 and 1"):
        OnlineFDR(level)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"level": 0.05}, "is missing"),
        ({"level": 0.05, "num_tests": 1, "num_rejected": 2}, "num_rejected must lie between"),
        ({"level": 0.05, "num_tests": 1, "num_rejected": -1}, "num_rejected must lie between"),
        ({"level": 2.0, "num_tests": 1, "num_rejected": 0}, "keeps its level"),
    ],
)
def test_bad_state(state: dict[str, float], message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        OnlineFDR(0.05).restore(state)
