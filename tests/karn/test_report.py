"""What a report from elsewhere must be: whatever passes can be filed and learnt from."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.karn.made import PLACE, choice, report

from esper.errors import StateError
from esper.karn.design import content_name
from esper.karn.experience import rows
from esper.karn.report import FieldReport, check_report
from esper.protocol import Lifecycle

pytestmark = pytest.mark.unit

NUMBERS = st.one_of(st.none(), st.floats(), st.floats(0, 2))
COUNTS = st.one_of(st.integers(0, 100), st.integers(-(1 << 70), 1 << 70))


@settings(max_examples=200)
@given(
    numbers=st.lists(NUMBERS, min_size=6, max_size=6), counts=st.lists(COUNTS, min_size=5, max_size=5),
    choices=st.lists(st.one_of(st.floats(), st.floats(0, 4)), min_size=4, max_size=4),
    state=st.sampled_from(Lifecycle), run=st.text(max_size=5),
)  # fmt: skip
def test_whatever_passes_is_of_use(
    numbers: list[float | None], counts: list[int], choices: list[float], state: Lifecycle, run: str
) -> None:
    growth, scale, lr_scale, share = choices
    what = choice("tiny", growth=growth, scale=scale, lr_scale=lr_scale, seeds=counts[0])
    told = report(
        counts[1], run=run, place=msgspec.structs.replace(PLACE, energy=numbers[0]), held_out=numbers[1],
        gain=numbers[2], gain_shrunken=numbers[3], gain_low=numbers[4], added_flops_share=numbers[5], state=state,
        seed=counts[2], germinated=counts[3], added_params=counts[4],
    )  # fmt: skip
    told = msgspec.structs.replace(
        told, placements=(msgspec.structs.replace(told.placements[0], share=share, choice=what),)
    )
    try:
        check_report(told)
    except StateError as error:
        assert ", got " in str(error)
        return
    assert msgspec.json.decode(msgspec.json.encode(told), type=FieldReport) == told
    assert all(np.isfinite(part).all() for part in rows([told]))
    assert len(content_name("linear_span", what)) == 12


def with_choice(**changes: Any) -> FieldReport:
    return report(choice=choice("tiny", **changes))


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (report(v=2), "up to version 1, got 2"),
        (report(v=0), "up to version 1, got 0"),
        (report(state=Lifecycle.GRAFTING), "has ended, got one in state GRAFTING"),
        (report(placements=()), "has grown, got none"),
        (report(run="x" * 2000), "at most 1000 bytes"),
        (report(run="\U0001f331" * 300), "at most 1000 bytes, got 1210"),
        (report(job="a\0b"), r"job of a report must be text without NUL characters, got 'a\\x00b'"),
        (report(place=msgspec.structs.replace(PLACE, kind="a\0")), "kind of a report must be text without NUL"),
        (report(held_out=math.inf), "held_out of a report must be finite, got inf"),
        (report(place=msgspec.structs.replace(PLACE, fill=math.nan)), "fill of a report must be finite"),
        (report(added_params=1 << 63), "added_params of a report must have at most 62 bits, got 64"),
        (with_choice(seeds=0), "a seed at least"),
        (with_choice(growth=-1.0), "no number below 0"),
        (
            msgspec.structs.replace(report(), placements=(msgspec.structs.replace(report().placements[0], share=2.0),)),
            "between 0 and 1, got 2.0",
        ),
    ],
)
def test_each_refusal_states_the_rule(told: FieldReport, says: str) -> None:
    with pytest.raises(StateError, match=says):
        check_report(told)


@pytest.mark.parametrize("gain", [None, 0.1])
def test_what_runs_report_passes(gain: float | None) -> None:
    check_report(report(gain=gain))
    check_report(report(gain=gain, placements=report().placements * 500))
