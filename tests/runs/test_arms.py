from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.config import Config
from esper.errors import StateError
from esper.kasmina.ledger import forward_flops
from esper.protocol import AnyEvent, ArmFinished, Germinated, HeldOut, Restored, TrainLoss
from esper.runs import RunOptions, arms
from esper.runs.arms import Cell, Trained, configure, equal_flops_widths, score, train
from esper.runs.cell_store import CellStore
from esper.runs.hosts import build, widen
from esper.runs.preset import Preset
from esper.runs.presets import make_preset

pytestmark = pytest.mark.integration

pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")


@pytest.fixture(scope="module")
def digits() -> Preset:
    return make_preset("digits", torch.device("cpu"))


def cell(arm: str = "grown", **changes: Any) -> Cell:
    given = {
        "seed": 0, "lr": 0.01, "steps": 60, "widths": (8, 8), "options": RunOptions(), "device": "cpu", "size": "cpu",
    }  # fmt: skip
    return Cell(arm=arm, **(given | changes))


def run(digits: Preset, arm: str = "grown", **changes: Any) -> tuple[Trained, list[AnyEvent]]:
    shown: list[AnyEvent] = []
    return train(cell(arm, **changes), digits, shown.append), shown


def test_a_static_arm_is_the_plain_loop(digits: Preset) -> None:
    trained, shown = run(digits, "static_small", steps=50, seed=3)
    torch.manual_seed(3)
    model = build(digits.spec((8, 8)))
    optimizer = digits.optimizer(model, 0.01)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = 0.01 * digits.schedule(step / 50)
        optimizer.zero_grad()
        digits.loss(model, digits.train_batch(3, step)).backward()
        optimizer.step()
    assert all(torch.equal(value, trained.weights[name]) for name, value in model.state_dict().items())
    one = 2.0 * 64 * (64 * 8 + 8 * 8 + 8 * 10)
    assert trained.flops == pytest.approx(3 * 50 * one), "a forward and a backward at twice its cost"
    assert trained.params == 682 and trained.widths == (8, 8) and trained.layers == {}
    assert {type(event) for event in shown} == {TrainLoss, HeldOut}
    assert {(event.arm, event.seed) for event in shown} == {("static_small", 3)}


def test_a_cell_trains_the_same_twice(digits: Preset) -> None:
    one, two = run(digits)[0], run(digits)[0]
    assert one.weights.keys() == two.weights.keys()
    assert all(torch.equal(value, two.weights[name]) for name, value in one.weights.items())
    assert (one.held_out, one.flops, one.widths, one.cohorts) == (two.held_out, two.flops, two.widths, two.cohorts)


def test_what_grew_is_scored_as_a_plain_network(digits: Preset) -> None:
    """The growing control keeps what it is told to germinate, so this one surely grows."""
    order = Germinated(
        step=10, cohort=1, seeds=(1,), sites=("0-2",), blueprints=("bottleneck",), starts=("random_zero",),
        widths=(5,), added_params=1, reason="",
    )  # fmt: skip
    trained, shown = run(digits, "random_growth", steps=250, schedule=(order,))
    assert trained.widths == (13, 8) and trained.cohorts["accepted"] == 1
    assert trained.layers["0"] == {"in_features": 64, "out_features": 13}
    assert trained.params == sum(value.numel() for value in trained.weights.values()) == 682 + 5 * (65 + 8)
    assert set(trained.flops_parts) == {"host", "branches", "fit", "evidence"}
    assert trained.flops == pytest.approx(sum(trained.flops_parts.values()))
    finished = score(trained, digits)
    plain = widen(build(digits.spec((8, 8))), trained.layers)
    plain.load_state_dict(trained.weights)
    with torch.no_grad():
        wanted, loss = digits.test(plain.eval())
    assert isinstance(finished, ArmFinished) and (finished.score, finished.loss) == (wanted, loss)
    assert (trained.score, trained.loss) == (wanted, loss) and finished.score_name == "accuracy"
    assert finished.widths == {"span 0": 13, "span 1": 8}
    assert not any(isinstance(event, ArmFinished) for event in shown), "training itself scores nothing"


