"""Compiled hosts: what is silent is found out, what is compiled afterwards grows, whole graphs capture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.models import Batch, assert_same_state, mse, rows, snapshot
from tests.rigs import Rig, attach, graft
from torch import Tensor, nn

import esper
from esper.protocol import Fitted, Germinate, Lifecycle, SeedPlan

pytestmark = pytest.mark.integration


class Compiled(nn.Module):
    """Small, but with an in-place activation behind a site."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu_(self.fc2(F.gelu(self.fc1(x)))))


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler_warnings() -> Any:
    """The compiler's own warnings are not this project's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def test_compiled_before_the_grower_was_attached(fresh_dynamo: None, compiler_warnings: None) -> None:
    model = Compiled()
    compiled = torch.compile(model, backend="eager")
    batches = rows(4)
    mse(compiled, batches[0]).backward()
    model.zero_grad()
    rig = attach(model)
    loss = mse(compiled, batches[1])
    loss.backward()
    rig.optimizer.step()
    with pytest.raises(esper.SilentSiteError, match="compiled before the Grower was attached"):
        rig.grower.step(loss)


def test_compiled_after_attaching(fresh_dynamo: None, compiler_warnings: None) -> None:
    """Whole graphs; dormant bit for bit; then a grafted branch whose alpha moves without another compilation."""

    def run(watched: bool) -> tuple[dict[str, Tensor], Rig | None, Any]:
        torch.manual_seed(0)
        model = Compiled()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        rig = attach(model, optimizer) if watched else None
        compiled = torch.compile(model, fullgraph=True)
        for batch in rows(8):
            loss = mse(compiled, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if rig is not None:
                rig.grower.step(loss)
        return snapshot(model), rig, compiled

    alone, _, _ = run(False)
    torch._dynamo.reset()
    watched, rig, compiled = run(True)
    assert_same_state(watched, alone)
    assert rig is not None and all(site.telemetry.reported for site in rig.grower.kasmina.sites.values())

    cohort = graft(rig, "fc1-fc2")
    rig.grower.kasmina.watch(False)
    x = rows(1, seed=3)[0][0]
    compiled(x)
    for alpha in (0.25, 0.75):
        rig.grower.kasmina.set_alpha(cohort, alpha)
        wanted = rig.model(x)
        rig.grower.kasmina.note_rows(rig.grower.clock.steps)  # as every real step does
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-6)


class Training:
    """A compiled host in training, whole graphs only."""

    def __init__(self, watched: bool, **settings: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = Compiled()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        self.rig = attach(self.model, self.optimizer, **settings) if watched else None
        self.compiled = torch.compile(self.model, backend="aot_eager", fullgraph=True)

    def step(self, batch: Batch, *, parts: int = 1) -> None:
        for x, wanted in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
            loss = mse(self.compiled, (x, wanted)) / parts
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.rig is not None:
            self.rig.grower.step(loss)


@pytest.fixture
def many_graphs() -> Iterator[None]:
    """A cohort's life takes more graphs than the compiler keeps by default."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def by_hand(model: Compiled, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the site reads and adds to, and the gradient there (up to its scale), in a batch of its own."""
    fc1, fc2, fc3 = ([p.detach() for p in layer.parameters()] for layer in (model.fc1, model.fc2, model.fc3))
    y = F.linear(F.gelu(F.linear(x, *fc1)), *fc2).requires_grad_()
    (g,) = torch.autograd.grad((F.linear(F.relu(y), *fc3) - wanted).square().mean(), y)
    return x, y.detach(), g


def test_a_whole_graph_captures_what_its_backward_pass_sees(
    fresh_dynamo: None, compiler_warnings: None, many_graphs: None
) -> None:
    """Rows of x, y and dL/dy that belong together, of several batches in one step those of one; the host unmoved."""
    alone, batches = Training(False), rows(6)  # a seventh step would graft
    for number, batch in enumerate(batches):
        alone.step(batch, parts=1 + number % 2)
    training = Training(True, capture=esper.CaptureConfig(batches=3, rows=18))
    assert training.rig is not None
    site = training.rig.grower.kasmina.sites["fc1-fc2"]
    training.rig.grower.submit(Germinate(seeds=(SeedPlan(site="fc1-fc2", start="negative_gradient"),)))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    capture: Any = None
    for number, (x, wanted) in enumerate(batches):
        parts = 1 + number % 2
        for part in zip(x.chunk(parts), wanted.chunk(parts), strict=True):
            seen.append(by_hand(training.model, *part))
        training.step((x, wanted), parts=parts)
        capture = site.capture or capture
    assert capture.full and capture.dropped_batches == 0
    got = capture.rows()
    assert got.x.shape == (18, 8)
    assert len(torch.unique(got.x, dim=0)) == 18, "a batch is not written over the one before"
    for number in range(3):
        mine = got.select(got.batch == number)
        (source,) = [batch for batch in seen if (batch[0] == mine.x[0]).all(1).any()]
        where = [int((source[0] == row).all(1).nonzero()) for row in mine.x]
        assert len(set(where)) == 6
        torch.testing.assert_close(mine.y, source[1][where])
        torch.testing.assert_close(mine.g / mine.g.norm(), source[2][where] / source[2][where].norm())
    assert_same_state(snapshot(training.model), snapshot(alone.model))


def test_a_captured_batch_without_a_backward_pass_is_dropped(
    fresh_dynamo: None, compiler_warnings: None, many_graphs: None
) -> None:
    training = Training(True, capture=esper.CaptureConfig(batches=3, rows=18))
    assert training.rig is not None
    site = training.rig.grower.kasmina.sites["fc1-fc2"]
    training.rig.grower.submit(Germinate(seeds=(SeedPlan(site="fc1-fc2", start="negative_gradient"),)))
    batches = rows(6)
    for batch in batches[:2]:  # germination, a first batch
        training.step(batch)
    capture = site.capture
    assert capture is not None and capture.filled == 1
    training.compiled(batches[3][0])
    training.optimizer.step()
    training.rig.grower.step(0.0)
    training.step(batches[4])
    assert len(torch.unique(capture.rows().batch)) == 2 and capture.dropped_batches == 1


def test_a_fitted_branch_is_grafted_in_whole_graphs(
    fresh_dynamo: None, compiler_warnings: None, many_graphs: None
) -> None:
    training = Training(True)
    assert training.rig is not None
    rig = training.rig
    rig.grower.submit(Germinate(seeds=(SeedPlan(site="fc1-fc2", start="negative_gradient"),)))
    for batch in rows(10):
        training.step(batch)
        if any(cohort.state is Lifecycle.GRAFTING for cohort in rig.grower.kasmina.cohorts.values()):
            break
    else:
        raise AssertionError("nothing was grafted")
    (fitted,) = [event for event in rig.events if isinstance(event, Fitted)]
    assert fitted.start == "negative_gradient" and fitted.explained > 0
