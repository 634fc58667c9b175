"""It does not fool itself: cohorts that can add nothing are refused, cohorts that help are kept."""

from __future__ import annotations

import pytest
from tests.evidence.cohorts import NULLS, useful

pytestmark = pytest.mark.integration

COHORTS_PER_KIND = 50
PLAIN_PER_KIND = 10


def test_null_cohorts_are_accepted_in_at_most_two_percent(record_property: pytest.RecordProperty) -> None:
    """300 cohorts, each judged by a fresh judge: the lowest threshold that any cohort of any run meets."""
    accepted = dict.fromkeys(NULLS, 0)
    plain = dict.fromkeys(NULLS, 0)
    for kind, make in NULLS.items():
        for seed in range(COHORTS_PER_KIND):
            trial = make(seed)
            accepted[kind] += trial.judgement(seed=seed).gate.passed
            if seed < PLAIN_PER_KIND:
                plain[kind] += trial.judgement(control="plain", seed=seed).gate.passed
    print(f"null cohorts accepted of {COHORTS_PER_KIND} a kind: {accepted}; switched off, of {PLAIN_PER_KIND}: {plain}")
    record_property("accepted", accepted)
    record_property("accepted_plain", plain)
    assert len(NULLS) * COHORTS_PER_KIND >= 300
    assert sum(accepted.values()) <= 0.02 * len(NULLS) * COHORTS_PER_KIND, accepted
    # What the projected control is for: simply switching a branch off believes in these.
    leaning = ("redundant_linear", "constant", "duplicate_units", "duplicate_of_annex")
    assert sum(plain[kind] for kind in leaning) >= 0.2 * PLAIN_PER_KIND * len(leaning), plain


def test_useful_cohorts_are_accepted() -> None:
    judged = [useful(seed).judgement(seed=seed) for seed in range(15)]
    assert sum(j.gate.passed for j in judged) >= 13
    assert all(j.result.mean > 0 for j in judged)
