"""Learned controllers against all controls: what is kept, how policies are trained, and what differences say."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.controller import compare, effort, pages, ship
from benchmarks.controller.contest import arms, policies, recipes, runs, verdict
from benchmarks.controller.contest.cells import Cells

from esper.config import TamiyoConfig
from esper.greenhouse.episodes import SCOPE, Episodes
from esper.greenhouse.family import FAMILIES, HostSpec
from esper.greenhouse.frontier import LEARNING_RATES, frontier_of, tasks_of
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.protocol import Observation
from esper.tamiyo.actions import WAIT, Action
from esper.tamiyo.features import GLOBAL_COLUMNS
from esper.tamiyo.neural import policy_file
from esper.tamiyo.sight import Sight

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


def test_a_cell_is_done_once_more_where_that_is_asked_and_forgotten_for_good(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = Cells(path, workers=0, until=math.inf)
    assert cells.fill(doubled, {"a": (1,), "b": (2,)}) and cells.fill(doubled, {"a": (5,), "b": (7,)}, again=["a"])
    cells.forget(["b"])
    assert cells.known == {"a": 10} == Cells(path, workers=0, until=math.inf).known  # the later line counts
    assert set(cells.seconds) == {"a", "b"}  # what it took is not forgotten
    path.write_text(path.read_text(encoding="utf-8") + '{"cell": "c", "val', encoding="utf-8")  # killed
    after = Cells(path, workers=0, until=math.inf)
    assert after.fill(doubled, {"c": (3,)})
    assert Cells(path, workers=0, until=math.inf).known == {"a": 10, "c": 6}
    late = Cells(path, workers=0, until=time.monotonic())
    assert not late.fill(doubled, {"a": (1,)}, again=["a"]) and late.known["a"] == 10


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
    assert card.hosts == policies.LEARNED_ON and card.ranges.num_sites == (1, 3)
    assert "runs of 400 and 2,000 steps" in card.data and "runs of 400 and 2,000 steps" in card.limits[0]


def test_policies_learn_on_short_and_longer_hosts_of_training_families_side_by_side() -> None:
    short = [name for name, family in FAMILIES.items() if family.purpose == "training"]
    assert policies.LEARNED_ON == (*short, "teacher_long", "spirals_long", "tabular_long")
    specs = policies.draw_hosts(np.random.default_rng(0), compare.USUAL.hosts)
    assert [spec.family for spec in specs] == [name for name in policies.LEARNED_ON for _ in range(2)]
    assert all(spec.task < 1000 for spec in specs)
    some = [spec for spec in specs if spec.family in ("flat", "spirals_long")]
    steps: list[list[int]] = []

    def wait(sights: list[Sight], observations: list[Observation]) -> list[Action]:
        steps.append([seen.step for seen in observations])
        return [WAIT] * len(sights)

    played = policies.play(some, wait, recipes.FULL)
    assert steps == [[20 * n, 20 * n, 100 * n, 100 * n] for n in range(1, 20)]
    assert len(played.returns) == 4 and np.isfinite(played.rewards).all()


def test_every_familys_hosts_of_a_training_show_a_price_that_was_drawn() -> None:
    """Users differ in what a gain has to be worth: a policy should see that."""
    assert min(policies.PRICES) < TamiyoConfig().min_gain_per_cost < max(policies.PRICES)
    column = GLOBAL_COLUMNS.index("price")
    specs = [
        HostSpec(family=family, task=0, seed=seed, lr=2e-2, steps=40)
        for family in ("spirals", "tabular", "flat") for seed in (1, 2)
    ]  # fmt: skip

    def shown(rng: np.random.Generator | None) -> list[float]:
        told: list[float] = []

        def wait(sights: list[Sight], observations: list[Observation]) -> list[Action]:
            told.extend(seen.price for seen in observations)
            assert [s.features.world[column] for s in sights] == pytest.approx(
                [math.log(p.price) for p in observations]
            )
            return [WAIT] * len(sights)

        policies.play(specs, wait, recipes.FULL, rng=rng)
        return told

    assert shown(None) == [TamiyoConfig().min_gain_per_cost] * 6
    draws = [shown(np.random.default_rng(seed)) for seed in range(8)]
    assert draws[0] == shown(np.random.default_rng(0))
    assert all(found[::2] == found[1::2] for found in draws)  # two of a family
    assert {price for found in draws for price in found} == set(policies.PRICES)
    assert any(len(set(found)) == 3 for found in draws)


def test_what_is_imitated_on_longer_hosts_is_spread_over_their_whole_run() -> None:
    steps = {
        name: [g.step for plan in runs.listed("search", name) for g in plan] for name in ("tabular", "tabular_long")
    }
    assert [5 * step for step in steps["tabular"]] == steps["tabular_long"]  # equal numbers, the same schedule
    three, two = (runs.listed("search", "waves_long", like) for like in (None, "teacher"))
    assert max(g.site for plan in three for g in plan) == 2 and max(g.site for plan in two for g in plan) == 1
    training = policies.Training(recipes.FULL, policies.Extent(tried=2), 0, "small")
    played, chosen = training._best_branches([HostSpec(family="spirals_long", task=0, seed=1, lr=2e-2)])
    assert len(chosen) == 1 and len(played.returns) == 2 and len(played.sights) == 19


def test_a_critic_learns_what_siblings_do_without(tmp_path: Path) -> None:
    few = policies.Extent(**SMALL | {"hosts": 2})
    training = policies.Training(recipes.RECIPES["critic"], few, 0, "small")
    before = training.policy.value.weight.clone()
    training.update()
    assert not torch.equal(before, training.policy.value.weight)
    assert training.ranges is not None
    low, high = training.ranges.world[GLOBAL_COLUMNS.index("price")]
    assert low < high and {round(math.exp(end), 4) for end in (low, high)} <= set(policies.PRICES)
    siblings = policies.Training(recipes.RECIPES["no-start"], few, 0, "small")
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


def test_the_default_before_asks_for_more(tmp_path: Path) -> None:
    """On two classes: as many units as there are of them, or half the width."""
    folder, found = planned(tmp_path), {}
    host = replace(HOST, family="checkers")
    for name in ("heuristic", "heuristic-before"):
        hosts, subject = Hosts([host]), arms.make(name, host, folder)
        while not hosts.lives[0].cohorts:
            hosts.advance(20)
            for command in subject.decide(observe(hosts, 0)):
                apply(hosts, 0, command)
        found[name] = hosts.step_count, hosts.lives[0].cohorts[1].seeds[1].units
        again = arms.make(name, host, folder)
        assert again.state() != subject.state()
        again.load(subject.state())
        assert again.state() == subject.state()
    assert found == {"heuristic": (40, 2), "heuristic-before": (40, 4)}


def test_evaluated_tasks_are_fresh_and_known() -> None:
    scale = compare.Scale()
    for family in (*compare.FAMILY_NAMES, *compare.KINDS):
        known = set(tasks_of(family))
        num = len(scale.tasks) if verdict.group_of(family) == "short" else scale.few_tasks
        assert set(scale.tasks[:num]) <= known and set(runs.TUNING) <= known
    assert min(scale.tasks) >= 1064  # what was evaluated before, and what the headroom was measured on, is not
    tiny = compare.TINY
    for family in (*tiny.families, *tiny.kinds):
        num = len(tiny.tasks) if verdict.group_of(family) == "short" else tiny.few_tasks
        assert set(tiny.tasks[:num]) <= set(tasks_of(family))
    assert {name for name, _ in compare.Scale().trained} == set(recipes.RECIPES)


# ----------------------------------------------------------------------------------------------------------------------
# The contest as a whole


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what a contest does; nothing is trained or played."""
    names: list[str] = []

    def doing(name: str, found: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any) -> Any:
            names.append("/".join([name, *(str(part) for part in args[:4])]))
            return found(*args)

        return work

    rates = {str(lr): lr for lr in LEARNING_RATES}
    told = {"planned": 70, "episodes": 0, "begun": None, "lines": []}
    trained: Counter[tuple[str, int]] = Counter()

    def train(name: str, seed: int, *rest: Any) -> dict[str, Any]:
        trained[name, seed] += 1
        return told | {"updates": min(70, (50 - 10 * seed) * trained[name, seed])}

    monkeypatch.setattr(compare, "train", doing("train", train))
    monkeypatch.setattr(runs, "tune_schedules", doing("schedules", lambda f, k, lr, numbers: [lr * n for n in numbers]))
    monkeypatch.setattr(runs, "tune_static", doing("static", lambda f, lr: [{"row": 0, "lr": lr, "reward": lr}]))
    asked = {lr: [[[20, -1, 1.0]]] for lr in rates}
    monkeypatch.setattr(runs, "tune_arm", doing("arm", lambda *_: {"lr": rates, "asked": asked}))
    monkeypatch.setattr(runs, "tune_arm_real", doing("arm_real", lambda *_: {"lr": rates}))
    monkeypatch.setattr(runs, "gather", doing("gather", lambda *_: [{"report": 1}]))
    monkeypatch.setattr(runs, "evaluate", doing("", lambda *case: [[0.1, 0.5, 1e6, 9, 1, 1, 0] for _ in case[-1]]))
    return names


