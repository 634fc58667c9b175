"""Twins and networks kept for the audit are part of a run's state: what is scored after a resume is scored the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.models import Mlp, rows, snapshot
from tests.rigs import Rig, attach, keep_visible
from tests.test_trials import run, scored

import esper
from esper.protocol import Audited, Germinate, Lifecycle, Overhead, RollBack, SeedPlan, TwinScored
from esper.safety import checkpoint
from esper.safety.migrations import migrated
from esper.safety.snapshot import num_bytes
from esper.safety.tree import digest, join, split
from esper.state import VERSION

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parent / "golden" / "v1-grower"
TWIN_STEPS = 6


def build(seed: int, make: Any = torch.optim.AdamW, **settings: Any) -> Rig:
    torch.manual_seed(seed)
    model = Mlp(dropout=0.2)
    extra = {"momentum": 0.9} if make is torch.optim.SGD else {}
    settings.setdefault("evidence", esper.EvidenceConfig(twin_share=1.0, twin_steps=TWIN_STEPS, accept="always"))
    return attach(model, make(model.parameters(), lr=3e-3, **extra), audit=rows(6, seed=99), **settings)


def grown(make: Any = torch.optim.AdamW) -> Rig:
    """With an annex that goes on learning, and a cohort that has just germinated."""
    rig = build(3, make)
    rig.model.eval()
    keep_visible(rig, "fc1-fc2", 3)
    rig.model.train()
    rig.grower.kasmina.table.embargo_until[:] = 0
    rig.germinate("fc2-fc3", width=2)
    return rig


def told(rig: Rig, since: int) -> list[bytes]:
    return [msgspec.json.encode(event) for event in rig.events[since:] if not isinstance(event, Overhead)]


def kept(rig: Rig) -> list[str]:
    return [entry.networks.source for entry in rig.grower.trials.copies.kept]


POINTS = {
    "a twin that has just begun": lambda rig: len(rig.grower.trials.twins) == 1,
    "a twin that trains": lambda rig: any(twin.steps == 4 for twin in rig.grower.trials.twins.values()),
    "a host and its twin, the cohort on trial": lambda rig: kept(rig) == ["twin"],
    "a network with the branch apart as well": lambda rig: kept(rig) == ["twin", "on_off"],
}


def until(rig: Rig, point: str) -> None:
    for _ in range(80):
        if POINTS[point](rig):
            return
        run(rig, 1)
    raise AssertionError(f"{point}: not reached")


def to_the_end(rig: Rig) -> None:
    run(rig, 45)
    assert kept(rig) == ["twin", "on_off"] and not rig.grower.trials.twins and rig.grower.trials.copies.watch is None
    rig.grower.finish()


@pytest.mark.parametrize(
    ("point", "make"), [*((point, torch.optim.AdamW) for point in POINTS), ("a twin that trains", torch.optim.SGD)]
)
def test_what_is_scored_after_a_resume_is_scored_the_same(point: str, make: Any) -> None:
    rig = grown(make)
    until(rig, point)
    saved, turn = rig.grower.state_dict(), rig.turn
    hashed, told_before = digest(saved), len(rig.events)
    to_the_end(rig)
    again = build(8, make)
    run(again, 2)  # it must not matter what it has done so far
    again.grower.load_state_dict(join(*split(saved)))
    again.turn, told_again = turn, len(again.events)
    assert digest(again.grower.state_dict()) == hashed == digest(saved)
    to_the_end(again)
    assert told(again, told_again) == told(rig, told_before)
    assert len(scored(rig, Audited)) == 2 and len(scored(rig, TwinScored)) == 1
    assert digest(again.grower.state_dict()) == digest(rig.grower.state_dict())


def test_a_state_with_copies_survives_a_checkpoint(tmp_path: Path) -> None:
    rig = grown()
    until(rig, "a twin that trains")
    rig.grower.save(tmp_path)
    turn = rig.turn
    run(rig, 30)
    again = build(8)
    again.grower.load(tmp_path)
    again.turn = turn
    run(again, 30)
    assert digest(again.grower.state_dict()) == digest(rig.grower.state_dict())


def test_what_copies_add_to_a_state() -> None:
    """A twin weighs as much as the host with its optimizer and annex; a kept network as much as the model alone."""

    def size(tree: Any) -> int:
        return num_bytes(tree)

    rig = grown()
    until(rig, "a twin that trains")
    state: Any = rig.grower.state_dict()
    host = size(state["host"]) + size(state["optimizers"])
    annexes = size([site["annex"] for site in state["esper"]["kasmina"]["sites"].values()])
    assert host + annexes <= size(state["esper"]["copies"]["twins"]) < host + annexes + 200
    until(rig, "a network with the branch apart as well")
    state = rig.grower.state_dict()
    model, both = size(state["host"]), [size(entry["networks"]) for entry in state["esper"]["copies"]["kept"]]
    assert 2 * model <= both[0] < 2 * model + 4 * annexes and model <= both[1] < model + 4 * annexes


# ----------------------------------------------------------------------------------------------------------------------
# Snapshots in memory


def graft_second(rig: Rig) -> None:
    for _ in range(60):
        if rig.grower.kasmina.cohorts[2].state is Lifecycle.GRAFTING:
            return
        run(rig, 1)
    raise AssertionError("not grafted")


def with_twin(**settings: Any) -> Rig:
    rig = build(3, evidence=esper.EvidenceConfig(twin_share=1.0, twin_steps=1000, accept="always"), **settings)
    rig.germinate("fc1-fc2", width=2)
    while not rig.grower.trials.twins:
        run(rig, 1)
    rig.grower.submit(Germinate(seeds=(SeedPlan(site="fc2-fc3", width=2, start="negative_gradient"),)))
    run(rig, 1)
    return rig


def test_an_exact_restore_brings_twins_back() -> None:
    rig = with_twin()
    graft_second(rig)
    assert [event.cohort for event in scored(rig, TwinScored)] == [1], "its twin ended as the other was grafted"
    snapshot_of = rig.grower.guard.snapshots.of(2)
    assert snapshot_of is not None
    before = snapshot_of.tree()["esper"]["copies"]
    assert len(before["twins"]) == 1
    rig.grower.submit(RollBack(cohort=2, exact=True, reason="test"))
    run(rig, 1)
    restored = next(event for event in rig.events if type(event).__name__ == "Restored")
    assert restored.verified
    assert list(rig.grower.trials.twins) == [1]
    twin = rig.grower.trials.twins[1]
    assert twin.steps == before["twins"][0]["steps"] and twin.cohort is rig.grower.kasmina.cohorts[1]
    for name, value in snapshot(twin.model).items():
        assert torch.equal(value, before["twins"][0]["network"]["host"]["state"][name])
    run(rig, 2)
    assert twin.steps == before["twins"][0]["steps"] + 2, "and it trains on"


def test_twins_that_do_not_fit_a_snapshot_are_let_go_and_said() -> None:
    plain = with_twin()
    graft_second(plain)
    snapshot_of = plain.grower.guard.snapshots.of(2)
    assert snapshot_of is not None
    twin = num_bytes(snapshot_of.tree()["esper"]["copies"])
    bound = plain.grower.guard.snapshots.num_bytes - twin + 100
    safety = esper.SafetyConfig(snapshot_bytes=bound)
    with pytest.warns(RuntimeWarning, match="twins would not outlive an exact restore: one more would exceed"):
        rig = with_twin(safety=safety)
        graft_second(rig)
    rig.grower.submit(RollBack(cohort=2, exact=True, reason="test"))
    with pytest.warns(RuntimeWarning, match="no copies of cohorts 1: their twins get no score"):
        run(rig, 1)
    restored = next(event for event in rig.events if type(event).__name__ == "Restored")
    assert restored.verified and not rig.grower.trials.twins and rig.grower.trials.copies.watch is None


def test_networks_kept_before_a_snapshot_stay_and_later_ones_go() -> None:
    rig = build(3, evidence=esper.EvidenceConfig(twin_share=1.0, twin_steps=2, accept="always"))
    rig.germinate("fc1-fc2", width=2)
    until(rig, "a host and its twin, the cohort on trial")
    first = rig.grower.trials.copies.kept[0]
    rig.grower.submit(Germinate(seeds=(SeedPlan(site="fc2-fc3", width=2, start="negative_gradient"),)))
    run(rig, 1)
    graft_second(rig)
    until(rig, "a network with the branch apart as well")
    rig.grower.submit(RollBack(cohort=2, exact=True, reason="test"))
    run(rig, 1)
    assert rig.grower.trials.copies.kept == [first]
    assert first.cohort is rig.grower.kasmina.cohorts[1], "what becomes of it is what is audited"


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be kept


def test_networks_of_another_shape_than_the_hosts_are_not_audited_after_a_resume() -> None:
    rig = build(3)
    rig.germinate("fc1-fc2", width=2)
    until(rig, "a network with the branch apart as well")
    rig.grower.absorb()
    saved = rig.grower.state_dict()
    assert saved["esper"]["copies"]["kept"] == [] and saved["esper"]["trials"]["copies"]["kept"] == [1, 1]
    with pytest.warns(RuntimeWarning, match="no copies of cohorts 1: they are not audited"):
        rig.grower.load_state_dict(saved)
    rig.grower.finish()
    assert not scored(rig, Audited)


def test_a_checkpoint_from_before_copies_were_kept_loads_and_says_what_is_lost() -> None:
    """Written by the Esper before, with a twin and two networks kept; beside it the same run five steps later."""
    evidence = esper.EvidenceConfig(twin_share=1.0, twin_steps=6, accept="always")
    then = esper.TelemetryConfig(every=3, rows=1024)  # the default of that time
    pace = esper.TamiyoConfig(first=100, growth=1.0, last_share=0.6, patience=2)  # likewise
    rig = attach(Mlp(), evidence=evidence, telemetry=then, tamiyo=pace, audit=rows(6))
    with pytest.warns(RuntimeWarning) as caught:
        loaded = rig.grower.load(GOLDEN)
    assert loaded.manifest.schema == 1
    said = " ".join(str(warning.message) for warning in caught)
    assert "no copies of cohorts 2: their twins get no score" in said
    assert "no copies of cohorts 1: they are not audited" in said
    rig.turn = loaded.step
    run(rig, 5)
    later: Any = checkpoint.load(GOLDEN / "five_steps_later", kind="grower").tree
    torch.testing.assert_close(rig.model.state_dict(), later["host"]["state"])
    rig.grower.finish()
    assert not scored(rig, Audited) and not scored(rig, TwinScored)
    assert rig.grower.state_dict()["version"] == VERSION


def test_a_training_of_a_run_is_migrated_as_well_and_static_ones_are_left_alone() -> None:
    def tree() -> dict[str, Any]:
        state = {"version": 2, "copies": {"twins": [3], "kept": []}, "setup": {"config": {"safety": {}}}}
        return {"cell": "a", "training": {**state, "esper": {"trials": {"scored": [], "windows": []}}}}

    new = migrated(tree(), 2)["training"]
    assert new["version"] == 3 and "copies" not in new
    assert new["esper"]["trials"]["copies"] == {"twins": [3], "kept": []}
    assert new["esper"]["copies"] == {"twins": [], "watch": None, "kept": []}
    assert new["esper"]["snapshots"] == new["esper"]["applied"] == []
    static = {"cell": "a", "training": {"host": {}, "optimizers": []}}
    assert migrated({**static}, 2) == static
