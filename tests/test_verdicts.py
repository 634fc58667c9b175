"""Verdicts in bounded space: what is told, what only counts, what a controller is told, and what a state holds."""

from __future__ import annotations

import gc
import math
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import Pair
from tests.rigs import Rig, attach

import esper
from esper.commands import apply
from esper.errors import StateError
from esper.evidence.paired import paired_difference
from esper.evidence.shrinkage import shrink_gains
from esper.observation import observe
from esper.protocol import Cancel, Germinate, Lifecycle, SeedPlan, Verdict
from esper.safety import bounded_json
from esper.safety.tree import digest, split
from esper.verdicts import NEWEST, Verdicts

pytestmark = pytest.mark.component

NAN = float("nan")
ENDS = (Lifecycle.FOSSILIZED, Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK)


def verdict(cohort: int, state: Lifecycle = Lifecycle.CULLED, gain: float = NAN, **changed: Any) -> Verdict:
    fields: dict[str, Any] = {
        "step": 10 * cohort, "sites": ("a",), "gain_low": gain - 1, "gain_high": gain + 1, "added_params": 26,
        "added_flops_share": 0.4, "reason": f"because of {cohort}", "gain_shrunken": gain / 2,
    }  # fmt: skip
    return Verdict(cohort=cohort, state=state, gain=gain, **fields | changed)


# ----------------------------------------------------------------------------------------------------------------------
# Against a list of everything


GAINS = st.just(NAN) | st.floats(-2, 2)
STORIES = st.lists(
    st.tuples(st.sampled_from(ENDS), st.sampled_from([("a",), ("b",), ("a", "b")]), GAINS, st.floats(0.01, 1)),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(story=STORIES, newest=st.integers(1, 8), interrupted=st.integers(0, 40))
def test_what_is_told_and_counted_equals_a_list_of_everything(
    story: list[tuple[Lifecycle, tuple[str, ...], float, float]], newest: int, interrupted: int
) -> None:
    everything, bounded = list[tuple[Verdict, float]](), Verdicts(newest)
    for number, (state, sites, gain, error) in enumerate(story):
        everything.append((verdict(number, state, gain, sites=sites), error if math.isfinite(gain) else NAN))
        bounded.add(*everything[-1])
        if number == interrupted:
            bounded = restored(bounded, newest)
    alls = [each for each, _ in everything]
    recent = alls[-newest:]
    expected = [each for each in alls if each.state is Lifecycle.FOSSILIZED or each in recent]
    assert list(map(repr, bounded)) == list(map(repr, expected))  # NaN is not equal to itself
    assert bounded.ended == Counter(each.state for each in alls)
    assert bounded.num_untold + len(bounded) == len(alls)
    for site in ("a", "b"):
        here = [each for each in alls if site in each.sites]
        assert repr(bounded.last_gain.get(site)) == repr(here[-1].gain if here else None)
        kept = [each.step for each in here if each.state is Lifecycle.FOSSILIZED]
        assert bounded.last_growth.get(site) == (kept[-1] if kept else None)


def restored(earlier: Verdicts, newest: int = NEWEST) -> Verdicts:
    later = Verdicts(newest)
    later.restore(earlier.state())
    assert digest(later.state()) == digest(earlier.state())
    return later


def test_going_back_to_before_the_first_leaves_nothing_told() -> None:
    found = Verdicts()
    before, empty = found.state(), digest(found.state())
    found.add(verdict(1, gain=0.1), 0.1)
    assert len(found.told()) == 1 and found[0].cohort == 1
    found.restore(before)
    assert found.told() == () and digest(found.state()) == empty and found.num_untold == 0


def test_a_gain_is_shrunk_towards_the_judged_ones() -> None:
    found, rest = Verdicts(), [(0.3, 0.1), (0.1, 0.2), (-0.2, 0.1), (0.4, 0.05)]
    for number, (gain, error) in enumerate(rest):
        found.add(verdict(number, gain=gain), error)
        found.add(verdict(number, gain=NAN), NAN)
    result = paired_difference([0.5, 0.7, 0.6, 0.9])
    gains, errors = zip(*rest, (result.mean, result.standard_error), strict=True)
    assert found.shrunken(result) == shrink_gains(gains, errors)[-1] < result.mean
    assert restored(found).shrunken(result) == found.shrunken(result)
    assert math.isnan(found.shrunken(paired_difference([])))


def test_of_many_gains_the_newest_are_the_pool() -> None:
    found = Verdicts()
    for number in range(NEWEST + 50):
        found.add(verdict(number, gain=9.0 if number < 50 else 0.1 + 1e-3 * (number % 7)), 0.1)
    gains = [0.1 + 1e-3 * (number % 7) for number in range(50, NEWEST + 50)]
    result = paired_difference([0.5, 0.7, 0.6, 0.9])
    expected = shrink_gains([*gains, result.mean], [*[0.1] * NEWEST, result.standard_error])[-1]
    assert found.shrunken(result) == expected


def test_a_state_after_thirty_thousand_cohorts_fits_into_a_checkpoint() -> None:
    """As a list of dictionaries they could not be saved any more from some 19,000 on."""
    found = Verdicts()
    for number in range(30_000):
        found.add(verdict(number, Lifecycle.FOSSILIZED if number % 10 == 0 else Lifecycle.CULLED, 0.1), 0.1)
    assert found.num_untold + len(found) == 30_000 and len(found) == 3_900
    document, tensors = split(found.state())
    bounded_json.check(bounded_json.encode(document), max_bytes=1 << 20, max_values=5_000, max_depth=10)
    assert sum(tensor.numel() for tensor in tensors.values()) < 500_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["reasons"].pop(),
        lambda state: state["told"].update(gain=state["told"]["gain"][1:]),
        lambda state: state["sites"].fill(1),
        lambda state: state["sites"].fill(-1),
        lambda state: state["told"]["state"].fill(99),
        lambda state: state["told"].pop("step"),
        lambda state: state["ended"].update({99: 1}),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Any) -> None:
    found = Verdicts()
    for number in range(3):
        found.add(verdict(number, gain=0.1), 0.1)
    state, before = found.state(), digest(found.state())
    damage(state)
    with pytest.raises((StateError, ValueError, KeyError)):
        found.restore(state)
    assert digest(found.state()) == before