def contest_in(folder: Path, until: float = math.inf, **settings: Any) -> compare.Contest:
    contest = compare.Contest(folder, replace(compare.Scale(), **settings), workers=0, until=until)
    contest.run()
    return contest


def test_controls_and_policies_in_two_folders_are_one_contest_when_their_cells_are_joined(
    tmp_path: Path, done: list[str]
) -> None:
    alone = contest_in(tmp_path / "controls", policies=0, ablations=0, seeds=2)
    found = verdict.summary(alone.cells.known, alone.cells.seconds, alone.plan_path)
    everywhere = {*compare.FAMILY_NAMES, *compare.KINDS}
    for arm in compare.ON_KINDS:
        wanted = set(compare.KINDS) | (set(compare.SHORT) if arm == "karn-1000" else set())
        assert wanted <= set(found["real"]["arms"][arm]) <= everywhere
    assert set(found["real"]["arms"]["never"]) == everywhere and "policy" not in found["real"]["arms"]
    assert set(found["real"]["arms"]["search"]) == set(found["stack"]["arms"]["never"]) == set(compare.FAMILY_NAMES)
    trained = compare.Contest(
        tmp_path / "policies", compare.Scale(policies=2, ablations=1, seeds=2), workers=0, until=math.inf
    )
    assert trained.train()
    with (tmp_path / "policies" / "cells.jsonl").open("a", encoding="utf-8") as stream:
        stream.write((tmp_path / "controls" / "cells.jsonl").read_text(encoding="utf-8"))
    done.clear()
    whole = contest_in(tmp_path / "policies", policies=2, ablations=1, seeds=2)
    again = {"train", "schedules", "static", "gather"} | {
        f"/{m}/{arm}" for m in ("real", "stack") for arm in arms.CONTROLS
    }
    assert done and not [name for name in done if any(name.startswith(f"{head}/") for head in again)]
    plan = json.loads(whole.plan_path.read_text(encoding="utf-8"))
    assert {"heuristic", "policy:1", "cloned:0", "random", "critic:0"} <= set(plan["lr"])
    for arm in (*compare.ON_REAL, "random"):
        assert set(plan["lr"][arm]) == everywhere
    assert plan["schedules"]["even"]["grammar"] == plan["schedules"]["even"]["teacher"], "tuned on other hosts"
    assert set(plan["schedules"]["replay:1"]) == set(compare.FAMILY_NAMES)
    assert plan["schedules"]["even"]["waves_long"][0]["step"] == 5 * plan["schedules"]["even"]["waves"][0]["step"]
    found = verdict.summary(whole.cells.known, whole.cells.seconds, whole.plan_path)
    real, stack = found["real"]["arms"], found["stack"]["arms"]
    assert real["policy"]["waves_long"]["tasks"] == real["policy"]["waves"]["tasks"] == 8  # two cells of four, and one
    assert (stack["replay"]["waves"]["tasks"], stack["replay"]["waves_long"]["tasks"]) == (16, 8)
    assert set(real["karn-200"]) == set(real["replay"]) == set(compare.SHORT)  # the others are on all
    done.clear()
    contest_in(tmp_path / "policies", policies=2, ablations=1, seeds=2)
    assert done == []


