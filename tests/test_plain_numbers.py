"""Under a compiler, in mixed precision and with recomputation: few graphs, and the numbers of a plain run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.models import Transformer, mse, tokens
from tests.rigs import EVERY, Rig, attach, branch_gradients, graft, host_gradients
from torch import Tensor, nn

import esper
from esper.protocol import Germinate, Lifecycle, SeedPlan

pytestmark = pytest.mark.integration


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting() -> tuple[Callable[..., Any], list[int]]:
    """A backend that runs graphs as they are, and how often it was given one."""
    graphs = [0]

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs[0] += 1
        return module.forward

    return backend, graphs


def live(rig: Rig, compiled: nn.Module, chunks: tuple[int, ...]) -> list[Lifecycle]:
    """Four seeds on ``chunks`` of a layer, trained until they have left; the states they were in."""
    plan = SeedPlan(site="fc1", chunks=chunks, seeds=4, width=3, blueprint="chunk_mlp", start="random_zero")
    rig.grower.submit(Germinate(seeds=(plan,)))
    seen: list[Lifecycle] = []
    for _ in range(120):
        loss = mse(compiled, rig.batches[rig.turn % 10])
        loss.backward()
        rig.optimizer.step()
        rig.optimizer.zero_grad()
        rig.grower.step(loss)
        rig.turn += 1
        states = [cohort.state for cohort in rig.grower.kasmina.cohorts.values()]
        if not states and seen:
            return seen
        seen += [state for state in states if state not in seen]
    raise AssertionError(f"the seeds were to leave in 120 steps, they were in {seen}")


def test_seeds_move_without_a_recompilation(fresh_dynamo: None) -> None:
    """One graph dormant, one while seeds learn, one while they are frozen; later seeds elsewhere use the same."""
    torch.manual_seed(0)
    sites = esper.SitesConfig(layers=True, include=("fc1",))
    rig = attach(Wide(), sites=sites, telemetry=EVERY, evidence=esper.EvidenceConfig(looks=1))
    backend, graphs = counting()
    compiled: Any = torch.compile(rig.model, fullgraph=True, backend=backend)
    first = live(rig, compiled, (0, 1, 2, 3))
    assert {Lifecycle.GRAFTING, Lifecycle.STABILIZATION, Lifecycle.EVALUATING} <= set(first)
    assert graphs == [3]
    second = live(rig, compiled, (8, 11, 20, 31))
    assert Lifecycle.STABILIZATION in second
    assert graphs == [3], "seeds of the same sizes on other chunks need no other graph"


def looked_at(mode: str | None, *, bf16: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Telemetry of every site, and gradients of host and branches, of one forward and backward."""
    torch.manual_seed(4)
    rig = attach(Transformer(0.0, mode), batches=tokens(10), held_out=tokens(16, seed=7), telemetry=EVERY)
    cohort = graft(rig, "ffn.0.up-down", "ffn.1.up-down")
    rig.optimizer.zero_grad()
    rig.grower.kasmina.watch(True)
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with context:
        loss = mse(rig.model, rig.batches[0])
    loss.backward()
    seen = {name: site.telemetry.statistics.clone() for name, site in rig.grower.kasmina.sites.items()}  # type: ignore[union-attr]
    return seen, {**branch_gradients(rig, cohort), **host_gradients(rig)}


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return looked_at(None, bf16=False)


@pytest.mark.parametrize("mode", [None, "reentrant", "non-reentrant"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_telemetry_and_gradients_are_those_of_a_plain_run(
    mode: str | None, bf16: bool, plain: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    found = looked_at(mode, bf16=bf16)
    allowed = 5e-2 if bf16 else 1e-5
    for got, wanted in zip(found, plain, strict=True):
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            difference = (value - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-12)
            assert difference <= allowed, name


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_recomputing_in_bf16_changes_nothing(mode: str) -> None:
    for got, wanted in zip(looked_at(mode, bf16=True), looked_at(None, bf16=True), strict=True):
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-5)
