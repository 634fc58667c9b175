"""A run that is saved, built anew elsewhere and loaded goes on bit for bit as one that was never interrupted."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tests.models import Mlp, mse, rows
from tests.rigs import QUICK, Idle, adamw
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import esper
from esper.protocol import AnyEvent, Cancel, Cull, Germinate, Judged, Lifecycle, Overhead, Resume, RollBack, SeedPlan
from esper.safety.tree import digest, join, split

pytestmark = pytest.mark.integration

S = Lifecycle
EPOCH = 6
"""Batches an epoch."""
FURTHER = 9
OURS = {"telemetry": esper.TelemetryConfig(every=2), "evidence": esper.EvidenceConfig(accept="always")}


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples with an augmentation that draws from the global streams, as many do."""

    def __init__(self) -> None:
        self.x, self.y = (torch.cat(parts) for parts in zip(*rows(EPOCH, size=8), strict=True))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(8) * (1 + random.random() + float(np.random.rand()))
        return self.x[index] + 0.01 * noise, self.y[index]


class Noted(nn.Module):
    """A host with dropout, a norm's statistics, and a buffer that its state_dict leaves out."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp(dropout=0.1)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.inner(self.norm(x)) * (1 + 1e-3 * torch.sin(self.seen))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)


@dataclass
class Run:
    """A training as a user would write it: scheduler, averaged model, augmented batches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: esper.Batches
    scheduler: Any
    average: Any
    grower: esper.Grower
    events: list[AnyEvent] = field(default_factory=list[AnyEvent])

    @classmethod
    def build(cls, seed: int, make: Any = adamw, workers: int = 0, **settings: Any) -> Run:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        model = Noted()
        optimizer = make(model)
        loader = DataLoader(Samples(), batch_size=8, shuffle=True, num_workers=workers)
        batches = esper.Batches(loader, seed=3)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9, 21, 30], gamma=0.7)
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        events: list[AnyEvent] = []
        grower = esper.Grower(
            model, optimizer, loss=mse, evaluate=rows(16, seed=7), track=[scheduler, average, batches],
            config=esper.Config(**{**QUICK, **OURS, **settings}),
            controller=Idle(), on_event=events.append,
        )  # fmt: skip
        return cls(model, optimizer, batches, scheduler, average, grower, events)

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            loss = mse(self.model, next(self.batches))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average.update_parameters(self.model)
            self.grower.step(loss)
            self.scheduler.step()

    def until(self, condition: Any) -> None:
        for _ in range(120):
            if condition():
                return
            self.train()
        raise AssertionError("the state was not reached")

    @property
    def state(self) -> Lifecycle:
        cohorts = list(self.grower.kasmina.cohorts.values())
        return cohorts[0].state if cohorts else S.DORMANT

    def told(self, since: int) -> list[bytes]:
        events = [e for e in self.events[since:] if not isinstance(e, Overhead)]
        return [msgspec.json.encode(event) for event in events]


ENDS = {S.CULLED: Cull, S.CANCELLED: Cancel, S.ROLLED_BACK: RollBack}


def bring(run: Run, state: Lifecycle, place: str) -> None:
    """Train until the newest seeds are in ``state``, and on to the middle or the end of an epoch where they stay."""
    run.train(2)
    if state is not S.DORMANT:
        sites = [info.name for info in run.grower.sites()]
        start = "negative_gradient"
        run.grower.submit(Germinate(seeds=tuple(SeedPlan(site=site, width=3, start=start) for site in sites)))
        run.train()
    if state in ENDS:
        run.until(lambda: run.state is S.GRAFTING and next(iter(run.grower.kasmina.cohorts.values())).alpha > 0.4)
        run.grower.submit(ENDS[state](cohort=1, reason="test"))
        run.train()
    elif state is S.FOSSILIZED:
        run.until(lambda: any(site.annex is not None for site in run.grower.kasmina.sites.values()))
        run.train(2)
    elif state is not S.DORMANT:
        run.until(lambda: run.state is state)
    wanted = EPOCH if place == "end" else EPOCH // 2
    if state in (S.GERMINATED, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.GRAFTING, S.TRAINING):
        cohort = next(iter(run.grower.kasmina.cohorts.values()))
        run.grower.kasmina.set_paused(cohort, True, run.grower.clock.steps)
        early = int(state is S.TRAINING)  # it takes a step to get the snapshot that a graft waits for
        run.until(lambda: (run.batches.position + early) % EPOCH == wanted % EPOCH)
        if early:
            run.grower.submit(Resume(cohort=cohort.number))
            run.train()
            assert cohort.number in run.grower.guard.snapshots and not cohort.paused
        else:
            run.grower.kasmina.set_paused(cohort, False, run.grower.clock.steps)
        assert run.state is state
        return
    for _ in range(EPOCH):
        if run.batches.position % EPOCH == wanted % EPOCH:
            break
        if state in (S.CULLED, S.CANCELLED) and run.grower.kasmina.cohorts:
            for cohort in run.grower.kasmina.cohorts.values():
                cohort.fading = 1  # it fades for as long as it takes
        run.train()