@pytest.mark.parametrize(("final", "share"), [((40, 8), 0.7), ((64, 64), 0.4), ((200, 100), 1.3)])
def test_equal_flops_widths_cost_what_was_asked_for(digits: Preset, final: tuple[int, int], share: float) -> None:
    def cost(widths: tuple[int, ...]) -> float:
        model, batch = build(digits.spec(widths)), digits.train_batch(0, 0)
        return 3.0 * 100 * forward_flops(model, lambda: digits.loss(model, batch))

    target = cost((8, 8)) + share * (cost(final) - cost((8, 8)))
    widths = equal_flops_widths(digits, target, 100, (8, 8), final)
    assert cost(widths) == pytest.approx(target, rel=0.02)
    assert all(width >= 8 for width in widths)


def test_equal_flops_widths_where_nothing_grew(digits: Preset) -> None:
    assert equal_flops_widths(digits, 1e9, 100, (8, 8), (8, 8)) == (8, 8)


@pytest.mark.unit
def test_what_was_asked_for_goes_over_the_settings_of_the_preset() -> None:
    options = RunOptions(temper="aggressive", controller="schedule", growth=3.0, start="random_zero", budget_params=900)
    config = configure(Config(total_steps=50), options, seed=4)
    assert (config.tamiyo.temper, config.tamiyo.controller, config.tamiyo.growth) == ("aggressive", "schedule", 3.0)
    assert (config.fit.start, config.budget.params, config.seed, config.total_steps) == ("random_zero", 900, 4, 50)
    assert configure(Config(), RunOptions(), seed=0) == Config()


def test_a_run_that_is_taken_back_trains_as_if_nothing_had_happened(
    digits: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches and learning rates go back with the steps: the small host ends where it does without a grower."""
    growers: list[Any] = []
    original = arms.Grower

    def noted(*args: Any, **kwargs: Any) -> Any:
        growers.append(original(*args, **kwargs))
        return growers[-1]

    monkeypatch.setattr(arms, "Grower", noted)
    settings = ("tamiyo.first=10", "graft.embargo=1000", "capture.batches=2", "fit.steps=10", "tamiyo.last_share=0.4")
    options = RunOptions(settings=settings, start="random_zero")
    events: list[AnyEvent] = []

    def watch(event: AnyEvent) -> None:
        events.append(event)
        if isinstance(event, TrainLoss) and event.step == 20:
            for site in growers[0].kasmina.sites.values():
                for bank in site.banks.values():
                    bank.params["w1"].data[0, 0, 0] = float("nan")

    trained = train(cell(steps=60, options=options), digits, watch)
    restored = [event for event in events if isinstance(event, Restored)]
    assert len(restored) == 1 and restored[0].verified and restored[0].rewound and restored[0].to_step < 20
    assert trained.cohorts["rolled_back"] == trained.cohorts["germinated"] == 1
    plain = train(cell("static_small", steps=60), digits, lambda event: None)
    assert all(torch.equal(value, trained.weights[name]) for name, value in plain.weights.items())


def test_a_finished_training_is_kept_whole(tmp_path: Path) -> None:
    """Every field of a result comes back, also those that are still to be invented."""
    cell = Cell(
        arm="grown", seed=1, lr=0.01, steps=10, widths=(8, 8), options=RunOptions(), device="cpu", size="cpu"
    )  # fmt: skip
    trained = Trained(
        cell=cell, held_out=0.5, params=3, flops=7.0, seconds=2.0, widths=(9, 8), flops_parts={"host": 1.0},
        cohorts={"germinated": 2}, stopped="patience", weights={"a": torch.arange(3.0)}, layers={"a": {"out": 3}},
        events=[HeldOut(step=1, loss=float("nan"), params=1, flops=1.0)], score=0.25, loss=0.75,
    )  # fmt: skip
    for field in dataclasses.fields(trained):
        if isinstance(getattr(trained, field.name), dict) and not getattr(trained, field.name):
            setattr(trained, field.name, {"filled": 1.0})
    store = CellStore(tmp_path, cell, 10.0)
    store.finish(trained)
    store.close()
    again = CellStore(tmp_path, cell, 10.0)
    finished = again.finished
    assert finished is not None and again.progress is None
    back = Trained(cell=cell, **finished)
    again.close()
    assert repr(back) == repr(trained)
    other = dataclasses.replace(cell, widths=(8, 16))
    with pytest.raises(StateError, match="resumed with the settings it was saved with"):
        CellStore(tmp_path, other, 10.0)
