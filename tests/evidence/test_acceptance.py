"""The acceptance test by itself: how many held-out batches it asks for, and that asking for fewer decides the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.config import EvidenceConfig
from esper.evidence.acceptance import Acceptance, splits_of
from esper.evidence.eprocess import PairedEProcess, fewest_differences, robust_scale

pytestmark = pytest.mark.unit

SPLITS = splits_of(EvidenceConfig(), 112, 0)
CALIBRATION = [0.02] * 12


class Batches:
    """Differences of a cohort, one a held-out batch, and which of them were asked for."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = list(values)
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, indices: Sequence[int]) -> list[float]:
        self.asked.append(tuple(indices))
        return [self.values[index] for index in indices]

    @property
    def num(self) -> int:
        return sum(map(len, self.asked))


def noisy(mean: float, seed: int = 0, deviation: float = 0.02) -> Batches:
    return Batches(np.random.default_rng(seed).normal(mean, deviation, 112).tolist())


def test_a_large_gain_is_proven_with_the_fewest_batches_that_can() -> None:
    test, batches = Acceptance(SPLITS, EvidenceConfig()), Batches([0.1] * 111 + [0.11])
    needed = test.fdr.threshold()
    found = test.evaluate(1, batches, CALIBRATION, further=False)
    assert found.e_value >= needed and found.num_batches == fewest_differences(needed) == 7
    assert [len(block) for block in batches.asked] == [7, 8], "then a confirmation of about as many"
    assert len(SPLITS.gate) == 56


def test_blocks_double_and_miss_no_batch() -> None:
    test = Acceptance(SPLITS, EvidenceConfig())
    turns = [list(test._blocks(SPLITS.gate, first=7)) for _ in range(3)]
    assert [[len(block) for block in turn] for turn in turns] == [[7, 7, 14, 28]] * 3
    assert len({turn[0][0] for turn in turns}) == 3, "each time from somewhere else"
    assert all(sorted(index for block in turn for index in block) == sorted(SPLITS.gate) for turn in turns)
    assert [len(block) for block in test._blocks(range(14), first=9)] == [14], "what is left is too small a block"


def test_where_a_block_has_a_cost_of_its_own_there_are_two() -> None:
    test = Acceptance(SPLITS, EvidenceConfig(), few_blocks=True)
    assert [len(block) for block in test._blocks(SPLITS.gate, first=7)] == [28, 28]
    assert copy.deepcopy(test).few_blocks


def test_harm_ends_the_test_early() -> None:
    test, batches = Acceptance(SPLITS, EvidenceConfig()), noisy(-0.02)
    found = test.evaluate(1, batches, CALIBRATION, further=True)
    assert not found.gate.passed and not found.undecided and found.num_batches < 28
    assert test.fdr.num_tests == 1


def test_a_small_gain_gets_all_batches() -> None:
    batches = noisy(0.002)
    found = Acceptance(SPLITS, EvidenceConfig()).evaluate(1, batches, CALIBRATION, further=True)
    assert found.num_batches == 56 and found.undecided


def test_a_calibration_that_is_not_finite_refuses() -> None:
    test, batches = Acceptance(SPLITS, EvidenceConfig()), noisy(1.0)
    found = test.evaluate(1, batches, [0.1, math.nan], further=True)
    assert not found.gate.passed and "calibration batch" in found.gate.reason and batches.num == 0
    assert (test.fdr.num_tests, test.fdr.num_rejected) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 6, 27])
def test_nothing_that_was_seen_and_is_not_finite_is_passed_over(value: float, place: int) -> None:
    test, batches = Acceptance(SPLITS, EvidenceConfig(), few_blocks=True), noisy(1.0)
    first = next(Acceptance(SPLITS, EvidenceConfig(), few_blocks=True)._blocks(SPLITS.gate, first=7))
    batches.values[first[place]] = value  # the line is crossed at the seventh
    found = test.evaluate(1, batches, CALIBRATION, further=True)
    assert not found.gate.passed and not found.undecided and math.isnan(found.confirm_p)


