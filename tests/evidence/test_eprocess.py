from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import EvidenceError
from esper.evidence.eprocess import BETS, PairedEProcess, fewest_differences, robust_scale

pytestmark = pytest.mark.unit

Sampler = Callable[[np.random.Generator, int], npt.NDArray[np.float64]]

# Each has mean <= 0 after clipping to [-1, 1].
NULLS: dict[str, Sampler] = {
    "normal": lambda rng, n: rng.normal(0.0, 0.7, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "student-2": lambda rng, n: rng.standard_t(2, n),
    "sign": lambda rng, n: rng.choice([-1.0, 1.0], n),
    # Mostly small gains, now and then a big loss: 0.9 * 0.1 - 0.1 * 0.9 = 0.
    "skewed-down": lambda rng, n: np.where(rng.random(n) < 0.9, 0.1, -0.9),
    "skewed-up": lambda rng, n: np.where(rng.random(n) < 0.9, -0.1, 0.9),
    "lottery": lambda rng, n: np.where(rng.random(n) < 0.5, -1.0, 1e9),
    "negative": lambda rng, n: rng.normal(-0.1, 0.5, n),
}


def final(differences: npt.ArrayLike, scale: float = 1.0, min_gain: float = 0.0) -> PairedEProcess:
    process = PairedEProcess(scale, min_gain)
    for difference in np.asarray(differences, dtype=np.float64):
        process.update(float(difference))
    return process


def test_two_steps_by_hand() -> None:
    process = PairedEProcess(2.0)
    assert process.e_value == 1.0 and process.count == 0
    first = process.update(1.0)
    # x = 0.5; the mean of the bets (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98) is 4.93 / 8.
    assert first == pytest.approx(1 + 0.5 * 4.93 / 8, rel=1e-14)
    second = process.update(-5.0)  # clipped to -2: x = -1
    # mean of (1 + b/2)(1 - b) = 1 - mean(b)/2 - mean(b^2)/2, sum of squares 3.8829
    assert second == pytest.approx(1 - 0.5 * 4.93 / 8 - 0.5 * 3.8829 / 8, rel=1e-14)
    assert process.count == 2 and process.e_value == second and process.peak == first


def test_min_gain_by_hand() -> None:
    # x = (0.5 - 0.25) / (1 + 0.25) = 0.2
    assert final([0.5], 1.0, 0.25).e_value == pytest.approx(1 + 0.2 * 4.93 / 8, rel=1e-14)


@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("threshold", [5.0, 20.0])
def test_ville(name: str, threshold: float) -> None:
    """The share of null streams that *ever* reach 1/a is at most a."""
    rng = np.random.default_rng(7)
    num_streams, length = 1500, 60
    x = np.clip(NULLS[name](rng, num_streams * length).reshape(num_streams, length), -1, 1)
    # The same capital as the class, over all streams at once; the next test ties the two together.
    logs = np.log1p(np.array(BETS) * x[:, :, None]).cumsum(axis=1)
    crossed = (np.exp(logs).mean(axis=2).max(axis=1) >= threshold).mean()
    slack = 3 * math.sqrt(1 / threshold * (1 - 1 / threshold) / num_streams)
    assert crossed <= 1 / threshold + slack


def test_class_agrees_with_the_simulated_formula() -> None:
    differences = np.random.default_rng(0).normal(0.1, 0.7, 30)
    logs = np.log1p(np.array(BETS) * np.clip(differences, -1, 1)[:, None]).cumsum(axis=0)
    process = final(differences)
    assert process.e_value == pytest.approx(np.exp(logs[-1]).mean(), rel=1e-12)
    assert process.peak == pytest.approx(max(1.0, np.exp(logs).mean(axis=1).max()), rel=1e-12)


def test_null_is_a_martingale() -> None:
    """On a fair coin the expected capital is exactly 1: enumerate all 2^8 streams."""
    capitals = [final([1.0 if (code >> bit) & 1 else -1.0 for bit in range(8)]).e_value for code in range(256)]
    assert np.mean(capitals) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("effect", "num_gate", "threshold", "power"),
    [(1.0, 24, 40, 0.85), (1.0, 40, 200, 0.95), (1.5, 16, 40, 0.75), (1.5, 20, 77, 0.85), (2.0, 16, 77, 0.7)],
)
def test_power_with_the_recommended_scale(effect: float, num_gate: int, threshold: float, power: float) -> None:
    rng = np.random.default_rng(3)
    reached = []
    for _ in range(200):
        scale = robust_scale(rng.normal(effect, 1.0, max(2, round(0.4 * num_gate))))
        reached.append(final(rng.normal(effect, 1.0, num_gate), scale).peak >= threshold)
    assert np.mean(reached) >= power


