"""Branches learn in step with the host: zeroed, scaled, accumulated and skipped gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models import Pair, assert_same_state, mse, snapshot
from tests.rigs import Rig, attach, graft, guard
from torch import Tensor

from esper.kasmina.cohort import Cohort
from esper.protocol import Lifecycle

pytestmark = pytest.mark.integration

S = Lifecycle


def learnt(loop: Callable[[Rig, Cohort], None], **optimizer: Any) -> tuple[Rig, dict[str, Tensor]]:
    """The branch's weights after ``loop`` has trained a host with a grafted branch."""
    torch.manual_seed(0)
    model = Pair()
    rig = attach(model, torch.optim.AdamW(model.parameters(), 1e-2, eps=1e-6, **optimizer))
    cohort = graft(rig, "fc1-fc2")
    loop(rig, cohort)
    return rig, {name: value.detach().clone() for name, value in rig.bank(cohort).params.items()}


def plainly(rig: Rig, _: Cohort) -> None:
    for batch in rig.batches[:6]:
        rig.optimizer.zero_grad()
        loss = mse(rig.model, batch)
        loss.backward()
        rig.optimizer.step()
        rig.grower.step(loss)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_may_be_zeroed_before_the_growers_step(set_to_none: bool) -> None:
    def zeroed(rig: Rig, _: Cohort) -> None:
        for batch in rig.batches[:6]:
            loss = mse(rig.model, batch)
            loss.backward()
            rig.optimizer.step()
            rig.optimizer.zero_grad(set_to_none=set_to_none)
            rig.grower.step(loss)

    (one, weights), (two, others) = learnt(plainly), learnt(zeroed)
    assert_same_state(weights, others)
    assert_same_state(snapshot(one.model), snapshot(two.model))


def test_a_branch_follows_the_schedule_of_the_host() -> None:
    def frozen(rig: Rig, _: Cohort) -> None:
        before = {name: value.detach().clone() for name, value in rig.bank(_).params.items()}
        rig.optimizer.param_groups[0]["lr"] = 0.0
        plainly(rig, _)
        assert_same_state(before, {name: value.detach() for name, value in rig.bank(_).params.items()})

    learnt(frozen)


def test_accumulated_steps_count_once_and_equal_a_large_batch() -> None:
    def in_parts(rig: Rig, _: Cohort) -> None:
        start = rig.grower.clock.steps
        for turn in range(4):
            for part in range(4):
                x, wanted = rig.batches[turn]
                batch = x[4 * part : 4 * part + 4], wanted[4 * part : 4 * part + 4]
                loss = mse(rig.model, batch) / 4
                loss.backward()
                if part == 3:
                    rig.optimizer.step()
                    rig.optimizer.zero_grad()
                rig.grower.step(loss)
        assert rig.grower.clock.steps == start + 4
        assert rig.grower.kasmina.rows_per_step["fc1-fc2"] == 16
        assert rig.grower.kasmina.rows_per_batch["fc1-fc2"] == 4

    def at_once(rig: Rig, _: Cohort) -> None:
        for batch in rig.batches[:4]:
            loss = mse(rig.model, batch)
            loss.backward()
            rig.optimizer.step()
            rig.optimizer.zero_grad()
            rig.grower.step(loss)

    (one, weights), (two, others) = learnt(in_parts), learnt(at_once)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)
    for name, value in snapshot(one.model).items():
        torch.testing.assert_close(value, snapshot(two.model)[name], rtol=1e-4, atol=1e-5)


BAD = 3
"""The step whose loss overflows."""


def scaled(order: str, scaler: torch.amp.GradScaler) -> Callable[[Rig, Cohort], None]:
    """A loop with a GradScaler in which one step is skipped; ``order`` says where the user puts the other calls."""

    def loop(rig: Rig, cohort: Cohort) -> None:
        start, number = rig.grower.clock.steps, 0
        for turn in range(7):
            if order != "zero last":
                rig.optimizer.zero_grad(set_to_none=order != "zeros")
            loss = mse(rig.model, rig.batches[number])
            scaler.scale(loss * (float("inf") if turn == BAD else 1.0)).backward()
            scaler.step(rig.optimizer)
            if order != "late update":
                scaler.update()
            if order == "zero last":
                rig.optimizer.zero_grad()
            rig.grower.step(loss)
            if order == "late update":
                scaler.update()
            number += turn != BAD
        assert rig.grower.clock.steps == start + 6, "the skipped step was not to count"
        # an update() after the grower's step tells of the overflow when the next gradients are already mixed in
        assert float(rig.bank(cohort).moments.steps[0]) == 6 - (order == "late update"), "nor for the branch"
        guard(rig.grower)
        assert cohort.state is S.GRAFTING and not rig.grower.verdicts, "an overflow is ordinary, not a fault"

    return loop


@pytest.mark.parametrize("growth", [2, 1000], ids=["growing", "steady"])
@pytest.mark.parametrize("order", ["zero last", "zero first", "zeros", "late update"])
def test_a_step_that_the_scaler_skips_is_skipped_by_the_branch(order: str, growth: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth)

    def join(rig: Rig, cohort: Cohort) -> None:
        rig.grower.clock._scaler = scaler  # what track=[scaler] does
        scaled(order, scaler)(rig, cohort)

    (one, weights), (two, others) = learnt(join), learnt(plainly)
    if order == "late update":
        assert all(torch.isfinite(value).all() for value in weights.values())
        return
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)
    for name, value in snapshot(one.model).items():
        torch.testing.assert_close(value, snapshot(two.model)[name], rtol=1e-4, atol=1e-5)


def test_a_fused_optimizer_skips_by_itself_and_the_step_does_not_count() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def join(rig: Rig, cohort: Cohort) -> None:
        rig.grower.clock._scaler = scaler
        scaled("zero last", scaler)(rig, cohort)

    (_, weights), (_, others) = learnt(join, fused=True), learnt(plainly)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)


def test_a_scaler_among_what_is_tracked_is_found() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.warns(RuntimeWarning, match="a tracked object has no state_dict"):
        rig = attach(Pair(), track=[object(), scaler])
    rig.backward()
    scaler.scale(torch.zeros(()))
    rig.optimizer.step()
    assert rig.grower.clock.inverse_scale == 1 / 8


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "scheduled"])
def test_a_scaler_that_nobody_named_is_found(fused: bool, scheduled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def join(rig: Rig, cohort: Cohort) -> None:
        if scheduled:  # schedulers wrap the optimizer's step
            torch.optim.lr_scheduler.ConstantLR(rig.optimizer, 1.0)
        scaled("zero last", scaler)(rig, cohort)

    (_, weights), (_, others) = learnt(join, fused=fused), learnt(plainly)
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-5)


def test_a_branch_gradient_that_alone_is_not_finite_rolls_the_cohort_back() -> None:
    rig = attach(Pair(), interval=1)
    cohort = graft(rig, "fc1-fc2")
    loss = rig.backward()
    next(iter(rig.bank(cohort).params.values())).grad.fill_(float("nan"))
    rig.optimizer.step()
    rig.grower.step(loss)
    assert [verdict.state for verdict in rig.grower.verdicts] == [S.ROLLED_BACK]