def test_what_ran_out_of_its_seconds_is_trained_further_and_measured_anew(tmp_path: Path, done: list[str]) -> None:
    settings = {"policies": 2, "ablations": 0, "seeds": 1}
    first = contest_in(tmp_path, **settings)
    assert [first.cells.known[f"train/policy/{seed}"]["updates"] for seed in (0, 1)] == [50, 40]
    done.clear()
    contest_in(tmp_path, **settings)
    assert done == []  # as it is, without being asked
    further = contest_in(tmp_path, **settings, go_on=True)
    assert [name.split("/")[:3] for name in done[:2]] == [["train", "policy", "0"], ["train", "policy", "1"]]
    assert [further.cells.known[f"train/policy/{seed}"]["updates"] for seed in (0, 1)] == [70, 70]
    touched = {name.split("/")[2 if name.startswith("/") else 1] for name in done[2:]}
    assert touched == {f"{head}:{seed}" for head in compare.OF_A_POLICY for seed in (0, 1)}  # not controls, nor clones
    done.clear()
    contest_in(tmp_path, **settings, go_on=True)
    assert done == []


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
    assert {"even", "random", "replay"} <= set(told["not_played"]) and "never" not in told["not_played"]
    assert "heuristic" not in verdict.win(found, "heuristic")["not_played"]
    assert verdict.arms(known)["policy"]["tabular"]["by_policy"] == pytest.approx([1.0, 1.2], abs=0.1)