@given(
    st.lists(st.floats(-3, 3), min_size=1, max_size=20),
    st.floats(0.01, 2),
    st.tuples(st.floats(-0.9, 1.5), st.floats(-0.9, 1.5)),
)
def test_monotone_in_min_gain(differences: list[float], scale: float, gains: tuple[float, float]) -> None:
    low, high = (scale * gain for gain in sorted(gains))
    assert final(differences, scale, low).e_value >= final(differences, scale, high).e_value * (1 - 1e-9)


@given(st.lists(st.floats(-1e6, 1e6), max_size=30), st.floats(1e-6, 1e3), st.floats(0.01, 100))
def test_positive_and_invariant_to_units(differences: list[float], scale: float, unit: float) -> None:
    process = final(differences, scale)
    assert 0 < process.e_value <= process.peak < math.inf
    scaled = final(np.asarray(differences) * unit, scale * unit)
    assert scaled.e_value == pytest.approx(process.e_value, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_difference_refuses_for_good(bad: float) -> None:
    process = final([1.0] * 20)
    assert process.e_value > 1000
    assert process.update(bad) == 0.0
    assert process.refused and process.peak == 0.0
    assert process.update(1.0) == 0.0 and process.e_value == 0.0
    assert process.count == 22


def test_overwhelming_evidence_stays_finite() -> None:
    process = final([1.0] * 3000)
    assert math.isfinite(process.e_value) and process.e_value > 1e300


def test_unreachable_min_gain_never_accepts() -> None:
    assert final([1.0] * 50, 1.0, 1.0).peak == 1.0


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_scale_out_of_range(scale: float) -> None:
    with pytest.raises(EvidenceError, match="scale must be positive and finite"):
        PairedEProcess(scale)


@pytest.mark.parametrize("min_gain", [-1.0, math.nan, math.inf])
def test_min_gain_out_of_range(min_gain: float) -> None:
    with pytest.raises(EvidenceError, match="min_gain must be finite"):
        PairedEProcess(1.0, min_gain)


def test_robust_scale_known_answers() -> None:
    assert robust_scale([0.1, -0.3, 0.2, 50.0, -0.1]) == pytest.approx(0.4)
    assert robust_scale([0.0, 0.0, 0.0, 0.4]) == pytest.approx(0.2)  # median 0: twice the mean
    assert robust_scale([0.0, 0.0]) == 1e-6
    assert robust_scale([1e-9], floor=1e-3) == 1e-3


@pytest.mark.parametrize("bad", [[], [math.nan], [0.1, math.inf]])
def test_robust_scale_refuses(bad: list[float]) -> None:
    with pytest.raises(EvidenceError, match="at least one difference and all of them finite"):
        robust_scale(bad)


@pytest.mark.parametrize("threshold", [1.5, 20.0, 41.0, 270.0, 1e6])
def test_with_fewer_differences_the_threshold_is_out_of_reach(threshold: float) -> None:
    def best(num: int) -> float:
        process = PairedEProcess(1.0)
        for _ in range(num):
            process.update(100.0)
        return process.peak

    num = fewest_differences(threshold)
    assert best(num) >= threshold > best(num - 1)
