"""The benchmark's tasks on small made-up data, and one whole comparison with the real arms."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.training import image_starts, recipe, sizing
from benchmarks.training.protocol import ARMS, TASKS, Cell, Outcome, Plan, Record, Result, Source, Task
from benchmarks.training.protocol.arms import Given, static_flops
from benchmarks.training.protocol.command import command
from benchmarks.training.protocol.task import device_of, load_all
from benchmarks.training.rows import Rows, parts
from benchmarks.training.variants import compare, compared
from tests.runs.conftest import images
from torch import Tensor

from esper.config import Config
from esper.errors import ConfigError
from esper.kasmina.isolation import undisturbed
from esper.runs.preset import Preset
from esper.settings import with_settings

pytestmark = pytest.mark.component

load_all()
NAMES = sorted(TASKS)
NUM_KIN = 8192


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    np.savez(folder / "cifar10.npz", **images(400, 60, 8))
    grey = {key: value[..., 0] if key[0] == "x" else value for key, value in images(400, 60, 8).items()}
    np.savez(folder / "fashion_mnist.npz", **grey)
    arrays = {"x_train": rng.normal(3, 2, (4000, 40)), "x_test": rng.normal(3, 2, (100, 40))}
    labels = {"y_train": np.arange(4000) % 10, "y_test": np.arange(100) % 10}
    np.savez(folder / "mnist1d.npz", **{k: v.astype(np.float32) for k, v in arrays.items()}, **labels)
    x = rng.normal(size=(NUM_KIN, 8))
    mask = rng.random((20, NUM_KIN)) < 0.9
    np.savez(folder / "uci_kin8nm.npz", x=x, y=x.sum(1) * 5 + 1, train_mask=np.packbits(mask, axis=1))
    (folder / "tinyshakespeare.txt").write_bytes(bytes(rng.integers(65, 90, 4000, dtype=np.uint8)))
    return folder


def preset_of(name: str, data: Path, seed: int = 0) -> Preset:
    return TASKS[name].preset(Source(data=data, seed=seed))


def test_every_task_is_found() -> None:
    assert set(NAMES) == {
        "cifar10", "cifar10_adamw", "code_lm", "digits_arms", "fashion_mnist", "mnist1d", "teacher_student",
        "teacher_student_constant", "tinyshakespeare", "uci_kin8nm",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if name != "code_lm"])
def test_a_task_trains_and_scores_its_host(name: str, data: Path) -> None:
    preset = preset_of(name, data)
    model = preset.host(preset.small_widths)
    wide = preset.host([2 * width for width in preset.small_widths])
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in model.parameters())
    optimizer = preset.optimizer(model, preset.lrs[0])
    preset.loss(model, preset.train_batch(0, 0)).backward()
    optimizer.step()
    with undisturbed(model):
        score, loss = preset.test(model)
    assert np.isfinite(score) and np.isfinite(loss) and preset.config(preset.steps).total_steps == preset.steps
    assert len(preset.held_out()) >= 14, "fewer batches could accept nothing"
    for again, other in zip(preset.train_batch(1, 5), preset.train_batch(1, 5), strict=True):
        assert torch.equal(again, other)


@pytest.mark.parametrize("name", ["mnist1d", "teacher_student", "uci_kin8nm"])
def test_rows_are_standardised_by_the_training_part_alone(name: str, data: Path) -> None:
    preset = preset_of(name, data)
    assert isinstance(preset, Rows)
    torch.testing.assert_close(preset.train_x.mean(0), torch.zeros(preset.train_x.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(preset.train_x.std(0), torch.ones(preset.train_x.shape[1]), atol=1e-5, rtol=0)
    assert not torch.allclose(preset.held_x.mean(0), torch.zeros(preset.held_x.shape[1]), atol=1e-5)
    held = torch.cat([x for x, _ in preset.held_out()])
    assert torch.equal(held, preset.held_x)


def test_images_are_normalised_by_the_training_part_alone(data: Path) -> None:
    preset = preset_of("cifar10", data)
    x: Tensor = preset.x  # type: ignore[attr-defined]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)


def test_a_seed_of_kin8nm_is_one_of_its_splits(data: Path) -> None:
    first, second = preset_of("uci_kin8nm", data, 0), preset_of("uci_kin8nm", data, 1)
    assert isinstance(first, Rows) and isinstance(second, Rows)
    sizes = [len(part) for part in (first.train_x, first.held_x, first.test_x)]
    assert sum(sizes) == NUM_KIN and sizes[1] == 1200
    assert len(first.test_x) != len(second.test_x)
    with pytest.raises(ConfigError, match="has 20 splits, got seed 20"):
        preset_of("uci_kin8nm", data, 20)


def test_each_seed_has_its_own_teacher_and_both_schedules_the_same(data: Path) -> None:
    first, second = preset_of("teacher_student", data, 0), preset_of("teacher_student", data, 1)
    constant = preset_of("teacher_student_constant", data, 0)
    assert isinstance(first, Rows) and isinstance(second, Rows) and isinstance(constant, Rows)
    assert not torch.equal(first.train_y, second.train_y) and torch.equal(first.train_y, constant.train_y)
    assert first.schedule(0.9) < 0.1 and constant.schedule(0.9) == 1.0


def test_parts_share_no_row() -> None:
    x = torch.arange(50.0)[:, None]
    (train, _), (held, _) = parts(x, x.squeeze(1), 10, seed=3)
    assert sorted([*train.flatten().tolist(), *held.flatten().tolist()]) == list(range(50)) and len(held) == 10


def test_missing_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs mnist1d.npz .*pass --data FOLDER"):
        preset_of("mnist1d", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_size_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="use --size cpu"):
        device_of("gpu")


def test_peers_apply_to_mlps_only(data: Path) -> None:
    peer = ARMS["gromo_tiny"]
    assert peer.applies(preset_of("mnist1d", data)) and not peer.applies(preset_of("cifar10", data))


# ----------------------------------------------------------------------------------------------------------------------
# The real arms


class Small(Rows):
    name = "small_rows"
    steps = 200
    lrs = (3e-3,)
    small_widths = (2, 2)


def make_small(source: Source) -> Small:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 4, generator=generator)
    y = (x[:, 0] * x[:, 1]).relu() + x[:, 2].abs()
    train, held = parts(x[:700], y[:700], 300, seed=0)
    return Small(torch.device(source.device), train=train, held=held, test=(x[700:], y[700:]))


def test_every_arm_of_esper_is_trained_counted_and_scored() -> None:
    arms = (
        "grown", "always", "static_small", "static_final", "static_equal_flops", "random_growth", "grown_short",
        "static_final_short",
    )  # fmt: skip
    task = Task(name="small_rows", title="Small rows", make=make_small)
    plan = Plan(task, seeds=(0,), source=Source(), code="test", arms=arms, steps=200)
    preset = plan.preset(0)
    cells = {arm: plan.cell(arm, 0, 3e-3, 3e-3 if ARMS[arm].follows_grown else None) for arm in arms}
    for arm in arms:  # a single rate: what a bracketed grid would repeat a dozen times
        given = ARMS[arm].derive(preset, plan.done[cells["grown"]], 200) if ARMS[arm].follows_grown else {}
        result = ARMS[arm].train(preset, cells[arm], given)
        plan.done[cells[arm]] = result.outcome
        assert np.isfinite(result.score) and result.outcome.flops > 0
    done = {arm: plan.done[cell] for arm, cell in cells.items()}
    assert done["always"].cohorts["culled"] == 0 < done["always"].cohorts["accepted"]
    assert done["static_final"].widths == done["grown"].widths
    assert done["static_equal_flops"].flops == pytest.approx(done["grown"].flops, rel=0.1)
    assert done["static_small"].widths == (2, 2) and done["static_small"].flops < done["grown"].flops
    assert done["random_growth"].cohorts["accepted"] == done["grown"].cohorts["accepted"]
    assert done["static_final_short"].flops == pytest.approx(0.75 * done["static_final"].flops, rel=0.01)
    assert done["static_final_short"].widths == done["static_final"].widths
    assert done["grown_short"].flops < done["grown"].flops


def test_every_variant_of_the_recipe_changes_what_is_shipped() -> None:
    preset = make_small(Source())
    shipped = preset.config(preset.steps)
    changed = {
        label: with_settings(shipped, dict(word.split("=", 1) for word in words))
        for label, words in recipe.variants(shipped).items()
    }
    assert [label for label, config in changed.items() if config == shipped] == [recipe.SHIPPED]
    assert changed["allocation: half the units"].tamiyo.growth == shipped.tamiyo.growth / 2


def test_every_variant_of_the_starts_is_one_that_images_can_have(data: Path) -> None:
    shipped = preset_of("cifar10", data).config(100)
    changed = {
        label: with_settings(shipped, dict(word.split("=", 1) for word in words))
        for label, words in image_starts.variants(shipped).items()
    }
    assert len({repr(config) for config in changed.values()}) == len(changed) == 13
    assert all(config.evidence.accept == "always" for config in changed.values())
    assert changed["negative gradient, 8 times the rows"].capture.rows == 8 * shipped.capture.rows


@pytest.mark.integration
def test_variants_are_compared_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "small_rows", Task(name="small_rows", title="Small rows", make=make_small))
    out, cells = tmp_path / "variants.json", tmp_path / "cells"
    words = ["small_rows", "--seeds", "2", "--steps", "40", "--workers", "0", "--out", str(out)]
    words += ["--lr", "3e-3", "--lr", "1e-2", "--lr", "3e-2"]

    def changes(shipped: Config) -> dict[str, tuple[str, ...]]:
        grown = ("evidence.accept=always", "capture.batches=2", "fit.max_share=none", "tamiyo.first=10")
        grown += ("graft.settle_steps=0", "graft.ramp_steps=1", "graft.stabilize_steps=1", "graft.fine_tune_steps=1")
        return {"fitted": (*grown, "fit.start=negative_gradient"), "random": (*grown, "fit.start=random_zero")}

    compare([*words, "--cells", str(cells), "--deadline", "0"], "", changes, {}, "recipe")
    assert json.loads(out.read_text(encoding="utf-8"))["missing"] == ["fitted", "random"]
    assert "not complete" in capsys.readouterr().out
    compare([*words, "--cells", str(cells)], "", changes, {}, "recipe")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["base"] == "fitted" and result["missing"] == [] and list(result["variants"]) == ["fitted", "random"]
    fitted, drawn = result["variants"]["fitted"], result["variants"]["random"]
    assert fitted["minus_shipped"] == 0 and fitted["flops_ratio"] == 1 and len(drawn["held_out"]) == 2
    assert fitted["fits"]["num"] > 0 and drawn["fits"] == {"num": 0, "explained": None, "sure": 0}
    assert drawn["minus_shipped"] == pytest.approx(
        sum(b - a for a, b in zip(fitted["held_out"], drawn["held_out"], strict=True)) / 2
    )


def test_a_variant_that_diverged_has_no_difference() -> None:
    cell = Plan(TASKS["teacher_student"], seeds=(0,), source=Source(), code="").cell("grown", 0, 0.1, None)

    def record(held: float) -> Record:
        counts = {"germinated": 1, "accepted": 1}
        outcome = Outcome(held_out=held, flops=1.0, params=1, seconds=1.0, widths=(1,), cohorts=counts)
        return Record(cell=cell, outcome=outcome)

    line = compared([record(math.inf)], [record(1.0)])
    assert line["minus_shipped"] is None and line["held_out"] == [None]


def test_variants_that_are_no_setting_change_what_they_say() -> None:
    preset, task = make_small(Source()), Task(name="small_rows", title="", make=make_small)
    plan = Plan(task, seeds=(0,), source=Source(), code="test", steps=400)
    absorbed, frozen = recipe.CHANGED_CODE.values()
    grown = absorbed.train(preset, plan.cell(absorbed.name, 0, 1e-2, None), {}).outcome
    assert grown.cohorts["accepted"] > 0 and min(grown.widths) > 2 and np.isfinite(grown.held_out)
    stuck = frozen.train(preset, plan.cell(frozen.name, 0, 1e-2, None), {}).outcome
    assert stuck.cohorts["accepted"] == 0, "a branch whose output starts at zero adds nothing unless it learns"


def test_growing_for_three_quarters_of_the_final_shapes_flops() -> None:
    preset, steps = make_small(Source()), 400
    final = static_flops(preset, (6, 6), steps)
    twin = Outcome(held_out=1.0, flops=2 * final, params=0, seconds=0.0, widths=(6, 6))
    given = ARMS["grown_short"].derive(preset, twin, steps)
    assert given == {"steps": 150, "flops": 0.75 * final}  # 0.75 / 2 of the steps
    cheap = dataclasses.replace(twin, flops=twin.flops / 4)
    assert ARMS["grown_short"].derive(preset, cheap, steps)["steps"] == steps, "never longer than the others"


@pytest.mark.parametrize(
    ("cost", "tried"),
    [
        (lambda steps: 0.7 * steps, [100]),  # spends 70 of 75: near enough
        (lambda steps: 0.2 * steps, [100, 346]),  # too little
        (lambda steps: 0.01 * steps, [100, 400]),  # no more than there are
        (lambda steps: 1.5 * steps, [100, 46]),  # too much
        (lambda steps: 60 if steps < 200 else 90, [100, 115, 132]),  # never near: the longest within
        (lambda steps: 500, [100, 13, 1]),  # whatever it does
    ],
)
def test_how_long_growing_may_take_is_found_by_its_cost(
    cost: Callable[[int], float], tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def train(preset: Preset, cell: Cell, given: Given) -> Result:
        seen.append(cell.steps)
        outcome = Outcome(held_out=1.0, flops=cost(cell.steps), params=1, seconds=1.0, widths=(cell.steps,))
        return Result(outcome=outcome, score=0.0, loss=0.0)

    monkeypatch.setattr("benchmarks.training.protocol.arms.train_esper", train)
    cell = Plan(TASKS["teacher_student"], seeds=(0,), source=Source(), code="", steps=400).cell("grown", 0, 0.1, None)
    result = ARMS["grown_short"].train(make_small(Source()), cell, {"steps": 100, "flops": 75.0})
    assert seen == tried
    affordable = [steps for steps in tried if cost(steps) <= 75]
    assert result.outcome.widths == (max(affordable, default=min(tried)),)


@pytest.mark.integration
def test_the_command_trains_sums_up_and_goes_on(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "small_rows", Task(name="small_rows", title="Small rows", make=make_small))
    out = tmp_path / "small.json"
    words = ["small_rows", "--data", str(data), "--seeds", "1", "--steps", "20", "--arm", "static_small"]
    words += ["--workers", "0", "--code", "v1", "--out", str(out), "--lr", "1e-3", "--lr", "2e-3"]
    command("", words)
    first = capsys.readouterr().out
    command("", words)
    second = capsys.readouterr().out
    assert "static_small seed 0" in first and "seed 0" not in second
    whole = out.read_text(encoding="utf-8")
    command("", [*words, "--sum-up"])
    assert out.read_text(encoding="utf-8") == whole, "a summary needs the cells alone"
    command("", [*words, "--seeds", "2", "--sum-up"])
    assert json.loads(out.read_text(encoding="utf-8"))["incomplete"] == ["grown", "static_small"]
    command("", words)
    text = out.read_text(encoding="utf-8")
    assert '"incomplete": []' in text and str(tmp_path) not in text and str(data) not in text
    assert "run.py small_rows --data FOLDER --seeds 1" in text


@pytest.mark.integration
def test_sizing_counts_every_training_of_either_search(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "small_rows", Task(name="small_rows", title="Small rows", make=make_small))
    monkeypatch.setattr(sizing, "MULTIPLES", (1, 3))
    out = tmp_path / "sizing.json"
    words = ["small_rows", "--data", str(data), "--seeds", "2", "--steps", "20", "--workers", "0", "--lr", "1e-3"]
    sizing.main([*words, "--lr", "2e-3", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    found, widths = result["sizing"], result["widths"]
    assert set(widths) == {"grown", "static_x1", "static_x3"} and found["chosen"] in widths
    sweep = [widths[name]["search"] for name in ("static_x1", "static_x3")]
    assert found["search"]["sweep"]["trainings"] == sum(search["trainings"] for search in sweep) >= 4
    assert found["search_flops_ratio"] == pytest.approx(
        widths["grown"]["search"]["flops"] / sum(search["flops"] for search in sweep)
    )
    # three times the inner width of a net with two inner layers
    preset = make_small(Source())
    assert widths["static_x3"]["params"] == sum(p.numel() for p in preset.host((6, 6)).parameters())
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def test_gromo_grows_to_the_widths_it_is_given() -> None:
    pytest.importorskip("gromo", reason="pip install 'esper-morph[bench]'")
    preset = make_small(Source())
    plan = Plan(Task(name="small_rows", title="", make=make_small), seeds=(0,), source=Source(), code="t", steps=60)
    for name in ("gromo_tiny", "gromo_gradmax"):
        result = ARMS[name].train(preset, plan.cell(name, 0, 3e-3, 3e-3), {"widths": [6, 6]})
        assert result.outcome.widths == (6, 6) and np.isfinite(result.score)
        assert result.outcome.flops_parts["growth"] > 0
        equal = ARMS[f"{name}_equal_flops"]
        twin = dataclasses.replace(result.outcome, flops=3 * result.outcome.flops)
        given = equal.derive(preset, twin, 60)
        assert min(given["widths"]) > 6
        again = equal.train(preset, plan.cell(equal.name, 0, 3e-3, 3e-3), given)
        assert again.outcome.flops == pytest.approx(twin.flops, rel=0.2)