@pytest.mark.parametrize("control", ["replay", "time-only", "shuffled"])
def test_a_policy_that_is_only_a_schedule_has_not_won(control: str) -> None:
    """Better than no growth, and no better than one that sees nothing of the host."""
    known = verdict.table(cells_of({"policy:0": 1.0, f"{control}:0": 1.0, "never": 0.5}), "stack")
    told = verdict.win(verdict.against(known, "policy", ["never", control]))
    assert told["not_above"] == [control] and not told["above_all"]


def test_luck_is_no_skill() -> None:
    """One policy, played again twenty times on each task with luck of its own: 95% of the intervals hold zero, and it
    is next to never better than itself."""
    rng = np.random.default_rng(0)
    better = apart = 0
    for _ in range(100):
        known = {
            name: {"tabular": np.zeros((1, 20, 8, len(verdict.COLUMNS)))} for name in ("policy", "never")
        }  # fmt: skip
        level = rng.standard_normal(8)
        for values in known.values():
            values["tabular"][..., 0] = level + rng.standard_normal((1, 20, 8))
        found = verdict.against(known, "policy", ["never"])["never"]["overall"]
        better += found["low"] > 0
        apart += not found["low"] <= 0 <= found["high"]
    assert better <= 6 and apart <= 12


def test_short_and_longer_families_are_told_apart_and_together() -> None:
    cells: dict[str, Any] = {}
    for arm, short, longer in (("policy:0", 1.0, -1.0), ("never", 0.0, 0.0), ("karn-50", 0.5, None)):
        for family, mean in (("tabular", short), ("tabular_long", longer)):
            if mean is not None:
                cells |= {
                    f"real/{arm}/{family}/{seed}" + (f"/{part}of2" if family == "tabular_long" else ""):
                    [[mean + 0.01 * (part * seed + t), 0.5, 1e6, 100, 1, 1, 0] for t in range(4)]
                    for seed in range(3) for part in (1, 2)
                }  # fmt: skip
    found = verdict.against(verdict.table(cells, "real"), "policy", ["never", "karn-50"])
    never, karn = found["never"], found["karn-50"]
    assert never["short"]["low"] == pytest.approx(1.0) and never["longer"]["high"] == pytest.approx(-1.0)
    assert never["num_families"] == 2 and -1 < never["overall"]["value"] < 1
    assert karn["num_families"] == 1 and "longer" not in karn and karn["overall"]["value"] == karn["short"]["value"]
    assert verdict.table(cells, "real")["policy"]["tabular_long"].shape == (1, 3, 8, len(verdict.COLUMNS))
    del cells["real/policy:0/tabular_long/2/2of2"]
    assert verdict.table(cells, "real")["policy"]["tabular_long"].shape[1] == 2  # half a seed is none
    measured = {"command": "x", "cpu_s": {}, "real": {
        "arms": verdict.arms(verdict.table(cells, "real")), "differences": {"policy": found},
    }}  # fmt: skip
    _, first, short, second, longer = pages.contest_tables(measured, "policy").split("\n\n")
    assert "runs of 400 steps" in first and "runs of 2,000 steps" in second
    assert "| heuristic with Karn, 50 reports |" in short and "Karn" not in longer
    assert "+1.00 (+1.00 to +1.00)" in short and "-1.00 (-1.00 to -1.00)" in longer


