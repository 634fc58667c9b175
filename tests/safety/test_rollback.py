"""Rollback by command in every active state, soft and exact, also under mixed precision; and no trace is left."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import Mlp, mse, rows
from tests.rigs import QUICK, Idle, host_of
from torch import Tensor

import esper
from esper.commands import obey
from esper.protocol import AnyEvent, Cull, Germinate, Lifecycle, Refused, Restored, RollBack, SeedPlan, SetBudget, Stop
from esper.safety.training import Training
from esper.safety.tree import digest

pytestmark = pytest.mark.integration

S = Lifecycle
ACTIVE = (S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING)
DATA = rows(12, size=8)


class Amp:
    """bf16 or fp16 autocast, a GradScaler, momentum and a scheduler, with or without a grower."""

    def __init__(self, *, grows: bool, dtype: torch.dtype | None = torch.bfloat16, safety: Any = None) -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        self.dtype = dtype
        self.model = Mlp(dropout=0.1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9, nesterov=True)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=200)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)
        self.batches = esper.Batches(DATA)
        tracked = [self.scheduler, self.scaler, self.batches]
        self.training = Training(self.model, [self.optimizer], tracked)
        self.events: list[AnyEvent] = []
        self.grower: Any = None
        if grows:
            evidence = esper.EvidenceConfig(accept="always")
            safety = safety or esper.SafetyConfig()
            self.grower = esper.Grower(
                self.model, self.optimizer, loss=mse, evaluate=rows(16, seed=7), track=tracked, controller=Idle(),
                config=esper.Config(**{**QUICK, "evidence": evidence, "safety": safety}), on_event=self.events.append,
            )  # fmt: skip

    def train(self, steps: int = 1, factor: float = 1.0) -> None:
        for _ in range(steps):
            x, y = next(self.batches)
            with torch.autocast("cpu", self.dtype or torch.float32, enabled=self.dtype is not None):
                loss: Tensor = (self.model(x) - y).square().mean()
            self.scaler.scale(loss * factor).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            before = None if self.grower is None else self.grower.clock.steps
            if self.grower is not None:
                self.grower.step(loss)
            if before is None or self.grower.clock.steps:
                self.scheduler.step()

    def germinate(self, *, start: str = "negative_gradient") -> None:
        sites = [info.name for info in self.grower.sites()]
        self.grower.submit(Germinate(seeds=tuple(SeedPlan(site=site, width=3, start=start) for site in sites)))
        self.train()

    @property
    def cohort(self) -> Any:
        return next(iter(self.grower.kasmina.cohorts.values()), None)

    def bring(self, state: Lifecycle) -> None:
        self.train(3)
        self.germinate()
        for _ in range(60):
            if self.cohort.state is state:
                return
            self.train()

    def hash(self) -> str:
        return digest(self.training.state())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("state", ACTIVE, ids=lambda state: state.name)
def test_an_exact_rollback_in_every_active_state(state: Lifecycle, dtype: torch.dtype | None) -> None:
    run = Amp(grows=True, dtype=dtype)
    run.bring(state)
    run.grower.submit(RollBack(cohort=1, reason="by hand", exact=True))
    run.train()
    restored = [event for event in run.events if isinstance(event, Restored)]
    if state is S.GERMINATED:  # nothing to take back: it was never grafted
        assert not restored and any(isinstance(e, Refused) and "not grafted yet" in e.reason for e in run.events)
        run.grower.submit(RollBack(cohort=1, reason="by hand"))
        run.train()
    else:
        assert [event.verified for event in restored] == [True] and restored[0].reason.startswith("by hand")
    assert run.cohort is None and run.grower.verdicts[0].state is S.ROLLED_BACK
    run.train(4)
    alone_at = run.batches.position
    mine = run.hash()
    alone = Amp(grows=False, dtype=dtype)
    alone.train(alone_at)
    assert alone.hash() == mine


@pytest.mark.parametrize("state", ACTIVE, ids=lambda state: state.name)
def test_a_soft_rollback_does_not_touch_the_host(state: Lifecycle) -> None:
    run = Amp(grows=True)
    run.bring(state)
    run.grower._orders.put(RollBack(cohort=1, reason="by hand"))
    before = run.hash()
    obey(run.grower, run.grower._orders, None, run.grower.clock.steps)
    assert run.cohort is None and run.hash() == before


def test_a_broken_branch_does_not_let_the_scaler_skip_for_ever() -> None:
    run = Amp(grows=True)
    run.bring(S.GRAFTING)
    run.grower.kasmina.set_paused(run.cohort, True, run.grower.clock.steps)
    with torch.no_grad():
        for name in run.cohort.sites:
            run.grower.kasmina.sites[name].banks[1].params["w1"].fill_(float("inf"))
    steps = run.grower.clock.steps
    run.train(20)
    assert run.cohort is None and run.grower.clock.steps > steps + 5
    assert "8 steps in a row were skipped" in run.grower.verdicts[0].reason
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_commands_since_the_snapshot_are_given_again() -> None:
    run = Amp(grows=True)
    run.bring(S.STABILIZATION)
    params = run.grower.kasmina.params + 1000
    run.grower.submit(SetBudget(params=params))
    run.train(2)
    run.grower.submit(Stop(reason="enough"))
    run.train()
    run.grower.submit(RollBack(cohort=1, reason="by hand", exact=True))
    run.train()
    assert run.grower.stopped is None and run.grower.accounts.budget.params is None, "both were undone"
    run.train()
    assert run.grower.stopped == "enough" and run.grower.accounts.budget.params == params
    assert not run.grower._orders.state()


def test_no_command_is_lost_while_the_run_is_taken_back() -> None:
    run = Amp(grows=True)
    run.bring(S.GRAFTING)
    seen: list[int | None] = []
    original = run.grower.set_budget
    run.grower.set_budget = lambda params, flops: (seen.append(params), original(params, flops))
    base, each = 1_000_000, 40

    def talk(number: int) -> None:
        for turn in range(each):
            run.grower.submit(SetBudget(params=base + 100 * number + turn))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for number, thread in enumerate(threads):
        thread.start()
        run.train()
        if number == 3:
            run.grower.submit(RollBack(cohort=1, reason="by hand", exact=True))
    for thread in threads:
        thread.join()
    run.train(3)
    assert any(isinstance(event, Restored) for event in run.events)
    last = {n: [p for p in seen if p is not None and (p - base) // 100 == n][-each:] for n in range(8)}
    assert all(last[n] == [base + 100 * n + i for i in range(each)] for n in range(8))


@pytest.mark.parametrize("exact", [False, True])
def test_removal_leaves_no_trace(exact: bool) -> None:
    run = Amp(grows=True)
    run.bring(S.GRAFTING)
    kasmina = run.grower.kasmina
    banks = [kasmina.sites[name].banks[1] for name in run.cohort.sites]
    alive = [weakref.ref(thing) for bank in banks for thing in (bank, *bank.params.values(), *bank.buffers.values())]
    alive += [weakref.ref(run.cohort)]
    known = {id(p) for p in run.model.parameters()}
    del banks
    run.grower.submit(RollBack(cohort=1, reason="by hand", exact=exact))
    run.train(12)
    gc.collect()
    assert [ref() for ref in alive if ref() is not None] == []
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == known
    assert {id(p) for p in run.optimizer.state} == known
    assert len(kasmina.table.occupied()) == 0 and kasmina.live_banks == [] and run.grower.guard.snapshots.num_bytes == 0
    state = run.grower.state_dict()
    assert state["esper"]["kasmina"]["cohorts"] == []
    assert all(not site["banks"] and site["capture"] is None for site in state["esper"]["kasmina"]["sites"].values())
    run.model.eval()
    x = DATA[0][0]
    assert torch.equal(run.model(x), host_of(run.model).eval()(x))


def test_rollbacks_do_not_pile_up() -> None:
    run = Amp(grows=True, safety=esper.SafetyConfig(window=20))
    run.train(3)
    sizes = []
    for number in range(1, 7):
        run.grower.kasmina.table.embargo_until[:] = 0
        run.germinate(start="random_zero")
        while run.cohort.state is not S.GRAFTING:
            run.train()
        out = RollBack(cohort=number, reason="x", exact=True) if number % 2 else Cull(cohort=number, reason="x")
        run.grower.submit(out)
        while run.cohort is not None:
            run.train()
        run.train(11)
        gc.collect()
        sizes.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    assert sizes[-1] <= sizes[1], sizes
    assert threading.active_count() < 20
