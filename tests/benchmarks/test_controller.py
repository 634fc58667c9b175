"""The controller benchmarks: fixed schedules, cells that are kept, pages that show what was measured."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.controller import defaults, effort, frontier, headroom, pages, parity, stack_speed, variants
from benchmarks.controller.contest import runs
from benchmarks.controller.schedules import NEVER, STARTS, controller, even_schedules, schedules, tuned_schedules

from esper.greenhouse.family import FAMILIES, FIRST_HELD_OUT, HostSpec
from esper.greenhouse.frontier import shapes_of, tasks_of
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.protocol import Germinate

pytestmark = pytest.mark.unit


def test_schedules_are_distinct_and_always_the_same() -> None:
    first = schedules(20, 400, 2)
    assert first == schedules(20, 400, 2) and len(first) == 64 and len(set(first)) >= 63 and first[0] == NEVER
    assert set(even_schedules(20, 400)) <= set(first)
    tuned = tuned_schedules(20, 400)
    assert len(set(tuned)) == len(tuned) == 36 and set(even_schedules(20, 400)) <= set(tuned)
    for start in STARTS:  # every even schedule with each start
        same = [schedule for schedule in tuned if {growth.start for growth in schedule} == {start}]
        assert [[replace(g, start="") for g in schedule] for schedule in same] == [
            [replace(g, start="") for g in schedule] for schedule in even_schedules(20, 400)
        ]
    assert {schedule[0].start for schedule in even_schedules(20, 400)} == set(STARTS)
    for schedule in first:
        steps = [growth.step for growth in schedule]
        assert steps == sorted(steps) and all(step % 20 == 0 and 20 <= step < 400 for step in steps)
        assert all(-1 <= growth.site < 2 for growth in schedule)
    assert any(growth.site == 2 for schedule in schedules(20, 400, 3) for growth in schedule)


def test_a_schedule_asks_for_multiples_of_the_hosts_own_widths() -> None:
    hosts = Hosts([HostSpec(family="teacher", task=0, seed=0, lr=1e-2)])
    entries = controller(even_schedules(20, 400)[3], hosts, 0).entries
    widths = hosts.lives[0].widths
    assert [plan.width for plan in entries[0].seeds] == [max(4, 2 * width) for width in widths]


def test_cells_are_kept_and_not_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []

    def play(specs: Any, plans: Any, *, keep_all: bool) -> list[dict[str, float]]:
        played.append(len(specs))
        return [{"reward": float(n), "loss": 0.1, "flops": 1e7} for n in range(len(specs))]

    monkeypatch.setattr(headroom, "play", play)
    wanted = {name: headroom.cell(FAMILIES["teacher"], [0, 1], [0, 1], 1e-2, NEVER) for name in "abcde"}
    for _ in range(2):
        cells = headroom.Cells(tmp_path / "cells.json")
        cells.fill(wanted)
    assert played == [16, 4] and [run["reward"] for run in cells.known["b"]] == [4.0, 5.0, 6.0, 7.0]
    assert headroom.rewards(cells.known["a"], FAMILIES["teacher"], [0, 1]).shape == (2, 2)


def test_everything_of_a_family_is_measured_from_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards are made up: the schedule with more growth is better, the heuristic grows once, one learning rate is
    best."""

    def play(specs: Any, plans: Any, *, keep_all: bool) -> list[dict[str, float]]:
        grown = [1 if plan is None else len(plan) for plan in plans]
        return [
            {"reward": 0.0, "loss": 0.5 - 0.01 * num - (spec.lr == 2e-2) * 0.1 + 1e-3 * spec.seed, "flops": 3e7}
            for spec, num in zip(specs, grown, strict=True)
        ]

    monkeypatch.setattr(headroom, "play", play)
    found = headroom.measure(FAMILIES["teacher"], headroom.Cells(tmp_path / "cells.json"), 4)
    assert found["lr"] == found["never_lr"] == 2e-2 and len(found["even"]) == 3 and found["tasks"] == 4
    most = max(map(len, schedules(20, 400, 2)))
    assert {len(schedules(20, 400, 2)[number]) for number in found["oracle_schedules"]} == {most}
    assert found["oracle_minus_even"]["mean"] > 0 < found["even_minus_never"]["mean"]
    assert found["heuristic_minus_even"]["mean"] < 0 < found["heuristic_minus_never"]["mean"]
    assert "reward_any_shape" in found


def test_settings_of_the_grid_differ_in_pace_size_and_start() -> None:
    found = defaults.settings()
    assert len(found) == 1 + len(defaults.FIRSTS) * len(defaults.GROWTHS) * len(defaults.STARTS) and not found["never"]
    late = found["0.5 times from 0.4, tiny"]
    config = defaults.config_of(late, 2000)
    assert (config.first, config.growth, config.last_share) == (800, 0.5, 0.15) and late["start"] == "tiny"
    runs_of = {
        start: defaults.play("flat", late | {"first": 0.1, "start": start}, 2e-2, [0], [500])
        for start in defaults.STARTS
    }
    assert runs_of["tiny"]["flops"] != runs_of["random_zero"]["flops"]
    assert all(len(run["rewards"]) == 1 for run in runs_of.values())
    told = defaults.summary({})
    assert told["incomplete"] == list(found) and told["rows"] == {}