@settings(max_examples=60, deadline=None)
@given(mean=st.floats(-0.05, 0.05), seed=st.integers(0, 10_000), few=st.booleans())
def test_blocks_decide_as_one_pass_over_all_batches_would(mean: float, seed: int, few: bool) -> None:
    batches = noisy(mean, seed)
    test = Acceptance(SPLITS, EvidenceConfig(), few_blocks=few)
    order = [index for block in Acceptance(SPLITS, EvidenceConfig())._blocks(SPLITS.gate, first=7) for index in block]
    whole = PairedEProcess(robust_scale(CALIBRATION))
    for index in order:
        whole.update(batches.values[index])
    found = test.evaluate(1, batches, CALIBRATION, further=False)
    crossed = not math.isnan(found.confirm_p)
    assert not crossed or whole.peak >= found.threshold, "nothing is accepted that all batches would not have proven"
    if whole.peak >= found.threshold:  # unless the beginning looked hopeless
        assert crossed or found.result.mean < 0


def test_nulls_that_end_early_are_not_accepted_more_often() -> None:
    config = EvidenceConfig()
    accepted = 0
    for seed in range(400):
        found = Acceptance(SPLITS, config).evaluate(1, noisy(0.0, seed), CALIBRATION, further=False)
        accepted += found.gate.passed
    assert accepted <= 4


def test_a_gain_that_holds_clearly_is_not_asked_for_twice() -> None:
    test, batches = Acceptance(SPLITS, EvidenceConfig()), noisy(0.05)
    result, gate = test.hold(batches, held_out=1.0, flops_share=0.1)
    assert gate.passed and result.num == 12 and result.low >= 0


def test_holding_looks_at_more_batches_where_the_first_leave_it_open() -> None:
    first = next(Acceptance(SPLITS, EvidenceConfig())._blocks(SPLITS.gate, first=12))
    swinging = Batches([0.02 * (-1) ** n if n in first else 0.02 + 0.001 * (n % 3) for n in range(112)])
    result, gate = Acceptance(SPLITS, EvidenceConfig()).hold(swinging, held_out=1.0, flops_share=0.1)
    assert result.num > len(first) and gate.passed
    harmful = Batches([0.02 * (-1) ** n if n in first else -0.02 - 0.001 * (n % 3) for n in range(112)])
    assert not Acceptance(SPLITS, EvidenceConfig()).hold(harmful, held_out=1.0, flops_share=0.1)[1].passed
    assert harmful.num < 56, "clear harm is not measured to the end"


def test_holding_asks_what_it_costs_and_refuses_an_unknown_loss() -> None:
    dear = Acceptance(SPLITS, EvidenceConfig(min_gain_per_cost=100.0))
    assert not dear.hold(noisy(0.05), held_out=1.0, flops_share=0.5)[1].passed
    assert not Acceptance(SPLITS, EvidenceConfig()).hold(noisy(0.05), held_out=math.nan, flops_share=0.5)[1].passed


def test_what_was_decided_comes_back_from_its_state() -> None:
    test, twin = (Acceptance(SPLITS, EvidenceConfig()) for _ in range(2))
    test.evaluate(1, noisy(0.004), CALIBRATION, further=True)
    twin.restore(test.state())
    later = [one.evaluate(1, noisy(0.01, 1), CALIBRATION, further=True) for one in (test, twin)]
    assert later[0] == later[1] and later[0].look == 2


@pytest.mark.parametrize("num", [112, 200])
def test_held_out_data_in_an_order_are_judged_as_a_whole(num: int) -> None:
    """What helps the first classes and harms more of the others is harm, whichever the first batches are."""
    accepted = 0
    for seed in range(40):
        rng, splits = np.random.default_rng(seed), splits_of(EvidenceConfig(), num, seed)
        batches = Batches(np.where(np.arange(num) < 0.4 * num, 0.05, -0.05) + rng.normal(0, 0.02, num))
        test = Acceptance(splits, EvidenceConfig())
        calibration = [batches.values[index] for index in splits.calibration]
        for cohort in range(3):  # each from another place
            accepted += test.evaluate(cohort, batches, calibration, further=False).gate.passed
    assert accepted == 0
