"""A run that is killed again and again, and started again each time, keeps its time."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from benchmarks.safety import kills
from tests.runs.test_arms import cell

from esper.runs import cell_store
from esper.runs.cell_store import SAVING_SHARE, SOONEST_S, CellStore

pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")

JOB = ["run", "digits", "--seeds", "1", "--steps", "100000", "--lr", "0.003", "--no-controls"]


@pytest.mark.e2e
def test_a_killed_run_goes_on_by_itself(tmp_path: Path) -> None:
    """The short form of ``benchmarks/safety/kills.py``: the share of lives this short says nothing, the rest does."""
    out = tmp_path / "kills.json"
    first = kills.run(JOB, tmp_path / "run", out, kills=1, life_s=(0.0, 0.0), trains_s=2.0)
    told = kills.run(JOB, tmp_path / "run", out, kills=2, life_s=(0.0, 0.0), trains_s=2.0)
    assert told["lives"][0] == first["lives"][0], "what was measured before stays"
    assert [life["code"] for life in told["lives"]] == [-signal.SIGKILL] * 2
    assert told["lives_that_kept_nothing"] == 0 and 0 < told["kept_s"] < told["wall_s"]
    assert told["resume_most_s"] < 5
    assert json.loads(out.read_text())["effective"] == told["effective"]
    assert "resuming" in (tmp_path / "run.log").read_text()


@pytest.mark.unit
def test_lives_are_added_up() -> None:
    life: dict[str, Any] = {
        "killed": True, "code": -signal.SIGKILL, "wall_s": 60.0, "kept_s": 54.0, "kept_steps": 10, "imports_s": 2.0,
        "resume_s": 9.0, "start_cpu_s": 2.0, "load": 1.0,
    }  # fmt: skip
    failed = {**life, "killed": False, "code": 1, "kept_s": 0.0, "kept_steps": 0, "imports_s": None, "resume_s": 1.0}
    failed["start_cpu_s"] = None
    told = kills.told([life, {**life, "kept_steps": 0, "resume_s": 2.0}, failed])
    assert told["kills"] == 2 and told["effective"] == pytest.approx(108 / 180)
    assert told["effective_without_imports"] == pytest.approx(108 / 176)
    alone = 54 / 49 * 58 + 54 / 56 * 58
    assert told["effective_if_starts_had_the_processor"] == pytest.approx(alone / 180)
    assert told["resume_most_s"] == 2.0, "the first life does not resume"
    assert told["lives_that_kept_nothing"] == 1 and told["other_ends"] == [1]


@pytest.mark.unit
def test_cheap_checkpoints_are_written_more_often_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(cell_store.time, "monotonic", lambda: now[0])
    store = CellStore(tmp_path, cell(), 10.0)
    write = store._checkpoints.save

    def save(cost: float) -> None:
        def slow(*args: Any, **settings: Any) -> Any:
            now[0] += cost
            return write(*args, **settings)

        monkeypatch.setattr(store._checkpoints, "save", slow)
        store.save({}, step=1, seconds=0.0, events=[])

    def waits() -> float:
        """Seconds until the next one is due."""
        began = now[0]
        while not store.is_due():
            now[0] += 0.125
        return now[0] - began

    for cost, expected in ((0.0, SOONEST_S), (0.0625, 0.0625 / SAVING_SHARE), (5.0, 10.0)):
        save(cost)
        assert waits() == expected
    store.close()


@pytest.mark.unit
def test_checkpoints_after_every_step_stay_so(tmp_path: Path) -> None:
    store = CellStore(tmp_path, cell(), 0.0)
    assert store.is_due()
    store.close()
