"""Batch updates: the same as one by one, all or none, one thread at a time."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.seed_tables import contents, problems

from esper.compat import ExtendedLifecycle, StateManager
from esper.errors import ConfigError, EsperError, SiteError, TransitionError

pytestmark = pytest.mark.unit

E = ExtendedLifecycle
SEEDS = 12


def everything(states: StateManager) -> dict[str, tuple[str, bytes]]:
    assert problems(states._table) == []
    return contents(states._table)


def same(one: StateManager, two: StateManager) -> bool:
    return everything(one) == everything(two)


@st.composite
def updates(draw: st.DrawFn) -> tuple[list[int], dict[str, list[int] | int]]:
    seeds = draw(st.lists(st.integers(0, SEEDS - 1), unique=True, max_size=SEEDS))
    values = {
        "lifecycle": st.sampled_from([int(state) for state in E]),
        "blueprint": st.integers(0, 3),
        "strategy": st.integers(0, 3),
    }
    names = draw(st.sets(st.sampled_from(sorted(values)), min_size=1))
    given_: dict[str, list[int] | int] = {}
    for name in sorted(names):
        one = draw(st.booleans())
        given_[name] = draw(values[name] if one else st.lists(values[name], min_size=len(seeds), max_size=len(seeds)))
    return seeds, given_


@st.composite
def likely_updates(draw: st.DrawFn) -> tuple[list[int], dict[str, list[int] | int]]:
    """Mostly one state for all, as callers write them: these are the ones that are often legal."""
    seeds = draw(st.lists(st.integers(0, SEEDS - 1), unique=True, min_size=1, max_size=SEEDS))
    target = draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]))
    return seeds, {"lifecycle": target} | ({"blueprint": 2, "strategy": 1} if target == 1 else {})


@given(st.lists(likely_updates() | updates(), max_size=12))
def test_a_batch_is_the_same_as_one_by_one(rounds: list[tuple[list[int], dict[str, list[int] | int]]]) -> None:
    batched, single = StateManager(SEEDS), StateManager(SEEDS)
    for step, (seeds, given_) in enumerate(rounds):
        before = everything(batched)
        refused = None
        try:
            batched.batch_update(torch.tensor(seeds, dtype=torch.int64), as_tensors(given_), step=step)
        except EsperError as error:
            refused = error
            assert everything(batched) == before
        trial = StateManager(SEEDS)
        trial._table = copy.deepcopy(single._table)
        failed = None
        for place, seed in enumerate(seeds):
            own = {n: value if isinstance(value, int) else value[place] for n, value in given_.items()}
            try:
                trial.batch_update([seed], own, step=step)
            except EsperError as error:
                failed = error
        if not seeds:
            continue
        assert (refused is None) == (failed is None), (refused, failed)
        if refused is None:
            single = trial
        assert same(batched, single)


def as_tensors(given_: dict[str, list[int] | int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.int32) for name, value in given_.items()}


def test_the_plan_arrays() -> None:
    states = StateManager(5)
    assert states.lifecycle_states.tolist() == [0] * 5 and states.blueprint_ids.tolist() == [-1] * 5
    states.batch_update(
        torch.tensor([3, 1]),
        {"lifecycle": torch.tensor(1), "blueprint": torch.tensor([7, 9]), "strategy": torch.tensor([2, 4])},
    )
    states.tick(n=3)
    states.tick([1], n=100_000)
    assert states.state_tensor.tolist() == [
        [0, -1, 0, -1],
        [1, 9, 32767, 4],
        [0, -1, 0, -1],
        [1, 7, 3, 2],
        [0, -1, 0, -1],
    ]
    kinds = (states.lifecycle_states, states.blueprint_ids, states.epochs_in_state, states.grafting_strategies)
    assert [kind.dtype for kind in kinds] == [torch.int8, torch.int32, torch.int16, torch.int8]
    assert [kind.tolist() for kind in kinds] == [
        [0, 1, 0, 1, 0], [-1, 9, -1, 7, -1], [0, 32767, 0, 3, 0], [-1, 4, -1, 2, -1],
    ]  # fmt: skip
    states.state_tensor.fill_(6)
    assert states.lifecycle_states.tolist() == [0, 1, 0, 1, 0], "reads are copies"


def test_an_end_a_rest_and_a_new_life() -> None:
    states = StateManager(3)
    states.batch_update([0, 1], {"lifecycle": E.GERMINATED})
    states.batch_update([0], {"lifecycle": E.CANCELLED}, step=5)
    with pytest.raises(TransitionError, match="only a seed at an end state can be released"):
        states.release([0, 1], step=5, embargo=10)
    states.release([0], step=5, embargo=10)
    assert states.lifecycle_states.tolist() == [0, 1, 0]
    before = states.state_tensor
    with pytest.raises(SiteError, match="must not rest under an embargo"):
        states.batch_update([1, 0, 2], {"lifecycle": [2, 1, 1]}, step=14)
    assert torch.equal(states.state_tensor, before), "nothing of a refused update is kept"
    states.batch_update([1, 0, 2], {"lifecycle": [2, 1, 1]}, step=15)
    assert states.lifecycle_states.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("seeds", "given_", "error", "message"),
    [
        ([5], {"lifecycle": 1}, ConfigError, "seed_indices must be between 0 and 4, got 5"),
        ([-1], {"lifecycle": 1}, ConfigError, "seed_indices must be between 0 and 4, got -1"),
        ([2, 2], {"lifecycle": 1}, ConfigError, "can be named once"),
        ([True, False], {"lifecycle": 1}, ConfigError, "seed_indices must be integers, got bool; use torch.nonzero"),
        ([[1], [2, 3]], {"lifecycle": 1}, ConfigError, "seed_indices must be integers, got lists of several lengths"),
        ([2], {"lifecycle": 1.0}, ConfigError, "lifecycle must be integers, got float64; pass codes"),
        ([2], None, ConfigError, "updates must be a mapping by name, got NoneType"),
        ([2], {"lifecycle": 11}, TransitionError, "between 0 and 10, got 11"),
        ([2], {"lifecycle": 2}, TransitionError, "DORMANT -> TRAINING"),
        ([2], {"lifecycle": 0}, TransitionError, "DORMANT -> DORMANT"),
        ([2], {"epochs": 3}, ConfigError, r"one of lifecycle, blueprint, strategy, got 'epochs'; .*tick"),
        ([2, 3], {"lifecycle": [1, 1, 1]}, ConfigError, "lifecycle must be one value or 2, got 3"),
        ([2], {"lifecycle": 1, "blueprint": -1}, ConfigError, "blueprint must be between 0 and 32767, got -1"),
        ([2], {"lifecycle": 1, "strategy": 128}, ConfigError, "strategy must be between 0 and 127, got 128"),
        ([2], {"blueprint": 1}, TransitionError, "chosen when it germinates, got one for a seed in DORMANT"),
        ([0], {"blueprint": 2}, TransitionError, "chosen when it germinates, got one for a seed in GERMINATED"),
        ([2], {"strategy": 1}, TransitionError, "from germination to its end, got one for a seed in DORMANT"),
        ([0], {"lifecycle": 9, "strategy": 1}, TransitionError, "got one for a seed in CANCELLED"),
    ],
)
def test_refusals_change_nothing(seeds: Any, given_: Any, error: type[Exception], message: str) -> None:
    states = StateManager(5)
    states.batch_update([0], {"lifecycle": 1, "blueprint": 1})
    before = everything(states)
    with pytest.raises(error, match=message):
        states.batch_update(seeds, given_)
    assert everything(states) == before
    with pytest.raises(TransitionError, match="a seed must have germinated, got 3"):
        states.tick([0, 3])


@pytest.mark.parametrize("number", [0, -1, 1.5, "a", None, True])
def test_a_manager_of_no_whole_number_of_seeds_is_refused(number: Any) -> None:
    with pytest.raises(ConfigError, match=f"num_seeds must be a whole number of at least 1, got {number!r}"):
        StateManager(number)


def test_of_many_threads_one_moves_a_seed_and_none_is_lost() -> None:
    states = StateManager(64)
    wins: list[int] = []
    start = threading.Barrier(8)

    def race(number: int) -> None:
        start.wait()
        for seed in range(64):
            try:
                states.batch_update([seed], {"lifecycle": 1, "blueprint": number})
            except TransitionError:
                continue
            wins.append(seed)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == list(range(64))
    everything(states)
    assert states.lifecycle_states.tolist() == [1] * 64