def check_resumes(state: Lifecycle, make: Any, workers: int, place: str) -> None:
    run = Run.build(1, make, workers)
    bring(run, state, place)
    assert run.batches.position % EPOCH == (0 if place == "end" else EPOCH // 2)
    if state in (S.CULLED, S.CANCELLED):
        assert run.state is state, "it was to fade"
    saved = run.grower.state_dict()
    hashed = digest(saved)
    told = len(run.events)
    run.train(FURTHER)
    assert digest(saved) == hashed, "a saved state must not change while training goes on"

    document, tensors = split(saved)
    again = Run.build(2, make, workers)
    parameters = list(again.model.parameters())
    again.train(3)
    again.grower.load_state_dict(join(document, tensors))
    assert digest(again.grower.state_dict()) == hashed
    begun = len(again.events)
    again.train(FURTHER)
    assert all(a is b for a, b in zip(parameters, again.model.parameters(), strict=True))
    assert digest(saved) == hashed, "a loaded state must not change while training goes on"
    assert again.told(begun) == run.told(told)
    assert digest(again.grower.state_dict()) == digest(run.grower.state_dict())


@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda state: state.name)
def test_every_state_resumes_bit_for_bit(state: Lifecycle) -> None:
    number = int(state)
    check_resumes(state, momentum if number % 2 else adamw, 0, "mid" if number % 3 else "end")


def test_a_loader_with_workers_resumes_bit_for_bit() -> None:
    check_resumes(S.GRAFTING, adamw, 2, "mid")


@pytest.mark.long
@pytest.mark.parametrize("place", ["mid", "end"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [adamw, momentum])
@pytest.mark.parametrize("state", list(Lifecycle), ids=lambda state: state.name)
def test_the_whole_matrix(state: Lifecycle, make: Any, workers: int, place: str) -> None:
    check_resumes(state, make, workers, place)


@pytest.mark.parametrize("place", ["span", "layer"])
def test_tests_go_on_where_they_were(place: str) -> None:
    """Looks, levels, draws and the host from before a graft: what is judged after a resume is judged the same."""
    settings = {
        "evidence": esper.EvidenceConfig(projection_rows=24, looks=3),
        "sites": esper.SitesConfig(layers=place == "layer"),
    }
    one = Run.build(1, **settings)
    one.train(2)
    names = [info.name for info in one.grower.sites() if info.kind.is_span == (place == "span")]
    blueprint = None if place == "span" else "low_rank"

    def germinate(run: Run, name: str) -> None:
        run.grower.submit(Germinate(seeds=(SeedPlan(site=name, width=3, blueprint=blueprint),)))
        run.train()

    germinate(one, names[0])
    one.until(lambda: any(isinstance(event, Judged) for event in one.events))
    germinate(one, names[1])
    one.until(lambda: any(c.number == 2 and c.state is S.STABILIZATION for c in one.grower.kasmina.cohorts.values()))
    saved = one.grower.state_dict()
    assert saved["esper"]["judge"]["fdr"]["num_tests"] + len(saved["esper"]["judge"]["earlier"]) > 0
    assert place == "span" or 2 in saved["esper"]["judge"]["before"]
    told = len(one.events)
    one.train(40)
    state = one.grower.state_dict()
    again = Run.build(3, **settings)
    again.grower.load_state_dict(saved)
    begun = len(again.events)
    again.train(40)
    assert again.told(begun) == one.told(told)
    assert any(isinstance(event, Judged) for event in one.events[told:])
    assert digest(again.grower.state_dict()) == digest(state)