def test_what_was_measured_with_an_earlier_default_states_its_settings() -> None:
    """So that the commands give the same numbers whatever the default is."""
    grid = [defaults.config_of(setting, 400) for setting in defaults.settings().values() if setting]
    assert grid and {config.patience for config in grid} == {2} and None not in {config.growth for config in grid}
    for config in effort.SETTINGS.values():
        assert config.patience is not None and config.growth is not None and config.first is not None
    for variant in variants.VARIANTS.values():
        config = variant.tamiyo(400)
        assert config.patience is not None and config.growth is not None


def test_a_schedule_on_real_hosts_and_its_reward() -> None:
    specs, plans = headroom.cell(FAMILIES["teacher"], [0], [0], 2e-2, even_schedules(20, 400)[0])
    short = [HostSpec(family=s.family, task=s.task, seed=s.seed, lr=s.lr, steps=80) for s in specs]
    (run,) = headroom.play(short, plans)
    assert math.isfinite(run["reward"]) and run["flops"] > 0
    again = headroom.rewards([run], FAMILIES["teacher"], [0])
    assert again[0, 0] == pytest.approx(run["reward"], abs=1e-2)


def test_evaluation_tasks_are_no_training_tasks() -> None:
    assert min(headroom.HELD_OUT) >= FIRST_HELD_OUT > max(headroom.TUNING)
    assert not set(headroom.SELECTION_SEEDS) & set(headroom.FRESH_SEEDS)
    assert not {*headroom.SELECTION_SEEDS, *headroom.FRESH_SEEDS} & {frontier.FIRST_SEED + n for n in range(3)}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_has_frontiers_for_training_and_evaluation(name: str) -> None:
    tasks = tasks_of(name)
    assert any(task < FIRST_HELD_OUT for task in tasks)
    if FAMILIES[name].purpose == "longer":
        assert {*defaults.TUNING, *runs.EVALUATED[:8]} <= set(tasks)
    elif FAMILIES[name].purpose == "pace":
        assert set(tasks) == set(defaults.TUNING)  # the pace is chosen on them, nothing is evaluated there
    elif FAMILIES[name].purpose != "probe":
        assert set(headroom.HELD_OUT[:8]) <= set(tasks) and set(headroom.TUNING[:8]) <= set(tasks)


def test_static_networks_are_measured_and_written_task_by_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "FOLDER", tmp_path)
    monkeypatch.setattr(frontier, "LEARNING_RATES", (1e-2,))
    monkeypatch.setattr(frontier, "shapes_of", lambda family, task, own: shapes_of(family, task, own=own)[:2])
    family = FAMILIES["null"]
    frontier.run(family, [3, 0], 2, own=True)
    frontier.run(family, [0], 2, own=True)
    known = json.loads((tmp_path / "null.json").read_text(encoding="utf-8"))
    assert list(known["tasks"]) == ["0", "3"] and known["steps"] == family.steps
    for task in known["tasks"].values():
        assert len(task["losses"]) == len(task["flops"]) == 2 and task["deviation"] > 0


def test_ranks_and_their_correlation() -> None:
    assert parity.spearman([1.0, 2.0, 3.0, 10.0], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(1.0)
    assert parity.spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert parity.spearman([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(math.sqrt(0.75))
    assert math.isnan(parity.spearman([1.0, 1.0], [1.0, 2.0]))


def test_a_summary_of_hosts() -> None:
    def host(rewards: list[float]) -> list[dict[str, float]]:
        return [{"reward": value, "loss": -value, "flops": 1.0 + value} for value in rewards]

    runs = {
        "a": {"stack": host([1.0, 2.0, 3.0]), "real": host([1.0, 2.0, 3.0]), "real again": host([1.0, 3.0, 2.0])},
        "b": {"stack": host([1.0, 2.0, 3.0]), "real": host([2.0, 1.0, 3.0])},
    }
    found = parity.summary(runs)
    assert found["stack and real"]["reward"]["mean"] == 0.75 and not found["passes"] and found["hosts"] == 2
    assert found["real and real again"]["loss"]["by_host"] == [0.5] and found["mean_reward_gap"] == 0.0


@pytest.mark.integration
def test_pages_show_what_was_measured() -> None:
    for path, text in pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"run python -m benchmarks.controller.pages: {path.name} is behind"
        )


def test_what_a_step_costs_is_measured_with_growth_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    host = HostSpec(family="textures", task=0, seed=0, lr=1e-2)
    for grows, wanted in ((False, []), (True, [(40, 2), (140, 2)])):
        hosts, asked = Hosts([host]), list[tuple[int, int]]()
        controller = stack_speed.growing("textures", grows=grows)
        for step in (20, 40, 140):
            hosts.step_count = step
            asked += [(step, len(c.seeds)) for c in controller.decide(observe(hosts, 0)) if isinstance(c, Germinate)]
        assert asked == wanted
    ticks = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(stack_speed.time, "process_time", lambda: next(ticks))
    assert stack_speed.microseconds(lambda: None, 4) == 250000.0, "the best of three"


def test_intervals() -> None:
    found = headroom.interval_of(np.array([1.0, 2.0, 3.0]))
    assert found == {"mean": 2.0, "standard_error": round(1 / math.sqrt(3), 4)}