def test_hosts_of_other_kinds_are_told_by_themselves() -> None:
    rewards = {"heuristic": (1.0, -3.0, -5.0), "never": (0.0, 0.0, 0.0), "bandit": (None, 1.0, 1.0)}
    cells = {
        f"real/{arm}/{family}/{seed}": [[value + 0.01 * (seed + task), 0.5, 1e6, 100, 1, 1, 0] for task in range(4)]
        for arm, values in rewards.items()
        for family, value in zip(("tabular", "textures", "grammar"), values, strict=True) if value is not None
        for seed in range(2)
    }  # fmt: skip
    found = verdict.against(verdict.table(cells, "real"), "heuristic", ["never", "bandit"])
    assert set(found) == {"never"}, "overall is over fully connected hosts: none, no entry"
    never = found["never"]
    assert never["overall"]["value"] == never["short"]["value"] == pytest.approx(1.0) and never["num_families"] == 1
    measured = {"command": "x", "cpu_s": {}, "real": {
        "arms": verdict.arms(verdict.table(cells, "real")), "differences": {"heuristic": found},
    }}  # fmt: skip
    *_, title, kinds = pages.contest_tables(measured).split("\n\n")
    assert "a conv net and a transformer" in title and "| textures | grammar |" in kinds and "| bandit |" in kinds
    assert "-4.00" in kinds and "-4.00" in pages.default_table(measured).splitlines()[-1]
    assert never[verdict.OTHER_KINDS]["value"] == pytest.approx(-4.0) and set(never["families"]) == {
        "tabular", "textures", "grammar",
    }  # fmt: skip


@pytest.mark.integration
def test_learning_rates_for_hosts_of_other_kinds_are_looked_for_under_real_growers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "textures", replace(FAMILIES["textures"], steps=40))
    monkeypatch.setattr(runs, "TUNING", range(2))
    found = runs.tune_arm_real("heuristic", "textures", planned(tmp_path))
    assert set(found) == {"lr"} and set(found["lr"]) == {str(lr) for lr in LEARNING_RATES}
    assert all(math.isfinite(value) for value in found["lr"].values()) and len(set(found["lr"].values())) == 3


def test_the_policy_that_may_ship_is_chosen_on_what_it_was_trained_on() -> None:
    def tuned(teacher: float, long: float, other: float) -> list[tuple[str, float]]:
        return [("teacher", teacher), ("teacher_long", long), ("waves_long", other)]

    cells = {
        f"tune/arm/policy:{seed}/{family}": {"lr": {"0.01": value - 1, "0.02": value}}
        for seed, values in enumerate((tuned(1.0, 1.0, 0.0), tuned(0.0, 3.0, 0.0), tuned(0.0, 0.0, 9.0)))
        for family, value in values
    }
    assert ship.best_policy(cells) == "1"


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
