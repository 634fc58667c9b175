"""Learned controllers against all controls: what is kept, how policies are trained, and what differences say."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.controller import compare, effort
from benchmarks.controller.contest import arms, policies, recipes, runs, verdict
from benchmarks.controller.contest.cells import Cells

from esper.greenhouse.episodes import SCOPE, Episodes
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.frontier import frontier_of, tasks_of
from esper.tamiyo.features import GLOBAL_COLUMNS
from esper.tamiyo.neural import policy_file

pytestmark = pytest.mark.component

SMALL = {"updates": 2, "hosts": 5, "copies": 2, "teachers": 5, "tried": 2, "checkpoint_every": 1}
HOST = HostSpec(family="tabular", task=1016, seed=1000, lr=2e-2)


def doubled(value: int) -> int:
    if value < 0:
        raise ValueError("negative")
    return 2 * value


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def test_cells_are_done_once_and_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, workers=0, until=math.inf)
    assert cells.fill(doubled, {"a": (1,), "b": (2,)}) and cells.known == {"a": 2, "b": 4}
    path.write_text(path.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    again = Cells(path, workers=0, until=math.inf)
    assert again.known == {"a": 2}
    assert not Cells(path, workers=0, until=time.monotonic()).fill(doubled, {"b": (2,)})  # no time left
    assert again.fill(doubled, {"a": (-1,), "b": (2,)}) and again.known["b"] == 4  # "a" is not done again


def test_a_cell_that_fails_in_a_worker_leaves_the_others_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = Cells(tmp_path / "cells.jsonl", workers=1, until=time.monotonic() + 60)
    try:
        assert not cells.fill(doubled, {"bad": (-1,), "good": (3,)})
    finally:
        cells.close()
    assert cells.known == {"good": 6} and "bad failed: ValueError: negative" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Policies


def test_a_recipe_decides_what_a_policy_sees_and_what_pays() -> None:
    episodes = Episodes([HostSpec(family="spirals", task=0, seed=1, lr=2e-2)])
    sight = episodes.sights[0]
    time_only = recipes.lens(recipes.RECIPES["time-only"])(sight)
    assert time_only.features.world[GLOBAL_COLUMNS.index("progress")] == pytest.approx(0.05)
    assert not time_only.features.sites.any() and np.count_nonzero(time_only.features.world) == 1
    open_one = recipes.lens(recipes.RECIPES["no-masks"])(sight).masks
    assert open_one.operation.all() and open_one.cullable[1:].all() and not sight.masks.cullable.any()
    assert int(open_one.fits.any(axis=(0, 2)).sum()) == len(SCOPE.sizes) and not open_one.fits[..., 1:].any()
    while not episodes.done:
        episodes.step([policies.WAIT])
    end, frontier = episodes.outcomes[0], frontier_of("spirals", 0)
    assert recipes.earned(recipes.RECIPES["raw-reward"], end, frontier) == end.reward
    dear = type(end)(**{**vars(end), "reward": -80.0})
    assert recipes.earned(recipes.FULL, dear, frontier) == -recipes.MOST
    assert recipes.earned(recipes.RECIPES["uncounted"], dear, frontier) > -recipes.MOST  # its cost is not counted


@pytest.mark.long
def test_a_training_that_was_cut_short_goes_on_to_the_same_policy(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = policies.train("policy", 3, str(tmp_path / "whole"), SMALL)
    policies.train("policy", 3, str(tmp_path / "parts"), SMALL, 0.0)  # no time for an update
    parts = policies.train("policy", 3, str(tmp_path / "parts"), SMALL)
    assert whole["updates"] == parts["updates"] == 2 and whole["lines"] == parts["lines"]
    one, card = policy_file.load(tmp_path / "whole" / "policy")
    two, other = policy_file.load(tmp_path / "parts" / "policy")
    assert card.sha256 == other.sha256 and all(map(torch.equal, one.parameters(), two.parameters()))
    cloned, _ = policy_file.load(tmp_path / "whole" / "cloned")
    assert not all(map(torch.equal, one.parameters(), cloned.parameters()))
    assert set(card.hosts) == {n for n, family in FAMILIES.items() if family.purpose == "training"}
    assert card.ranges.num_sites == (1, 3) and "episodes of stacked hosts" in card.data


def test_a_critic_learns_what_siblings_do_without(tmp_path: Path) -> None:
    training = policies.Training(recipes.RECIPES["critic"], policies.Extent(**SMALL), 0, "small")
    before = training.policy.value.weight.clone()
    training.update()
    assert not torch.equal(before, training.policy.value.weight)
    siblings = policies.Training(recipes.RECIPES["no-start"], policies.Extent(**SMALL), 0, "small")
    siblings.update()
    assert not siblings.policy.value.weight.any() and siblings.begin() is None


# ----------------------------------------------------------------------------------------------------------------------
# Arms


def planned(folder: Path, **tuned: object) -> str:
    usual = {"lr": {"heuristic": {"tabular": 4e-2}}, "schedules": {}, "rate": 1.0}
    (folder / "plan.json").write_text(json.dumps(usual | tuned), encoding="utf-8")
    return str(folder)


def test_arms_act_as_their_names_say(tmp_path: Path) -> None:
    growth = [{"step": 60, "site": 0, "size": 1.0, "start": "random_zero"}]
    folder = planned(tmp_path, schedules={"even": growth, "even-own": {"tabular": []}})
    asked = {}
    for name in ("never", "always", "even", "even-own", "random", "heuristic"):
        watched = runs.Watched(arms.make(name, HOST, folder))
        runs.run_stack([HOST], [watched])
        asked[name] = watched.asked
    assert asked["never"] == asked["even-own"] == [] and asked["even"] == [(60, 0, 1.0)]
    assert asked["always"][0] == (20, -1, 1.0) and len(asked["always"]) > 1
    assert asked["random"][0][0] == 20 and len(asked["heuristic"]) >= 1
    plan = arms.plan_in(folder)
    assert plan.lr("heuristic", "tabular") == plan.lr("karn-200", "tabular") == 4e-2  # advice has the same rate
    assert plan.lr("always", "tabular") == FAMILIES["tabular"].lr
    planned(tmp_path, rate=0.0)
    watched = runs.Watched(arms.make("random", HOST, folder))  # the plan was read again
    runs.run_stack([HOST], [watched])
    assert watched.asked == []


def test_evaluated_tasks_are_fresh_and_known() -> None:
    for family in compare.FAMILY_NAMES:
        known = set(tasks_of(family))
        assert set(runs.EVALUATED) <= known and set(runs.TUNING) <= known
    assert not set(runs.EVALUATED) & {*range(1016)}  # what the headroom was measured on is not
    assert {name for name, _ in compare.Scale().trained} == set(recipes.RECIPES)


# ----------------------------------------------------------------------------------------------------------------------
# Verdict


def cells_of(rewards: dict[str, float], spread: float = 0.1) -> dict[str, list[list[float]]]:
    rng = np.random.default_rng(0)
    luck = spread * rng.standard_normal((3, 8))
    return {
        f"stack/{arm}/tabular/{seed}": [[mean + luck[seed, task], 0.5, 1e6, 100, 1, 1, 0] for task in range(8)]
        for arm, mean in rewards.items()
        for seed in range(3)
    }


def test_differences_are_paired_and_a_win_has_to_be_over_all() -> None:
    known = verdict.table(cells_of({"policy:0": 1.0, "policy:1": 1.2, "never": 0.5, "heuristic": 1.3}), "stack")
    assert known["policy"]["tabular"].shape == (2, 3, 8, len(verdict.COLUMNS))
    found = verdict.against(known, "policy", ["never", "heuristic"])
    over = found["never"]["overall"]
    assert over["value"] == pytest.approx(0.6, abs=0.01) and 0.45 < over["low"] < over["high"] < 0.75
    assert found["heuristic"]["families"]["tabular"]["high"] < 0
    told = verdict.win(found)
    assert told["not_above"] == ["heuristic"] and not told["above_all"] and told["worse_by_half"] == []
    assert verdict.arms(known)["policy"]["tabular"]["by_policy"] == pytest.approx([1.0, 1.2], abs=0.1)


def test_holm_and_the_middle_half() -> None:
    assert verdict.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}
    assert verdict.iqm(np.array([-100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0])) == 3.5


def test_only_seeds_that_all_policies_have_are_told() -> None:
    cells = cells_of({"policy:0": 1.0, "policy:1": 1.0})
    del cells["stack/policy:1/tabular/2"]
    assert verdict.table(cells, "stack")["policy"]["tabular"].shape[1] == 2
    del cells["stack/policy:1/tabular/0"]
    assert "policy" not in verdict.table(cells, "stack")


# ----------------------------------------------------------------------------------------------------------------------
# Tuning effort


def test_a_failure_pays_for_the_sweep_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    runs_of = [{"held_out": 0.4, "score": 0.8, "flops": 5.0, "cpu_s": 1.0}] * 3
    found = {"growing": effort.spent(runs_of, 0.9), "sweep": effort.spent(runs_of, 0.7)}
    assert not found["growing"]["reached"] and found["sweep"]["reached"]
    assert effort.paid(found, "growing", "runs") == 6 and effort.paid(found, "sweep", "flops") == 15.0
    monkeypatch.setattr(effort, "STEPS", 20)
    one = effort.static_run("waves", 0, 8, 2e-2, 0)
    assert one["flops"] == 6.0 * 20 * 64 * (5 * 8 + 8 * 8 + 8 * 8 + 8 * 2) and one["score"] < 1
    assert effort.growing_run("shells", 0, 2e-2, 0)["flops"] > 0
