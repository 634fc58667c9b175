"""The one table, against the specification written out a second time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from esper.errors import TransitionError
from esper.kasmina.lifecycle import (
    LEGAL,
    NUM_STATES,
    TABLE,
    check,
    in_forward,
    in_slot,
    is_active,
    is_terminal,
    learns_from_captures,
    learns_from_task,
)
from esper.protocol import Lifecycle

pytestmark = pytest.mark.unit

# Written out by hand, by code, so that a slip in the table cannot repeat itself here.
LEADS_TO = {
    0: {1},
    1: {2, 9, 10},
    2: {3, 8, 9, 10},
    3: {4, 8, 9, 10},
    4: {5, 8, 9, 10},
    5: {3, 6, 8, 9, 10},  # to 3: a gain that is not proven yet
    6: {7, 8, 9, 10},
    7: set(),
    8: set(),
    9: set(),
    10: set(),
}
CODES = np.arange(11, dtype=np.int8)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(range(11), range(11))))
def test_every_pair_of_states(source: int, target: int) -> None:
    legal = target in LEADS_TO[source]
    assert bool(LEGAL[source, target]) is legal
    if legal:
        check(source, target)
        return
    with pytest.raises(TransitionError) as caught:
        check(Lifecycle(source), Lifecycle(target))
    message = str(caught.value)
    assert f"{Lifecycle(source).name} -> {Lifecycle(target).name}" in message
    for successor in LEADS_TO[source]:
        assert Lifecycle(successor).name in message.split("leads to")[1]
    if not LEADS_TO[source]:
        assert "end state" in message


@pytest.mark.parametrize("code", [-1, 11, 300])
def test_an_unknown_code_is_refused_everywhere(code: int) -> None:
    with pytest.raises(TransitionError, match="between 0 and 10"):
        check(code, 1)
    with pytest.raises(TransitionError, match="between 0 and 10"):
        check(0, code)
    with pytest.raises(TransitionError, match="between 0 and 10"):
        is_active([0, code])


def test_every_row_stands_at_its_code_and_every_way_out_names_its_gate() -> None:
    assert [row.state for row in TABLE] == list(Lifecycle)
    assert all(gate for row in TABLE for gate in row.successors.values())
    assert LEGAL.shape == (11, 11) and LEGAL.dtype == np.bool_
    with pytest.raises(ValueError, match="read-only"):
        LEGAL[0, 0] = True


@pytest.mark.parametrize(
    ("lookup", "codes"),
    [
        (is_active, {1, 2, 3, 4, 5, 6}),
        (is_terminal, {7, 8, 9, 10}),
        (in_forward, {3, 4, 5, 6, 7, 8, 9}),
        (in_slot, {3, 4, 5, 6, 8, 9}),
        (learns_from_task, {3, 6, 7}),
        (learns_from_captures, {2}),
    ],
)
def test_lookups_are_vectorised_and_match_the_specification(lookup: Callable[[Any], Any], codes: set[int]) -> None:
    expected = np.array([code in codes for code in range(11)])
    assert np.array_equal(lookup(CODES), expected)
    grid = np.tile(CODES, (3, 1))
    assert np.array_equal(lookup(grid), np.tile(expected, (3, 1)))
    assert bool(lookup(Lifecycle.GRAFTING)) is (3 in codes)
    assert lookup([]).shape == (0,)


def test_a_culled_branch_leaves_the_forward_pass_when_its_alpha_is_zero() -> None:
    states = [Lifecycle.CULLED, Lifecycle.CULLED, Lifecycle.CANCELLED, Lifecycle.ROLLED_BACK, Lifecycle.GRAFTING]
    alpha = [0.5, 0.0, 0.1, 0.0, 0.0]
    assert in_forward(states, alpha).tolist() == [True, False, True, False, True]
    assert in_slot(Lifecycle.FOSSILIZED, 1.0) == False  # noqa: E712 - the annex carries it; a NumPy scalar


def test_there_are_eleven_states() -> None:
    assert NUM_STATES == 11
