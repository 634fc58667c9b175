"""How many graphs a compiled host takes: two a phase, one of them with telemetry, however deep it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.models import mse, rows
from tests.rigs import QUICK, Rig, attach, make_visible
from torch import Tensor, nn

import esper
from esper.kasmina.cohort import Cohort
from esper.protocol import Germinate, Lifecycle, SeedPlan

pytestmark = pytest.mark.integration

S = Lifecycle
DEPTH = 12
"""As many blocks as the benchmark's host has: what a compiler does for each may add up."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Training:
    """A compiled host in training, whole graphs only, each step of several micro-batches."""

    def __init__(self, parts: int) -> None:
        torch.manual_seed(0)
        self.rig: Rig = attach(
            Deep(), telemetry=esper.TelemetryConfig(every=2), capture=esper.CaptureConfig(batches=4, rows=64),
            graft=replace(QUICK["graft"], embargo=1, ramp_steps=100, timeout=400),  # type: ignore[type-var]
        )  # fmt: skip
        self.compiled = torch.compile(self.rig.model, backend="eager", fullgraph=True)
        self.parts, self.graphs = parts, 0

    def step(self) -> None:
        rig = self.rig
        batch = rig.batches[rig.turn % len(rig.batches)]
        for part in zip(*(values.chunk(self.parts) for values in batch), strict=True):
            loss = mse(self.compiled, part)
            loss.backward()
        rig.optimizer.step()
        rig.optimizer.zero_grad()
        rig.grower.step(loss)
        rig.turn += 1

    def new_graphs(self, steps: int = 4) -> int:
        """Graphs made in so many steps: with telemetry and without."""
        for _ in range(steps):
            self.step()
        before, self.graphs = self.graphs, torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return self.graphs - before

    def germinate(self, names: list[str]) -> Cohort:
        plans = tuple(SeedPlan(site=name, start="negative_gradient", width=2) for name in names)
        self.rig.grower.submit(Germinate(seeds=plans))
        self.step()
        (cohort,) = self.rig.grower.kasmina.cohorts.values()
        return cohort

    def until_grafted(self, cohort: Cohort) -> None:
        for _ in range(20):
            if cohort.state is S.GRAFTING:
                return
            self.step()
        raise AssertionError(f"it was to be grafted, it is {cohort.state.name}")

    def move(self, cohort: Cohort, *states: Lifecycle) -> None:
        kasmina, step = self.rig.grower.kasmina, self.rig.grower.clock.steps
        for state in states:
            kasmina.move(cohort, state, step)
        kasmina.set_paused(cohort, True, step)


@pytest.fixture
def fresh_dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=32):
        warnings.simplefilter("ignore", DeprecationWarning)  # the compiler's own
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch._dynamo.reset()


def test_a_life_takes_two_graphs_a_phase_and_the_next_one_takes_none(fresh_dynamo: None) -> None:
    """Germination, capture, fit, graft, judgement, the end; then again; then for good."""
    training = Training(parts=2)
    kasmina = training.rig.grower.kasmina
    names = list(kasmina.sites)
    assert len(names) == DEPTH and training.new_graphs() == 2

    cohort = training.germinate(names)
    assert training.new_graphs(3) == 2, "capturing"
    assert all(kasmina.rows_per_step[name] == 16 for name in names), "of both micro-batches"
    training.until_grafted(cohort)
    assert training.new_graphs(1) <= 2
    training.new_graphs()
    assert training.graphs == 6, "learning in the forward pass"
    training.move(cohort, S.STABILIZATION, S.EVALUATING)
    assert training.new_graphs() == 2, "held while it is judged"
    training.rig.grower.stages.end(cohort, S.CULLED, training.rig.grower.clock.steps, "test")
    assert training.new_graphs() == 0, "as before it germinated"

    cohort = training.germinate(names)
    training.until_grafted(cohort)
    kasmina.set_alpha(cohort, 0.5)
    training.move(cohort, S.STABILIZATION, S.EVALUATING)
    training.new_graphs()
    assert training.graphs == 8, "another life of the same sizes"
    for name in names:
        make_visible(training.rig.bank(cohort, name))
    kasmina.move(cohort, S.FINE_TUNING, training.rig.grower.clock.steps)
    kasmina.fossilise(cohort, training.rig.grower.clock.steps, training.rig.grower.clock.hosts)
    assert training.new_graphs() == 2, "grown"
    x = rows(1, seed=3)[0][0][:8]  # as a micro-batch is
    torch.testing.assert_close(training.compiled(x), training.rig.model(x), rtol=1e-4, atol=1e-5)
