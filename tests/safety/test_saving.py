"""A grown model is saved, and a freshly built host goes on from the folder bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.safety.test_resume import Run, S

from esper.errors import StateError
from esper.protocol import Germinate, SeedPlan
from esper.safety.manifest import manifest_name
from esper.safety.tree import digest

pytestmark = pytest.mark.integration


def grown_run() -> Run:
    run = Run.build(0)
    run.train(2)
    run.grower.submit(Germinate(seeds=(SeedPlan(site=run.grower.sites()[0].name, width=4),)))
    run.until(lambda: run.state is S.GRAFTING)
    return run


def test_a_saved_run_goes_on_elsewhere_bit_for_bit(tmp_path: Path) -> None:
    run = grown_run()
    saved = run.grower.save(tmp_path)
    other = Run.build(1)
    loaded = other.grower.load(tmp_path)
    assert (loaded.step, loaded.manifest.number, loaded.manifest.kind) == (saved.step, saved.number, "grower")
    assert loaded.step == run.grower.loop.last_step > 0
    other.train(5)
    there = digest(other.grower.state_dict())
    other.grower.detach()
    run = Run.build(2)
    run.grower.load(tmp_path)
    run.train(5)
    assert digest(run.grower.state_dict()) == there


def test_a_folder_belongs_to_one_run_until_it_lets_go(tmp_path: Path) -> None:
    one, two = Run.build(0), Run.build(1)
    one.train()
    one.grower.save(tmp_path)
    with pytest.raises(StateError, match="one writer"):
        two.grower.save(tmp_path)
    one.grower.detach()
    two.grower.save(tmp_path, keep=1)
    two.grower.save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.glob("*.json")] == [manifest_name(3)]


def test_going_back_is_told(tmp_path: Path) -> None:
    run = Run.build(0)
    run.train()
    run.grower.save(tmp_path)
    run.train()
    run.grower.save(tmp_path)
    (tmp_path / manifest_name(2)).write_bytes(b"{}")
    other = Run.build(0)
    with pytest.warns(RuntimeWarning, match="went back to checkpoint 1, step 1; newer ones: checkpoint 2: a manifest"):
        other.grower.load(tmp_path)
    assert other.grower.loop.last_step == 1


def test_another_run_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run = Run.build(0)
    run.train()
    run.grower.save(tmp_path)
    other = Run.build(0, interval=7)
    before = digest(other.grower.state_dict())
    with pytest.raises(StateError, match="settings must be those of the saved run"):
        other.grower.load(tmp_path)
    assert digest(other.grower.state_dict()) == before
