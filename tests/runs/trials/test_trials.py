"""Trials themselves: the same by number, data in disjoint parts, null cohorts that stay null."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from torch import nn

from esper.errors import ConfigError
from esper.kasmina.site import Site
from esper.protocol import AnyEvent
from esper.runs.trials import TrialOptions, nulls, training, trial
from esper.runs.trials.nulls import KINDS, null_trial
from esper.runs.trials.tasks import AUDIT_BATCH, AUDIT_ROWS, GATE_BATCHES, TASKS, TRAIN_ROWS, make_task, task_name
from esper.runs.trials.training import Contrast, Setup, audit_losses, train_plainly
from esper.runs.trials.trial import grown_trial, train_growing, trial_record

pytestmark = pytest.mark.integration

SHORT = 160


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (training, trial):
        monkeypatch.setattr(module, "STEPS", SHORT)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_task_trains_on_none_of_what_it_is_judged_by(name: str) -> None:
    task = make_task(name, torch.Generator().manual_seed(5))
    assert len(task.train[0]) == TRAIN_ROWS and len(task.gate) == GATE_BATCHES
    assert len(task.audit) == AUDIT_ROWS // AUDIT_BATCH
    model = task.build(2)
    for batch in (task.batch(torch.Generator().manual_seed(0)), task.gate[0], task.audit[0]):
        loss = task.loss(model, batch)
        assert loss.shape == () and bool(torch.isfinite(loss))
    again = make_task(name, torch.Generator().manual_seed(5))
    assert torch.equal(again.train[0], task.train[0]) and torch.equal(again.audit[-1][1], task.audit[-1][1])


def test_tasks_take_turns_and_differ_by_number() -> None:
    assert [task_name(number) for number in range(2 * len(TASKS))] == 2 * list(TASKS)
    one, two = Setup.of(0), Setup.of(len(TASKS))
    assert one.task.name == two.task.name and not torch.equal(one.task.train[0], two.task.train[0])


def test_how_much_there_is_to_judge_by_can_be_given() -> None:
    drawn, given = Setup.of(3), Setup.of(3, gate_rows=64)
    assert [len(batch[0]) for batch in given.task.gate] == [64] * GATE_BATCHES and len(drawn.task.gate[0][0]) < 64
    assert given.task.name == drawn.task.name and given.described()["gate_rows"] == 64
    assert len(given.task.train[0]) == TRAIN_ROWS and len(given.task.audit) == len(drawn.task.audit)


def test_a_host_is_the_same_each_time_and_draws_nothing_from_the_global_stream() -> None:
    setup = Setup.of(3)
    before = torch.get_rng_state()
    one, two = setup.host(), setup.host()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    trained = [audit_losses(setup.task, train_plainly(setup, setup.host(), steps=5)) for _ in range(2)]
    assert trained[0] == trained[1] != audit_losses(setup.task, one)


@pytest.mark.usefixtures("short")
def test_a_trial_follows_from_its_number() -> None:
    records = [grown_trial(2) for _ in range(2)]
    one, two = (msgspec.structs.replace(record, seconds=0.0) for record in records)
    assert one == two
    assert one.cohorts and one.seeds == one.seeds_ended + one.seeds_cut > 0
    assert one.headroom.gain is not None and one.effect.gain is not None and one.finite


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", ["a constant", "copies of hidden units", "units that read irrelevant inputs only"])
def test_null_branches_stay_null(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number, looks = list(KINDS).index(kind), []
    hold, prepare = KINDS[kind]

    def watched(model: nn.Module, site: Site, bank: object) -> None:
        hold(model, site, bank)  # type: ignore[arg-type]
        w1, head = bank.params["w1"], model.get_submodule("0")  # type: ignore[attr-defined]
        if kind == "a constant":
            looks.append(bool((w1 == 0).all()))
        elif kind == "copies of hidden units":
            looks.append(all(any(torch.equal(unit, row) for row in head.weight) for unit in w1[0]))  # type: ignore[union-attr]
        else:
            blind = (head.weight[:, nulls.SIGNAL :] == 0).all()  # type: ignore[index]
            looks.append(bool((w1[..., : nulls.SIGNAL] == 0).all() and blind))

    monkeypatch.setitem(KINDS, kind, (watched, prepare))
    record = null_trial(number)
    assert record.kind == f"null: {kind}" and len(looks) > 20 and all(looks)
    assert record.cohorts and all(cohort.is_null for cohort in record.cohorts)


@torch.no_grad()
def what_the_last_layer_leaves(setup: Setup, model: nn.Module) -> float:
    """Loss as a multiple of that with the best last layer there is, by least squares."""
    x, y = setup.task.train
    hidden = model.get_submodule("1")(model.get_submodule("0")(x))
    ones = torch.cat([hidden, torch.ones(len(x), 1)], dim=1).double()
    best = ones @ torch.linalg.lstsq(ones, y.double()).solution
    return float(((model(x) - y) ** 2).mean() / ((best - y) ** 2).mean())


def test_a_linear_map_meets_a_layer_that_has_learned_all_it_can() -> None:
    setup, (_, prepare) = nulls._setup(0, pure_noise=False), KINDS["a linear map on a linear layer"]
    model = setup.host()
    assert what_the_last_layer_leaves(setup, model) > 1.5
    prepare(setup, model)
    assert what_the_last_layer_leaves(setup, model) < 1.01


def test_real_cohorts_of_a_null_trial_do_not_count() -> None:
    record = null_trial(list(KINDS).index("copies of grown units"))
    assert [cohort.is_null for cohort in record.cohorts][:1] == [False]
    assert any(cohort.is_null for cohort in record.cohorts)


def test_what_the_end_of_training_takes_out_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (training, trial):
        monkeypatch.setattr(module, "STEPS", 80)
    setup, events = Setup.of(2), list[AnyEvent]()
    config = training.trial_config(2, twins=False)
    grower = train_growing(setup, setup.host(), config, events, audit=False)
    record = trial_record(
        setup, "grown", events, grower.verdicts, headroom=trial.UNKNOWN, effect=trial.UNKNOWN, finite=True, seconds=0.0
    )
    ends = [cohort.end for cohort in record.cohorts]
    assert "CUT" in ends and record.seeds_cut > 0 and record.rolled_back == 0


def test_contrasts_are_shares_of_the_reference() -> None:
    contrast = Contrast.between([1.0, 1.2], [0.5, 0.5])
    assert contrast.gain == pytest.approx(0.6 / 1.1)
    assert contrast.low < contrast.gain < contrast.high
    assert math.isnan(Contrast.between([math.nan, 1.0], [1.0, 1.0]).gain)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num": 0}, "n must be at least 1"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"seed": -1}, "seed must lie between"),
        ({"null": True, "peer": "gromo"}, "trials are of one kind"),
        ({"peer": "grow"}, "peer must be one of gromo, gromo-gradmax"),
        ({"held_out_rows": 0}, "held-out-rows must be at least 1"),
        ({"held_out_rows": 64, "null": True}, "held-out-rows is for hosts that grow"),
    ],
)
def test_options_that_cannot_be_are_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrialOptions(**asked)  # type: ignore[arg-type]
