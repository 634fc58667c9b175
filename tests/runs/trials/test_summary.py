"""From records to rates and bars, with answers known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
from tests.runs.trials.made import culled, fault, gain, kept, trial

from esper.evidence.rates import Rate
from esper.runs.trials.summary import Bar, summarise

pytestmark = pytest.mark.unit


def rate(summary: dict[str, Any], name: str) -> tuple[int, int]:
    entry = summary["rates"][name]
    return entry["events"], entry["trials"]


def bars(summary: dict[str, Any]) -> dict[str, str]:
    return {bar["name"]: bar["verdict"] for bar in summary["bars"]}


def test_improvement_and_harm_are_counted_by_cohort() -> None:
    records = [
        trial(0, kept(0.1), kept(0.002, -0.03, number=2), culled(3)),
        trial(1, kept(-0.005, 0.2), kept(-0.02, half=0.01, number=2)),
        trial(2, culled()),
    ]
    summary = summarise("grown", records)
    assert rate(summary, "permanent cohorts that improve the audit loss, on against off") == (2, 4)
    assert rate(summary, "permanent cohorts harmful beyond 1%, on against off") == (1, 4)
    assert rate(summary, "permanent cohorts that improve the audit loss against their twin") == (1, 2)
    assert rate(summary, "permanent cohorts harmful beyond 1% against their twin") == (1, 2)
    assert rate(summary, "cohorts that became permanent") == (4, 6)
    assert [(entry["trial"], entry["reading"]) for entry in summary["harmful"]] == [(0, "twin"), (1, "on_off")]
    assert bars(summary)["permanent cohorts harmful beyond 1%"] == "missed"
    assert "permanent cohorts harmful beyond 1%" in summary["missed"]


def test_an_unknown_gain_counts_as_harm() -> None:
    summary = summarise("grown", [trial(0, kept(None))])
    assert rate(summary, "permanent cohorts harmful beyond 1%, on against off") == (1, 1)
    assert rate(summary, "permanent cohorts that improve the audit loss, on against off") == (0, 1)


def test_harm_beyond_noise_needs_an_interval_below_zero() -> None:
    summary = summarise("grown", [trial(0, kept(0.1, -0.02, half=0.05), kept(0.1, -0.02, half=0.01, number=2))])
    assert rate(summary, "permanent cohorts harmful beyond 1% against their twin") == (2, 2)
    assert rate(summary, "the same, beyond the noise of the audit") == (1, 2)


def test_only_hosts_with_headroom_must_keep_something() -> None:
    records = [
        trial(0, kept(0.1), headroom=gain(0.3, 0.1)),
        trial(1, culled(), headroom=gain(0.3, 0.1)),
        trial(2, culled(), headroom=gain(0.01)),  # too little
        trial(3, culled(), headroom=gain(0.3, 0.4)),  # not beyond noise
        trial(4, culled(), headroom=gain(-0.3)),
    ]
    assert rate(summarise("grown", records), "hosts with headroom that kept a cohort") == (1, 2)


def test_hosts_with_headroom_are_counted_by_how_much_there_is_to_judge_by() -> None:
    room = gain(0.3, 0.1)
    records = [
        trial(0, kept(0.1), headroom=room, gate_rows=16),
        trial(1, culled(), headroom=room, gate_rows=4),
        trial(2, kept(0.1), headroom=room, gate_rows=4),
        trial(3, culled(), gate_rows=64),
    ]
    counted = summarise("grown", records)["by_held_out_rows"]
    assert {rows: (r["events"], r["trials"]) for rows, r in counted.items()} == {"4": (1, 2), "16": (1, 1)}
    assert list(counted) == ["4", "16"], "the fewest rows first"


def test_seeds_that_the_end_of_training_cuts_have_not_ended() -> None:
    summary = summarise("grown", [trial(0, kept(0.1), seeds=10, seeds_ended=8, seeds_cut=2)])
    assert rate(summary, "germinated seeds that reached an end state by themselves") == (8, 10)
    assert rate(summary, "germinated seeds taken out by the end of training") == (2, 10)


def test_null_cohorts_count_where_a_gate_has_decided() -> None:
    accepted = kept(None, number=5)
    null = type(accepted)(cohort=5, end="FOSSILIZED", passed=True, is_null=True)
    records = [
        trial(0, kept(0.2), culled(2, is_null=True), kind="null: a constant"),  # the first one was real
        trial(1, null, culled(2, is_null=True), kind="null: copies"),
    ]
    summary = summarise("null", records)
    assert rate(summary, "null cohorts that became permanent") == (1, 3)
    assert summary["by_kind"]["null: a constant"]["trials"] == 1
    assert bars(summary) == {"null cohorts accepted": "missed"}


def test_a_fault_that_never_struck_proves_nothing() -> None:
    records = [
        fault(0, "nan_batch", held=True), fault(1, "nan_batch", held=False),
        fault(2, "nan_batch", held=False, struck=0),
        fault(3, "two_growers", held=True, expects="refused"),
    ]  # fmt: skip
    summary = summarise("faults", records)
    assert rate(summary, "faults after which all held that must") == (2, 3)
    assert rate(summary, "restorations") == (1, 2)
    assert summary["by_fault"]["nan_batch"] == {
        "expects": "restored", "struck": 2, "never_struck": 1, "held": 1, "first_problem": "it broke",
    }  # fmt: skip
    assert len(summary["missed"]) == 2


@pytest.mark.parametrize(
    ("events", "trials", "relation", "need", "verdict"),
    [
        (0, 0, "above", 0.95, "open"),
        (20, 20, "above", 0.95, "open"),
        (59, 59, "above", 0.95, "met"),
        (94, 100, "above", 0.95, "missed"),
        (0, 100, "at most", 0.01, "open"),
        (0, 300, "at most", 0.01, "met"),
        (2, 100, "at most", 0.01, "missed"),
        (0, 5, "at most", 0.0, "met"),
        (1, 500, "at most", 0.0, "missed"),
        (5, 5, "at least", 1.0, "met"),
    ],
)
def test_a_bar_is_met_by_its_bound_and_missed_by_its_share(
    events: int, trials: int, relation: Any, need: float, verdict: str
) -> None:
    assert Bar(name="x", rate=Rate(events, trials), relation=relation, need=need).verdict == verdict


def test_a_summary_without_trials_is_one() -> None:
    for kind in ("grown", "null", "faults", "gromo"):
        assert summarise(kind, [])["trials"] == 0
