"""Commands from many threads, and in any order: each is applied once, and what they leave behind always agrees."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.models import MLP, rows
from tests.rigs import Rig, attach

import esper
from esper.kasmina.lifecycle import LEGAL, TABLE
from esper.kasmina.strategies import STRATEGIES
from esper.protocol import (
    Cancel,
    Command,
    Cull,
    Germinate,
    Germinated,
    Lifecycle,
    Pause,
    Resume,
    RollBack,
    SeedPlan,
    SetBudget,
    SetStrategy,
    Transitioned,
)

pytestmark = pytest.mark.integration

THREADS, EACH = 8, 40


def test_commands_of_eight_threads_are_each_applied_once_and_none_is_lost() -> None:
    """Every thread owns one chunk and germinates on it; and sends budgets, whose order within a thread must hold."""
    rig = attach(MLP.build(), sites=esper.SitesConfig(chunks=4), graft=esper.GraftConfig(embargo=0))
    seen: list[tuple[int | None, float | None]] = []
    original = rig.grower.set_budget
    rig.grower.set_budget = lambda params, flops: (seen.append((params, flops)), original(params, flops))  # type: ignore[assignment, func-returns-value]
    ready, threads = threading.Barrier(THREADS + 1), []

    def talk(number: int) -> None:
        ready.wait()
        site, chunk = ("fc1-fc2", "fc2-fc3")[number % 2], number // 2
        seed = SeedPlan(site=site, chunks=(chunk,), width=1, start="random_zero")
        rig.grower.submit(Germinate(seeds=(seed,), reason=f"thread {number}"))
        for turn in range(EACH):
            rig.grower.submit(SetBudget(params=1_000_000 + 1000 * number + turn))

    for number in range(THREADS):
        threads.append(threading.Thread(target=talk, args=(number,)))
        threads[-1].start()
    ready.wait()
    for _ in range(20):
        rig.train()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    rig.train(2)
    reasons = [event.reason for event in rig.events if isinstance(event, Germinated)]
    assert sorted(reasons) == [f"thread {number}" for number in range(THREADS)]
    assert not rig.refused()
    budgets = [params for params, _ in seen if params is not None]
    assert len(budgets) == len(set(budgets)) == THREADS * EACH
    for number in range(THREADS):
        mine = [value for value in budgets if (value - 1_000_000) // 1000 == number]
        assert mine == sorted(mine) and len(mine) == EACH
    slots = rig.grower.kasmina.table.occupied()
    assert len(slots) == THREADS and len(set(rig.grower.kasmina.table.seed_id[slots])) == THREADS


def test_a_command_waits_for_the_step() -> None:
    rig = attach(MLP.build())
    rig.grower.submit(Germinate(seeds=(SeedPlan(site="fc1-fc2"),)))
    assert not rig.grower.kasmina.cohorts
    rig.train()
    assert list(rig.grower.kasmina.cohorts) == [1]


class AnyOrder(RuleBasedStateMachine):
    """A user who sends anything at any time, while the host trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rig: Rig = attach(
            MLP.build(), sites=esper.SitesConfig(chunks=4), interval=2, evidence=esper.EvidenceConfig(fdr=0.9),
            graft=esper.GraftConfig(
                ramp_steps=2, timeout=8, stabilize_steps=1, stabilize_window=8, fine_tune_steps=1, cull_steps=2,
                embargo=3,
            ),
        )  # fmt: skip
        self.size = sum(p.numel() for p in self.rig.model.parameters())

    cohorts = st.integers(1, 4)

    def send(self, command: Command) -> None:
        self.rig.order(command)

    @rule(
        site=st.sampled_from(["fc1-fc2", "fc2-fc3", "nowhere"]),
        chunks=st.lists(st.integers(-1, 4), max_size=3).map(tuple),
        start=st.sampled_from(["random_zero", "negative_gradient", None]),
        width=st.sampled_from([None, 0, 1, 2]),
        both=st.booleans(),
    )
    def germinate(self, site: str, chunks: tuple[int, ...], start: str | None, width: int | None, both: bool) -> None:
        seeds = [SeedPlan(site=site, chunks=chunks, start=start, width=width)]
        if both:
            seeds.append(SeedPlan(site="fc2-fc3", chunks=chunks, start=start, width=width))
        self.send(Germinate(seeds=tuple(seeds)))

    @rule(cohort=cohorts, kind=st.sampled_from([Cull, Cancel, RollBack]))
    def end(self, cohort: int, kind: Any) -> None:
        self.send(kind(cohort=cohort, reason="any"))

    @rule(cohort=cohorts, kind=st.sampled_from([Pause, Resume]))
    def pause(self, cohort: int, kind: Any) -> None:
        self.send(kind(cohort=cohort))

    @rule(cohort=cohorts, strategy=st.sampled_from([*STRATEGIES, "none"]))
    def change(self, cohort: int, strategy: str) -> None:
        self.send(SetStrategy(cohort=cohort, strategy=strategy))

    @rule(steps=st.integers(1, 6))
    def train(self, steps: int) -> None:
        self.rig.train(steps)

    @invariant()
    def table_and_cohorts_agree(self) -> None:
        kasmina = self.rig.grower.kasmina
        table = kasmina.table
        held = [int(slot) for cohort in kasmina.cohorts.values() for slot in cohort.slots]
        assert sorted(held) == sorted(table.occupied().tolist())
        for cohort in kasmina.cohorts.values():
            assert (table.lifecycle[cohort.slots] == cohort.state).all()
            assert (table.paused[cohort.slots] == cohort.paused).all()
            np.testing.assert_allclose(table.alpha[cohort.slots], cohort.alpha, rtol=1e-6)
            inside = TABLE[cohort.state].forward != "no"
            for name in cohort.sites:
                site = kasmina.sites[name]
                bank = site.banks[cohort.number]
                assert (cohort.number in site.grafted) == inside
                assert bank.alpha.tolist() == pytest.approx([cohort.alpha] * bank.num_slots)
                assert bank.learning == (TABLE[cohort.state].learns == "task")
        owned = set(table.owner[table.owner >= 0].tolist())
        assert owned == set(held)

    @invariant()
    def nothing_is_left_behind(self) -> None:
        kasmina = self.rig.grower.kasmina
        for site in kasmina.sites.values():
            assert set(site.banks) <= set(kasmina.cohorts) and site.grafted <= set(site.banks)
            waiting = any(c.state < Lifecycle.GRAFTING for c in kasmina.cohorts.values() if site.info.name in c.members)
            assert site.capture is None or waiting
        annexes = sum(site.annex.num_params for site in kasmina.sites.values() if site.annex is not None)
        assert kasmina.params == self.size + annexes + sum(bank.num_params for bank in kasmina.live_banks)
        assert all(torch.isfinite(p).all() for p in self.rig.model.parameters())

    @invariant()
    def every_move_is_in_the_table(self) -> None:
        for event in self.rig.events:
            if isinstance(event, Transitioned):
                assert LEGAL[event.source, event.target]

    def teardown(self) -> None:
        self.rig.grower.finish()
        plain = self.rig.grower.export()
        x = rows(1, seed=5)[0][0]
        torch.testing.assert_close(plain(x), self.rig.model(x), rtol=1e-4, atol=1e-5)


AnyOrder.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
TestAnyOrder = AnyOrder.TestCase
