"""Batches that can be had again: a batch follows from its place, whatever was drawn before."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import esper
from esper.errors import DataError

pytestmark = pytest.mark.unit


def noisy(step: int) -> list[float]:
    return [step, random.random(), float(np.random.rand()), float(torch.rand(()))]


class Shuffled:
    """Iterated anew for each epoch: seven draws in an order of its own."""

    def __iter__(self) -> Any:
        for number in torch.randperm(7).tolist():
            yield noisy(number)


SOURCES = {
    "function": noisy,
    "sequence": [[step] for step in range(5)],
    "iterable": Shuffled(),
    "loader": DataLoader(torch.arange(11.0), batch_size=2, shuffle=True),  # type: ignore[arg-type]
}


def taken(batches: esper.Batches, num: int) -> list[list[float]]:
    return [torch.as_tensor(next(batches)).tolist() for _ in range(num)]


@pytest.mark.usefixtures("unchanged_rng")
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 13])
def test_a_place_can_be_had_again(name: str, at: int) -> None:
    batches = esper.Batches(SOURCES[name], seed=4)
    whole = taken(batches, 20)
    assert batches.position == 20
    again = esper.Batches(SOURCES[name], seed=4)
    running = iter(again)
    assert taken(again, at) == whole[:at]
    state = again.state_dict()
    taken(again, 3)
    again.load_state_dict(state)
    assert next(running) is not None and again.position == at + 1, "the loop that runs was to follow"
    again.load_state_dict(state)
    assert taken(again, 20 - at) == whole[at:]
    assert again.state_dict() == batches.state_dict()
    if name != "sequence":
        assert taken(esper.Batches(SOURCES[name], seed=5), 20) != whole


def test_epochs_differ_and_are_counted() -> None:
    batches = esper.Batches(Shuffled())
    first, second = taken(batches, 7), taken(batches, 7)
    assert batches.epoch == 1 and first != second
    assert sorted(row[0] for row in first) == sorted(row[0] for row in second) == list(range(7))


def test_a_sampler_that_wants_to_know_the_epoch_is_told() -> None:
    sampler = torch.utils.data.DistributedSampler(range(8), num_replicas=2, rank=0, seed=1)  # type: ignore[arg-type]
    batches = esper.Batches(DataLoader(range(8), batch_size=2, sampler=sampler))  # type: ignore[arg-type]
    taken(batches, 5)
    assert sampler.epoch == batches.epoch == 2


@pytest.mark.parametrize("source", [[], DataLoader([])])  # type: ignore[arg-type]
def test_a_source_without_a_batch_is_refused(source: Any) -> None:
    with pytest.raises(DataError, match="must not run out, got an e"):
        next(esper.Batches(source))


@pytest.mark.parametrize("state", [{}, {"seed": 1, "position": 0, "epoch": 0, "index": 0}, {"position": 0}])
def test_a_foreign_place_is_refused(state: dict[str, int]) -> None:
    batches = esper.Batches(noisy)
    next(batches)
    before = batches.state_dict()
    with pytest.raises(esper.StateError, match="batches of seed 0 go on from a state with"):
        batches.load_state_dict(state)
    assert batches.state_dict() == before
