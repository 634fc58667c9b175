from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import AttachError, EvidenceError
from esper.evidence.eprocess import fewest_differences
from esper.evidence.fdr import OnlineFDR
from esper.evidence.splits import Rotation, split_batches, spread

pytestmark = pytest.mark.unit


@given(st.integers(8, 400), st.floats(0.01, 0.98), st.floats(0.01, 0.98), st.integers(0, 5))
def test_disjoint_covering_deterministic(num: int, calibration: float, confirm: float, seed: int) -> None:
    if calibration + confirm >= 1:
        confirm = (1 - calibration) / 2
    splits = split_batches(num, calibration, confirm, seed)
    parts = (splits.calibration, splits.gate, splits.confirm)
    assert sorted(sum(parts, ())) == list(range(num))
    assert all(len(part) >= 2 and list(part) == sorted(part) for part in parts)
    assert split_batches(num, calibration, confirm, seed) == splits
    assert all(type(index) is int for part in parts for index in part)


def test_sizes_of_the_defaults() -> None:
    splits = split_batches(40, 0.2, 0.3)
    assert (len(splits.calibration), len(splits.gate), len(splits.confirm)) == (8, 20, 12)
    splits = split_batches(8, 0.2, 0.3)
    assert (len(splits.calibration), len(splits.gate), len(splits.confirm)) == (2, 4, 2)


@given(st.integers(40, 300), st.integers(0, 20))
def test_interleaved(num: int, seed: int) -> None:
    """A linear trend over the order reaches every part alike."""
    splits = split_batches(num, 0.2, 0.3, seed)
    for part in (splits.calibration, splits.gate, splits.confirm):
        assert abs(np.mean(part) / (num - 1) - 0.5) < 0.1
        assert max(np.diff([-1, *part, num])) <= num / 3


def test_seed_moves_batches() -> None:
    assert len({split_batches(40, 0.2, 0.3, seed) for seed in range(5)}) == 5


def test_global_generator_untouched() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    split_batches(40, 0.2, 0.3)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


@pytest.mark.parametrize("num", [0, 1, 3, 7])
def test_too_few_batches(num: int) -> None:
    with pytest.raises(AttachError, match=rf"at least 8 batches .* got {num}; pass smaller batches"):
        split_batches(num, 0.2, 0.3)


@given(st.floats(0.01, 0.9), st.floats(0.01, 0.9), st.integers(2, 12))
def test_the_number_asked_for_is_the_first_that_leaves_enough_for_the_gate(
    calibration: float, confirm: float, gate: int
) -> None:
    if calibration + confirm > 0.95:
        confirm = 0.95 - calibration if calibration < 0.94 else 0.01
    with pytest.raises(AttachError) as caught:
        split_batches(0, calibration, confirm, min_gate=gate)
    asked = int(re.search(r"at least (\d+) batches", str(caught.value))[1])  # type: ignore[index]
    assert len(split_batches(asked, calibration, confirm, min_gate=gate).gate) >= gate
    with pytest.raises(AttachError, match=rf"at least {asked} batches .*, got {asked - 1}; pass smaller batches"):
        split_batches(asked - 1, calibration, confirm, min_gate=gate)


def test_defaults_ask_for_fourteen_batches() -> None:
    """Six gate batches reach an e-value of 28 at best, the first threshold is 41."""
    needed = fewest_differences(OnlineFDR(0.05).threshold())
    assert needed == 7 and len(split_batches(14, 0.2, 0.3, min_gate=needed).gate) == 7
    with pytest.raises(AttachError, match=r"at least 14 batches .* fewer than 7 can accept nothing\), got 13"):
        split_batches(13, 0.2, 0.3, min_gate=needed)


@pytest.mark.parametrize("shares", [(0.0, 0.3), (0.2, 0.0), (0.5, 0.5), (float("nan"), 0.3)])
def test_bad_shares(shares: tuple[float, float]) -> None:
    with pytest.raises(EvidenceError, match="leave room for the gate"):
        split_batches(20, *shares)


@given(st.integers(4, 50), st.data())
def test_rotation_never_reuses_the_window_before(num: int, data: st.DataObject) -> None:
    window = data.draw(st.none() | st.integers(2, num // 2))
    rotation = Rotation([3 * i for i in range(num)], window)
    assert rotation.disjoint
    windows = [rotation.take() for _ in range(2 * num)]
    assert all(not set(one) & set(two) for one, two in itertools.pairwise(windows))
    assert set(sum(windows, ())) == {3 * i for i in range(num)}


def test_rotation_known_answer() -> None:
    rotation = Rotation([5, 6, 7, 8, 9])
    assert [rotation.take() for _ in range(3)] == [(5, 6), (7, 8), (9, 5)]


@pytest.mark.parametrize(("indices", "window"), [([1, 2], 2), ([1, 2, 3], 2)])
def test_small_rotation_says_it_reuses(indices: list[int], window: int) -> None:
    rotation = Rotation(indices)
    assert rotation.window == window and not rotation.disjoint
    assert len(rotation.take()) == window


def test_rotation_restores() -> None:
    rotation = Rotation(range(10), 3)
    rotation.take()
    again = Rotation(range(10), 3)
    again.restore(rotation.state())
    assert again.take() == rotation.take()
    with pytest.raises(EvidenceError, match="position must lie between 0 and 9, got 10"):
        again.restore({"position": 10})


@pytest.mark.parametrize(
    ("indices", "window", "message"),
    [
        ([1], None, "at least 2 different batches"),
        ([1, 1, 2], None, "at least 2 different batches"),
        ([1, 2, 3], 4, "window must lie between 2 and 3"),
        ([1, 2, 3], 1, "window must lie between 2 and 3"),
    ],
)
def test_bad_rotations(indices: list[int], window: int | None, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        Rotation(indices, window)


@given(st.integers(2, 300), st.integers(0, 300))
def test_every_stretch_of_a_spread_order_is_from_all_over(num: int, start: int) -> None:
    order = spread(range(num))
    assert sorted(order) == list(range(num))
    few = min(num, 8)
    stretch = [order[(start + step) % num] for step in range(few)]
    assert max(stretch) - min(stretch) >= num // 2
    if num >= 32:
        halves = sum(index < num / 2 for index in stretch)
        assert 2 <= halves <= 6 and 2 <= sum(index % 2 for index in stretch) <= 6
