"""Undo and resume, bit for bit, on the device of ``ESPER_TEST_DEVICE``: in deterministic mode nothing may differ.

``make test-gpu`` runs it on a card; ``benchmarks/safety/restore.py`` measures what differs without that mode.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models import CONV, DEVICE, DROPOUT_MLP, TRANSFORMER, Task
from tests.restoring import PRECISIONS, Course

from esper.commands import obey
from esper.protocol import Lifecycle, Refused, Restored, RollBack
from esper.safety.tree import digest

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("deterministic")]

S = Lifecycle
ACTIVE = (S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING)
FURTHER = 12
"""Steps that are replayed."""
TASKS = pytest.mark.parametrize("task", [DROPOUT_MLP, CONV, TRANSFORMER], ids=str)
PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


def take_back(run: Course) -> Restored:
    """Order an exact rollback; a scaler may skip steps of a damaged host before the order is obeyed."""
    run.grower.submit(RollBack(cohort=1, reason="by hand", exact=True))
    return wait_for_restore(run)


def wait_for_restore(run: Course) -> Restored:
    for _ in range(25):
        run.train()
        if run.told(Restored):
            break
    (restored,) = run.told(Restored)
    assert restored.verified and restored.rewound and run.batches.position == restored.to_step
    return restored


def assert_as_if_alone(run: Course, task: Task) -> None:
    """It is, and stays, where a host is that never had a grower."""
    assert run.cohort is None and run.grower.verdicts[0].state is S.ROLLED_BACK
    position, hashes = run.batches.position, [run.hash()]
    run.train(FURTHER)
    hashes.append(run.hash())
    alone = Course(task, run.precision, grows=False)
    alone.train(position)
    assert alone.hash() == hashes[0], "the restored host is not the one of that step"
    alone.train(FURTHER)
    assert alone.hash() == hashes[1], f"{FURTHER} steps later the two differ"


@TASKS
@PRECISION
def test_a_damaged_host_is_restored_and_replays_bit_for_bit(task: Task, precision: str) -> None:
    run = Course(task, precision, grows=True)
    run.bring(S.GRAFTING)
    run.train(2)
    run.damage()
    take_back(run)
    assert_as_if_alone(run, task)


@TASKS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_branch_that_turns_nan_costs_the_host_nothing(task: Task, precision: str) -> None:
    run = Course(task, precision, grows=True)
    run.bring(S.GRAFTING)
    run.grower.kasmina.set_paused(run.cohort, True, run.grower.clock.steps)
    run.train(2)
    with torch.no_grad():
        for name in run.cohort.sites:
            next(iter(run.grower.kasmina.sites[name].banks[1].params.values())).fill_(float("nan"))
    wait_for_restore(run)
    assert_as_if_alone(run, task)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("state", ACTIVE, ids=lambda state: state.name)
def test_a_rollback_in_every_active_state(state: Lifecycle, precision: str) -> None:
    run = Course(DROPOUT_MLP, precision, grows=True)
    run.bring(state)
    if state is S.GERMINATED:  # it was not grafted yet: there is nothing to go back to
        run.grower.submit(RollBack(cohort=1, reason="by hand", exact=True))
        run.train()
        assert not run.told(Restored) and any("not grafted yet" in refused.reason for refused in run.told(Refused))
        run.grower.submit(RollBack(cohort=1, reason="by hand"))
        run.train()
    else:
        take_back(run)
    assert_as_if_alone(run, DROPOUT_MLP)


@pytest.mark.parametrize("state", ACTIVE, ids=lambda state: state.name)
def test_a_soft_rollback_does_not_touch_the_host(state: Lifecycle) -> None:
    run = Course(TRANSFORMER, "bf16", grows=True)
    run.bring(state)
    run.grower._orders.put(RollBack(cohort=1, reason="by hand"))
    before = run.hash()
    obey(run.grower, run.grower._orders, None, run.grower.clock.steps)
    assert run.cohort is None and run.hash() == before


def test_all_random_streams_go_back() -> None:
    def draws() -> tuple[float, ...]:
        values = (random.random(), np.random.rand(), torch.rand(()), torch.rand((), device=DEVICE))
        return tuple(map(float, values))

    run = Course(DROPOUT_MLP, grows=True)
    run.bring(S.GRAFTING)
    run.damage()
    take_back(run)
    position, drawn = run.batches.position, draws()
    alone = Course(DROPOUT_MLP, grows=False)
    alone.train(position)
    assert drawn == draws() and drawn != draws()


@TASKS
@PRECISION
def test_a_checkpoint_goes_on_bit_for_bit(task: Task, precision: str, tmp_path: Path) -> None:
    """With a grafted cohort and its moments, loaded from the disk into what was built from other seeds."""
    run = Course(task, precision, grows=True)
    run.bring(S.GRAFTING)
    run.train(2)
    run.grower.save(tmp_path)
    run.grower.detach()
    hashed = digest(run.grower.state_dict())

    again = Course(task, precision, grows=True, seed=2)
    again.train(2)
    loaded = again.grower.load(tmp_path)
    assert loaded.step == run.grower.clock.steps and digest(again.grower.state_dict()) == hashed
    again.train(FURTHER)
    went_on = again.hash(), digest(again.grower.state_dict())

    straight = Course(task, precision, grows=True)
    straight.bring(S.GRAFTING)
    straight.train(2 + FURTHER)
    assert (straight.hash(), digest(straight.grower.state_dict())) == went_on
    on_device = [value.device.type for value in again.model.state_dict().values()]
    on_device += [value.device.type for value in again.optimizer.state_dict()["state"][0].values()]
    assert set(on_device) == {DEVICE.type}
