from __future__ import annotations

import math

import pytest

from esper.runs import RunOptions
from esper.runs.arms import Cell, Trained
from esper.runs.statistics import interval, summarise

pytestmark = pytest.mark.unit


def trained(arm: str, seed: int, score: float, loss: float, flops: float = 2e6) -> Trained:
    cell = Cell(arm=arm, seed=seed, lr=0.01, steps=10, widths=(2,), options=RunOptions(), device="cpu", size="cpu")
    parts = {"host": flops - 1.0, "branches": 1.0} if arm == "grown" else {}
    return Trained(
        cell=cell, held_out=loss, params=100 + seed, flops=flops, seconds=1.0, widths=(2 + seed,), flops_parts=parts,
        cohorts={"germinated": 3, "accepted": 1, "culled": 2} if arm == "grown" else {}, stopped=f"because {seed}",
        score=score, loss=loss,
    )  # fmt: skip


def test_interval_of_a_known_sample() -> None:
    """Mean 2, standard deviation 1, three values: half-width 4.3027 / sqrt(3)."""
    low, high = interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert interval([1.0]) == [None, None], "one value has no interval"


def test_summary_of_two_arms() -> None:
    grown = [trained("grown", seed, 0.9 + 0.01 * seed, 0.3) for seed in range(3)]
    small = [trained("static_small", seed, 0.8 + 0.01 * seed, 0.5, flops=1e6) for seed in range(3)]
    summary = summarise({"grown": grown, "static_small": small}, {"grown": {0.01: 0.3, 0.1: 0.7}})
    assert summary["cohorts"] == {"germinated": 9, "accepted": 3, "culled": 6, "cancelled": 0, "rolled_back": 0}
    assert summary["stopped_because"] == "because 0"
    assert summary["stopped_because_per_seed"] == ["because 0", "because 1", "because 2"]
    arm = summary["arms"]["grown"]
    assert arm["score"] == pytest.approx(0.91) and arm["params"] == 101
    assert arm["widths_per_seed"] == [[2], [3], [4]]
    assert arm["lr_trials"] == {"0.01": 0.3, "0.1": 0.7} and summary["arms"]["static_small"]["lr_trials"] == {}
    assert arm["flops_parts"] == {"host": 2e6 - 1, "branches": 1.0}
    assert "flops_parts" not in summary["arms"]["static_small"]
    contrast = summary["grown_minus"]["static_small"]
    assert contrast["score"] == pytest.approx(0.1) and contrast["loss"] == pytest.approx(-0.2)
    assert contrast["score_interval"] == pytest.approx([0.1, 0.1]), "the seeds' own spread cancels in pairs"
    assert contrast["flops_ratio"] == pytest.approx(2.0)
    assert set(summary["grown_minus"]) == {"static_small"}


def test_one_seed_has_no_intervals() -> None:
    runs = {arm: [trained(arm, 0, 0.5, 1.0)] for arm in ("grown", "static_small")}
    contrast = summarise(runs, {})["grown_minus"]["static_small"]
    assert contrast["score"] == 0.0 and contrast["score_interval"] == [None, None]
