"""A process that goes on from a saved state can take grafts back exactly that an earlier process made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.safety.test_resume import Run, S

import esper
from esper.protocol import Germinate, Refused, Restored, RollBack, SeedPlan, SetBudget
from esper.safety import snapshot
from esper.safety.snapshot import num_bytes
from esper.safety.tree import digest

pytestmark = pytest.mark.integration


def grafted(**settings: Any) -> Run:
    """A cohort some steps after its graft, and a command since the snapshot from before it."""
    run = Run.build(1, **settings)
    run.train(2)
    site = run.grower.sites()[0].name
    run.grower.submit(Germinate(seeds=(SeedPlan(site=site, width=3, start="negative_gradient"),)))
    run.until(lambda: run.state is S.GRAFTING)
    run.grower.submit(SetBudget(params=5000))
    run.train(2)
    return run


def take_back(run: Run, *, further: int = 12) -> None:
    run.grower.submit(RollBack(cohort=1, exact=True, reason="test"))
    run.train(further)


def restored(run: Run) -> list[Restored]:
    return [event for event in run.events if isinstance(event, Restored)]


def test_a_graft_of_an_earlier_process_is_taken_back_exactly(tmp_path: Path) -> None:
    run = grafted()
    saved = run.grower.save(tmp_path)
    told = len(run.events)
    run.grower.detach()
    state = digest(run.grower.state_dict())
    again = Run.build(2)
    again.train(3)
    again.grower.load(tmp_path)
    assert digest(again.grower.state_dict()) == state, "snapshots come out as they went in"
    begun = len(again.events)
    take_back(again)
    again.grower.detach()
    told_again, end = again.told(begun), digest(again.grower.state_dict())

    # the run that was never left, from the same place
    run = grafted()
    assert run.grower.loop.last_step == saved.step and digest(run.grower.state_dict()) == state
    take_back(run)
    assert told_again == run.told(told) and end == digest(run.grower.state_dict())
    (event,) = restored(run)
    assert event.verified and event.rewound and event.to_step < saved.step
    assert again.grower.accounts.budget.params == 5000, "what was ordered since the snapshot is applied again"


def test_what_the_guard_takes_back_it_takes_back_after_a_load_too() -> None:
    run = grafted()
    state: Any = run.grower.state_dict()
    again = Run.build(2)
    again.grower.load_state_dict(state)
    next(iter(again.model.parameters())).data.fill_(float("nan"))
    again.train(10)
    (event,) = restored(again)
    assert event.verified and event.cohort == 1 and "the host is hurt" in event.reason


def test_snapshots_cost_one_more_state_each_and_only_while_they_are_needed() -> None:
    run = grafted()
    state: Any = run.grower.state_dict()
    (kept,) = state["esper"]["snapshots"]
    rest = num_bytes({**state, "esper": {**state["esper"], "snapshots": []}})
    assert kept["cohorts"] == [1] and kept["step"] < run.grower.loop.last_step
    assert 0.9 * rest < num_bytes(kept["tree"]) < 1.1 * rest, "without the rows that the branch was fitted to"
    run.until(lambda: not run.grower.kasmina.cohorts)
    run.train(2 * run.grower.config.interval)
    assert run.grower.state_dict()["esper"]["snapshots"] == []


@pytest.mark.parametrize("bound", ["bytes", "tensors"])
def test_without_room_in_the_state_only_the_soft_way_is_left(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"safety": esper.SafetyConfig(stored_snapshot_bytes=1000)} if bound == "bytes" else {}
    if bound == "tensors":
        monkeypatch.setattr(snapshot, "MOST_STORED_TENSORS", 10)
    run = grafted(**settings)
    assert run.grower.guard.snapshots.of(1) is not None, "in memory it is kept all the same"
    state: Any = run.grower.state_dict()
    assert state["esper"]["snapshots"] == []
    again = Run.build(2, **settings)
    again.grower.load_state_dict(state)
    take_back(again, further=1)
    refused = [event for event in again.events if isinstance(event, Refused)]
    assert "had no room for its snapshot" in refused[0].reason and not restored(again)
    again.grower.submit(RollBack(cohort=1, reason="test"))
    again.train()
    assert again.state is S.DORMANT