# ----------------------------------------------------------------------------------------------------------------------
# In a run


def ended_at_once(rig: Rig, count: int) -> None:
    """Cohorts that germinate and are cancelled in the same step: the cheapest whole life there is."""
    grower, site = rig.grower, rig.grower.sites()[0].name
    step = grower.clock.steps
    for _ in range(count):
        plan = SeedPlan(site=site, width=1, start="random_zero")
        assert apply(grower, Germinate(seeds=(plan,)), step, issuer="test").passed
        number = next(reversed(grower.kasmina.cohorts))
        assert apply(grower, Cancel(cohort=number, reason=f"cancelled as number {number}"), step, issuer="test").passed


def quiet_rig(newest: int) -> Rig:
    rig = attach(Pair(2), graft=esper.GraftConfig(embargo=0))
    rig.grower.stages.verdicts = Verdicts(newest)
    rig.grower.journal._on_event = None  # the list of events is the test's own and grows
    rig.train()
    return rig


def held(rig: Rig) -> int:
    """Bytes that Python and NumPy hold, a state such as a snapshot keeps included."""
    state = rig.grower._whole(waiting=False).saved()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    del state
    return size


def test_a_grower_does_not_grow_with_the_cohorts_that_have_ended() -> None:
    rig = quiet_rig(50)
    ended_at_once(rig, 60)
    tracemalloc.start()
    try:
        ended_at_once(rig, 120)
        before = held(rig)
        ended_at_once(rig, 300)
        growth = (held(rig) - before) / 300
    finally:
        tracemalloc.stop()
    assert rig.grower.ended == {Lifecycle.CANCELLED: 480} and len(rig.grower.verdicts) == 50
    assert growth < 50, f"{growth:.0f} bytes a cohort"


def test_an_observation_is_as_small_after_many_cohorts() -> None:
    rig = quiet_rig(50)
    ended_at_once(rig, 120)
    rig.grower.stages.verdicts.add(verdict(500, Lifecycle.FOSSILIZED, 0.25, sites=("fc1-fc2",), step=1), 0.1)
    seen = [
        observe(
            rig.grower.kasmina, step=9, total_steps=None, held_out=1.0, held_out_initial=2.0, host_flops=1e6,
            budget_params=None, budget_flops=None, verdicts=rig.grower.stages.verdicts, stopped=None,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert seen[0].verdicts is seen[1].verdicts, "nobody has ended in between"
    assert (len(seen[0].verdicts), seen[0].untold, seen[0].num_ended) == (50, 71, 121)
    columns = dict(zip(esper.protocol.SITE_FEATURES, seen[0].sites[0], strict=True))
    assert columns["last_gain"] == 0.25 and columns["steps_since_growth"] == 8


def test_a_report_says_how_many_it_does_not_list() -> None:
    rig = quiet_rig(3)
    ended_at_once(rig, 8)
    report = rig.grower.report()
    assert report.untold == {Lifecycle.CANCELLED: 5} and len(report.verdicts) == 3
    assert "longer ago, in the event log only: 5 CANCELLED" in str(report).splitlines()
    assert "0 of 8 kept" in repr(rig.grower)


def test_a_run_that_has_seen_many_goes_on_from_its_state() -> None:
    rig = quiet_rig(3)
    ended_at_once(rig, 8)
    state = rig.grower.state_dict()
    ended_at_once(rig, 2)
    rig.grower.load_state_dict(state)
    assert rig.grower.ended == {Lifecycle.CANCELLED: 8}
    assert [each.cohort for each in rig.grower.verdicts] == [6, 7, 8]
    assert digest(rig.grower.state_dict()) == digest(state)
    assert isinstance(state["esper"]["stages"]["verdicts"]["told"]["gain"], np.ndarray)
    assert torch.is_tensor(state["host"]["state"]["fc1.weight"])
