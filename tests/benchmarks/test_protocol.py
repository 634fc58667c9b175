"""The benchmark protocol on a task of formulas: choices, order, resuming, seals, divergence."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from benchmarks.training.protocol import ARMS, Arm, CellStore, Plan, Record, Source, Task, register_arm, run, summarise
from benchmarks.training.protocol.plan import MAX_RATES
from benchmarks.training.protocol.runner import gpus, settle
from benchmarks.training.protocol.task import TASKS, register_task
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.benchmarks import fake_task

from esper.errors import ConfigError

pytestmark = pytest.mark.unit

NEVER = math.inf
SCORES = {"score", "score_interval", "score_per_seed", "loss", "loss_interval", "loss_per_seed"}


@pytest.fixture(autouse=True, scope="module")
def fake_arms() -> Iterator[None]:
    with patch.dict(ARMS, fake_task.ARMS, clear=True):
        yield


def plan(*, code: str = "v1", seeds: int = 3, arms: tuple[str, ...] = (), **changed: Any) -> Plan:
    return Plan(fake_task.TASK, seeds=range(seeds), source=Source(), code=code, arms=arms, **changed)


def finish(folder: Path, made: Plan | None = None, *, workers: int = 0) -> tuple[Plan, CellStore, list[Record]]:
    """Train all that is missing; returns what was trained in this call."""
    made, store, trained = made or plan(), CellStore(folder), list[Record]()
    assert run(made, store, workers=workers, deadline=NEVER, note=trained.append)
    return made, store, trained


def without_scores(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_scores(inner) for key, inner in value.items() if key not in SCORES}
    return [without_scores(inner) for inner in value] if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------------------
# Learning rates


def test_each_arm_gets_its_own_rate_from_a_grid_extended_until_the_best_is_bracketed(tmp_path: Path) -> None:
    made, _, _ = finish(tmp_path)
    assert made.rates("grown") == (1.0, 2.0, 4.0) and made.chosen("grown") == 2.0
    assert made.rates("wide") == (1.0, 2.0, 4.0, 6.0, 9.0, 13.5) and made.chosen("wide") == 9.0
    assert made.rates("small") == (0.198, 0.297, 0.445, 0.667, 1.0, 2.0, 4.0) and made.chosen("small") == 0.297


@given(st.floats(0.05, 100.0))
@settings(max_examples=25)
def test_a_chosen_rate_has_neighbours_on_both_sides_or_the_grid_is_full(best: float) -> None:
    with tempfile.TemporaryDirectory() as folder, patch.dict(fake_task.BEST, grown=best):
        made, _, trained = finish(Path(folder), plan(seeds=1, arms=("grown",)))
    rates, chosen = made.rates("grown"), made.chosen("grown")
    assert len(rates) == len(trained) <= MAX_RATES
    assert chosen == min(rates, key=lambda lr: abs(math.log(lr / best)))
    assert rates[0] < chosen < rates[-1] or len(rates) == MAX_RATES
    assert all(b / a <= 2.01 for a, b in itertools.pairwise(rates)), "the grid has no holes"


def test_only_the_first_seed_is_trained_at_rates_that_are_not_chosen(tmp_path: Path) -> None:
    made, _, trained = finish(tmp_path)
    assert {record.cell.seed for record in trained if record.cell.lr != made.chosen(record.cell.arm)} == {0}
    assert all(len(made.complete(arm) or ()) == 3 for arm in made.arms)


# ----------------------------------------------------------------------------------------------------------------------
# Order


def test_a_follower_waits_for_the_grown_training_of_its_seed_at_the_chosen_rate(tmp_path: Path) -> None:
    made, _, trained = finish(tmp_path)
    seen: set[tuple[int, float]] = set()
    for record in trained:
        cell = record.cell
        if cell.arm == "grown":
            seen.add((cell.seed, cell.lr))
        if cell.arm == "wide":
            assert (cell.seed, made.chosen("grown")) in seen and cell.twin_lr == made.chosen("grown")
            assert record.given == {"width": 10 + cell.seed} and record.outcome.widths == (10 + cell.seed,)
        else:
            assert cell.twin_lr is None and record.given == {}


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_cells_and_choices_do_not_depend_on_the_order_in_which_trainings_finish(seed: int) -> None:
    rng, made = random.Random(seed), plan()
    while ready := made.ready():
        work = made.prepared(rng.choice(ready))
        result = work.arm.train(work.task.preset(work.source), work.cell, work.given)
        made.add(Record(cell=work.cell, outcome=result.outcome, given=work.given))
    with tempfile.TemporaryDirectory() as folder:
        ordered, _, trained = finish(Path(folder))
    assert set(made.done) == set(ordered.done) and len(trained) == len(made.done)
    assert [made.chosen(arm) for arm in made.arms] == [ordered.chosen(arm) for arm in made.arms]


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 2, 5, 11])
def test_after_a_kill_only_what_is_missing_is_trained(tmp_path: Path, after: int) -> None:
    _, whole_store, whole = finish(tmp_path / "whole")
    store, kept = CellStore(tmp_path / "cut"), list[str]()

    def kill(record: Record) -> None:
        kept.append(record.cell.name)
        if len(kept) == after:
            raise Killed

    with pytest.raises(Killed):
        run(plan(), store, workers=0, deadline=NEVER, note=kill)
    (tmp_path / "cut" / "half.1.tmp").write_text('{"format"', encoding="utf-8")  # killed while it wrote
    made, store, rest = finish(tmp_path / "cut")
    assert len(kept) == after and len(rest) == len(whole) - after
    assert kept + [record.cell.name for record in rest] == [record.cell.name for record in whole]
    assert summarise(made, store) == summarise(finish(tmp_path / "whole")[0], whole_store)


def test_two_sittings_share_a_folder(tmp_path: Path) -> None:
    finish(tmp_path, plan(arms=("grown",)))
    made, store, trained = finish(tmp_path)
    assert {record.cell.arm for record in trained} == {"wide", "small"}
    assert set(summarise(made, store)["arms"]) == {"grown", "wide", "small"}


def test_a_passed_deadline_starts_nothing_and_a_summary_says_what_is_missing(tmp_path: Path) -> None:
    made, store = plan(), CellStore(tmp_path)
    for workers in (0, 1):
        assert not run(made, store, workers=workers, deadline=time.monotonic(), note=lambda record: None)
    summary = summarise(made, store)
    assert not store.read() and "arms" not in summary and summary["incomplete"] == ["grown", "wide", "small"]


def test_a_finished_arm_is_summed_up_before_the_others_are(tmp_path: Path) -> None:
    finish(tmp_path, plan(arms=("grown", "small")))
    made = plan()
    for record in CellStore(tmp_path).read():
        made.add(record)
    summary = summarise(made, CellStore(tmp_path))
    assert set(summary["arms"]) == {"grown", "small"} and summary["incomplete"] == ["wide"]


@pytest.mark.parametrize("other", [{"code": "v2"}, {"steps": 20}, {"settings": ("graft.lr_boost=1",)}])
def test_cells_of_another_version_or_setting_are_not_mixed_in(tmp_path: Path, other: dict[str, Any]) -> None:
    _, _, first = finish(tmp_path)
    _, _, second = finish(tmp_path, plan(**other))
    assert len(second) == len(first) and len(CellStore(tmp_path).read()) == 2 * len(first)


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    _, store, trained = finish(tmp_path)
    assert sorted(store.read(), key=lambda r: r.cell.name) == sorted(trained, key=lambda r: r.cell.name)
    assert all((tmp_path / f"{record.cell.name}.json").stat().st_size < 4000 for record in trained)
    assert all(record.environment["torch"] for record in trained)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other.json must be a record .*move it out"):
        CellStore(tmp_path).read()


@pytest.mark.integration
def test_worker_processes_train_the_same_cells(tmp_path: Path) -> None:
    _, _, here = finish(tmp_path / "here", plan(arms=("grown", "wide")))
    _, store, _ = finish(tmp_path / "pool", plan(arms=("grown", "wide")), workers=2)
    there = store.read()
    assert {r.cell: (r.outcome, r.given) for r in there} == {r.cell: (r.outcome, r.given) for r in here}


def test_plans_that_are_trained_side_by_side_share_their_cells(tmp_path: Path) -> None:
    alone, _, first = finish(tmp_path / "alone", plan(arms=("grown",)))
    _, _, second = finish(tmp_path / "alone", plan(arms=("grown", "small")))
    plans, trained = [plan(arms=("grown",)), plan(arms=("grown", "small"))], list[Record]()
    assert run(plans, CellStore(tmp_path / "both"), workers=0, deadline=NEVER, note=trained.append)
    assert [record.cell.name for record in trained] == [record.cell.name for record in first + second]
    assert plans[0].complete("grown") == plans[1].complete("grown") == alone.complete("grown")


def test_workers_take_the_visible_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,0")
    places, turn, seen = gpus(), get_context("spawn").Value("i", 0), list[str]()
    for _ in range(3):
        settle(turn, places)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["3", "0", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpus() == ["0", "1"]


# ----------------------------------------------------------------------------------------------------------------------
# Seals


def test_what_plans_read_holds_no_test_score(tmp_path: Path) -> None:
    _, store, trained = finish(tmp_path)
    assert not any("score" in json.dumps(repr(record)) for record in store.read())
    assert store.unseal(trained[0].cell)[0] == 1 / (1 + trained[0].outcome.held_out)


@given(st.randoms(use_true_random=False))
@settings(max_examples=15)
def test_permuted_test_scores_change_scores_in_the_summary_and_nothing_else(rng: random.Random) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, store, _ = finish(folder)
        before = summarise(made, store)
        paths = sorted(folder.glob("*.json"))
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        sealed = [content["sealed"] for content in contents]
        rng.shuffle(sealed)
        for path, content, seal in zip(paths, contents, sealed, strict=True):
            path.write_text(json.dumps(content | {"sealed": seal}), encoding="utf-8")
        again, store, trained = finish(folder)
        after = summarise(again, store)
    assert not trained and [again.chosen(arm) for arm in again.arms] == [made.chosen(arm) for arm in made.arms]
    assert without_scores(after) == without_scores(before)


def test_only_scores_of_chosen_rates_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, store, _ = finish(tmp_path)
    opened, unseal = list[tuple[str, float]](), store.unseal

    def watched(cell: Any) -> tuple[float, float]:
        opened.append((cell.arm, cell.lr))
        return unseal(cell)

    monkeypatch.setattr(store, "unseal", watched)
    summarise(made, store)
    assert sorted(opened) == sorted((arm, made.chosen(arm)) for arm in made.arms for _ in range(3))


# ----------------------------------------------------------------------------------------------------------------------
# Summary, divergence


def test_a_summary_pairs_by_seed_and_counts_everything(tmp_path: Path) -> None:
    made, store, trained = finish(tmp_path)
    summary = summarise(made, store)
    small, wide = summary["grown_minus"]["small"], summary["grown_minus"]["wide"]
    assert small["flops_ratio"] == pytest.approx((10 + 11 + 12) / 12) and wide["flops_ratio"] == 1.0
    gaps = [abs(math.log(9 / 8)) - 0.0] * 3
    assert wide["loss"] == pytest.approx(-sum(gaps) / 3) and wide["loss_interval"][0] == pytest.approx(-gaps[0])
    assert summary["cost"] == {
        "trainings": len(trained),
        "flops": sum(record.outcome.flops for record in trained),
        "seconds": 0.5 * len(trained),
    }
    assert summary["arms"]["wide"]["search"]["trainings"] == 6
    assert len(summary["cells"]) == len(trained) and sum(cell["scored"] for cell in summary["cells"]) == 9
    assert not any("score" in cell for cell in summary["cells"])


def test_a_rate_that_diverges_is_worse_than_any_other(tmp_path: Path) -> None:
    with patch.dict(ARMS, fake_task.BAD_ARMS):
        made, store, _ = finish(tmp_path, plan(arms=("fragile",)))
        summary = summarise(made, store)
    assert made.chosen("fragile") == 2.0 and made.trials("fragile")[4.0].held_out == math.inf
    fragile = summary["arms"]["fragile"]
    assert fragile["lr_trials"] == {"1": pytest.approx(math.log(2)), "2": 0.0, "4": None}
    assert fragile["diverged_seeds"] == [2] and fragile["score"] is None and fragile["score_per_seed"][2] is None
    assert summary["grown_minus"]["fragile"]["score"] is None
    json.dumps(summary, allow_nan=False)


def test_an_arm_that_always_diverges_ends_and_is_said_to(tmp_path: Path) -> None:
    with patch.dict(ARMS, fake_task.BAD_ARMS):
        made, store, _ = finish(tmp_path, plan(arms=("hopeless",)))
        summary = summarise(made, store)
    assert len(made.rates("hopeless")) == MAX_RATES and min(made.rates("hopeless")) < 0.2
    assert summary["arms"]["hopeless"]["diverged_seeds"] == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------------------------
# Registration


def test_an_arm_whose_package_is_missing_is_not_planned_but_its_cells_count(tmp_path: Path) -> None:
    missing = Arm(name="small", title="small", train=fake_task.train, requires="no_such_package")
    with patch.dict(ARMS, small=missing):
        made, store, trained = finish(tmp_path)
        assert "small" not in {record.cell.arm for record in trained}
        assert summarise(made, store)["incomplete"] == ["small"]
    finish(tmp_path)
    with patch.dict(ARMS, small=missing):
        made, store, trained = finish(tmp_path)
        assert not trained and summarise(made, store)["incomplete"] == []


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="no arm is called 'other'; known: grown, wide, small"):
        plan(arms=("other",))
    with pytest.raises(ConfigError, match="must be of a-z"):
        register_arm(Arm(name="A b", title="", train=fake_task.train))
    with pytest.raises(ConfigError, match="arm names must differ"):
        register_arm(
            Arm(name="grown", title="", train=lambda preset, cell, given: fake_task.train(preset, cell, given))
        )
    with pytest.raises(ConfigError, match="must be of a-z"):
        register_task(Task(name="a-b", title="", make=fake_task.make))
    with patch.dict(TASKS, fake=fake_task.TASK), pytest.raises(ConfigError, match="task names must differ"):
        register_task(Task(name="fake", title="", make=lambda source: fake_task.make(source)))
