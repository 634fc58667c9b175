"""When a loss has run away: robust, relative, never an absolute number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.safety.divergence import FEWEST, LossWatch
from esper.safety.snapshot import Snapshot, Snapshots, num_bytes
from esper.safety.tree import digest

pytestmark = pytest.mark.unit


def watch(losses: list[float], window: int = 50) -> LossWatch:
    made = LossWatch(window, 10.0, 2.0)
    made.take(losses)
    return made


def noisy(scale: float, shift: float = 0.0, num: int = 50) -> list[float]:
    source = torch.Generator().manual_seed(0)
    return [shift + scale * (1 + 0.05 * float(torch.randn((), generator=source))) for _ in range(num)]


@given(scale=st.floats(1e-8, 1e8), factor=st.floats(0.1, 10))
def test_the_verdict_does_not_depend_on_the_size_of_the_loss(scale: float, factor: float) -> None:
    one = watch(noisy(1.0)).verdict([factor] * 5)
    two = watch(noisy(scale)).verdict([factor * scale] * 5)
    assert (one is None) == (two is None) or abs(factor - 2) < 0.1
    assert factor < 2.1 or one is not None


def test_both_must_hold() -> None:
    flat = watch([1.0] * 50)
    assert flat.verdict([1.01] * 5) is None, "many deviations of nothing are not a divergence"
    wild = watch([0.1, 3.0] * 25)
    assert wild.verdict([4.0] * 5) is None, "neither is what the loss does anyway"
    assert watch(noisy(1.0)).verdict([3.0, 1.0, 1.0, 1.0, 1.0]) is None, "nor a single bad batch"
    assert "diverges: 5 after" in str(watch(noisy(1.0)).verdict([5.0] * 5))


def test_negative_losses_and_losses_near_zero() -> None:
    assert watch(noisy(-2.0)).verdict([-1.9] * 5) is None
    assert watch(noisy(-2.0)).verdict([1.0] * 5) is not None
    assert watch([0.0] * 50).verdict([1e-3] * 5) is not None
    assert watch([0.0] * 50).verdict([0.0] * 5) is None


def test_too_little_is_no_ground_for_a_verdict() -> None:
    assert watch([1.0] * (FEWEST - 1)).verdict([1e9] * 5) is None
    assert watch([1.0] * FEWEST).verdict([1e9] * 5) is not None
    assert watch([1.0] * 50).verdict([]) is None
    assert watch([1.0] * 5, window=5).verdict([1e9]) is not None, "a short window is full sooner"


def test_the_window_slides_and_is_kept() -> None:
    made = watch([1.0] * 50)
    made.take([10.0] * 50)
    assert made.verdict([10.0] * 5) is None
    again = LossWatch(50, 10.0, 2.0)
    again.restore(made.state())
    assert list(again.losses) == [10.0] * 50 and math.isfinite(sum(again.losses))


# ----------------------------------------------------------------------------------------------------------------------
# Snapshots


def state_of(value: float) -> dict[str, object]:
    return {"w": torch.full((4,), value), "n": {"deep": [torch.arange(3), "x", None]}}


def test_a_snapshot_is_a_copy_with_a_hash() -> None:
    state = state_of(1.0)
    wanted = digest(state)
    snapshot = Snapshot.of(state, 5)
    state["w"].zero_()  # type: ignore[attr-defined]
    assert snapshot.digest() == wanted == digest(snapshot.tree()) and snapshot.step == 5
    snapshot.tree()["w"].zero_()
    assert digest(snapshot.tree()) == wanted, "what is given away is another copy"
    assert snapshot.num_bytes == num_bytes(state) == 4 * 4 + 3 * 8


def test_snapshots_are_shared_bounded_and_let_go() -> None:
    kept = Snapshots(100)
    first, second = Snapshot.of(state_of(1.0), 5), Snapshot.of(state_of(2.0), 9)
    kept.put(first, [1, 2])
    assert kept.num_bytes == 40 and kept.fits(state_of(0.0)) and kept.oldest_step == 5
    kept.put(second, [3])
    assert kept.num_bytes == 80 and not kept.fits(state_of(0.0))
    assert kept.of(1) is kept.of(2) is first and kept.of(3) is second and kept.of(4) is None and 3 in kept
    kept.keep_only({3, 7})
    assert kept.of(1) is None and kept.num_bytes == 40 and kept.oldest_step == 9
    kept.keep_only(set())
    assert kept.num_bytes == 0 and kept.oldest_step is None
