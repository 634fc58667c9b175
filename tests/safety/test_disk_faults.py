"""Faults of the disk: each strikes a checkpoint, what must hold after it holds, and the harness notices if not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tests.models import Pair
from tests.rigs import Rig, attach

from esper.errors import StateError
from esper.runs.trials import saved
from esper.runs.trials.faults import fault_trial
from esper.safety import checkpoint
from esper.safety.disk import LocalDisk
from esper.safety.faults import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.shelf import Shelf
from esper.safety.simulation.faults import ProcessDeath

pytestmark = pytest.mark.component

DISK_FAULTS = [name for name in FAULTS if FAULTS[name].moment is Moment.SAVING]


def subject_of(rig: Rig, folder: Path) -> Subject:
    return Subject(
        model=rig.model, optimizers=[rig.optimizer], sites={}, attach=lambda: None, folder=folder,
    )  # fmt: skip


def save(rig: Rig, folder: Path) -> int:
    shelf = Shelf()
    try:
        return shelf.save(folder, rig.grower.state_dict(), step=rig.grower.loop.last_step, keep=2).step
    finally:
        shelf.close()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """With two checkpoints of two steps."""
    rig = attach(Pair())
    for _ in range(2):
        rig.train()
        save(rig, tmp_path / "folder")
    return rig


def test_they_are_registered() -> None:
    assert DISK_FAULTS == ["corrupt_checkpoint", "full_disk", "killed_writer", "truncated_checkpoint"]
    assert all(FAULTS[name].leaves_no_trace for name in DISK_FAULTS)


@pytest.mark.parametrize("name", ["corrupt_checkpoint", "truncated_checkpoint"])
def test_a_damaged_checkpoint_is_passed_over_and_whole_again_afterwards(name: str, rig: Rig, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    with FAULTS[name].inject(subject_of(rig, folder)) as strikes:
        assert strikes.num == 1
        assert sum(path.read_bytes() != data for path, data in files.items()) == 1
        loaded = checkpoint.load(folder)
        assert loaded.step == 1 and [damage.number for damage in loaded.passed_over] == [2]
    assert {path: path.read_bytes() for path in sorted(folder.iterdir())} == files
    assert checkpoint.load(folder).step == 2


@pytest.mark.parametrize("name", ["corrupt_checkpoint", "truncated_checkpoint"])
def test_without_a_checkpoint_nothing_is_damaged(name: str, tmp_path: Path) -> None:
    with FAULTS[name].inject(subject_of(attach(Pair()), tmp_path)) as strikes:
        assert strikes.num == 0


def test_a_full_disk_refuses_and_leaves_what_is_there(rig: Rig, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    rig.train()
    with FAULTS["full_disk"].inject(subject_of(rig, folder)) as strikes:
        with pytest.raises(StateError, match="No space left on device"):
            save(rig, folder)
        assert strikes.num == 1
    assert {path: path.read_bytes() for path in sorted(folder.iterdir())} == files
    assert isinstance(checkpoint.LocalDisk(), LocalDisk) and save(rig, folder) == 3


@pytest.mark.parametrize("number", range(12))
def test_a_killed_writer_leaves_what_was_acknowledged(number: int, rig: Rig, tmp_path: Path) -> None:
    folder = (tmp_path / "folder").rename(tmp_path / f"folder-{number}")
    rig.train()
    with FAULTS["killed_writer"].inject(subject_of(rig, folder)) as strikes:
        with pytest.raises(ProcessDeath):
            save(rig, folder)
        assert strikes.num == 1
    loaded = checkpoint.load(folder)
    assert loaded.step in (2, 3) and not loaded.passed_over
    assert save(rig, folder) == 3, "what it left unfinished is in nobody's way"


# ----------------------------------------------------------------------------------------------------------------------
# The harness: what it must notice


class Forgetful(Fault):
    """Refuses the save, as a full disk does, and says so, or not: what a broken Esper would do."""

    does = "nothing"
    moment, leaves_no_trace = Moment.SAVING, True

    def __init__(self, expects: Expectation) -> None:
        self.expects = expects

    def inject(self, subject: Subject) -> Any:
        return _Entered(Strikes(1))


class _Entered:
    def __init__(self, strikes: Strikes) -> None:
        self.strikes = strikes

    def __enter__(self) -> Strikes:
        return self.strikes

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(saved, "FURTHER", 5)
    return lambda fault: monkeypatch.setitem(FAULTS._items, "planted", fault)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("expects", "said"),
    [
        (Expectation.REFUSED, "the save was acknowledged"),
        (Expectation.REPORTED, "not one of"),
    ],
)
def test_a_fault_that_is_not_met_as_it_must_be_is_found(expects: Expectation, said: str, plant: Any) -> None:
    plant(Forgetful(expects))
    record = fault_trial(2, faults=("planted",))
    assert record.struck and not record.held and said in record.detail


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_another_state_and_another_end_are_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = itertools.count()
    monkeypatch.setattr(saved, "digest", lambda tree: str(next(hashes)))
    monkeypatch.setattr(saved, "same_weights", lambda one, two: False)
    record = fault_trial(2, faults=("full_disk",))
    assert not record.held
    assert record.detail == "another state was loaded than was saved; the run went on otherwise than without it"
