"""Faults at random steps in random states: the host ends up where one that never germinated is, bit for bit."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import Mlp, mse, rows
from tests.rigs import QUICK, Idle
from torch import Tensor, nn

import esper
from esper.protocol import AnyEvent, Cancel, Cull, Germinate, Incident, Lifecycle, Restored, SeedPlan
from esper.safety.training import Training
from esper.safety.tree import digest

pytestmark = pytest.mark.integration

S = Lifecycle
FAULTS = ("nan", "inf", "gradient", "divergence")
STATES = (
    S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING, S.CULLED, S.CANCELLED,
)  # fmt: skip
LONGEST = 170
DATA = rows(12, size=8)
HELD_OUT = rows(16, seed=7)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    x, y = DATA[step % len(DATA)]
    return x + 0.01 * torch.randn_like(x), y


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-3)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)


@dataclass
class Run:
    """A training as a user would write it, with a scheduler, dropout and a norm; with or without a grower."""

    make: Any
    rewinds: bool = True
    grows: bool = True
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    events: list[AnyEvent] = field(default_factory=list[AnyEvent])

    def __post_init__(self) -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        inner = Mlp(dropout=0.1)
        self.model = nn.Sequential(nn.BatchNorm1d(8), inner)
        self.optimizer = self.make(self.model)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, 0.95)
        self.batches = esper.Batches(batch_of, seed=2)
        self.training = Training(self.model, [self.optimizer], [self.scheduler, self.batches])
        self.grower: Any = None
        if self.grows:
            ours = {
                "evidence": esper.EvidenceConfig(accept="always"),
                "safety": esper.SafetyConfig(window=20, recovery=5),
            }
            self.grower = esper.Grower(
                self.model, self.optimizer, loss=mse, evaluate=HELD_OUT, controller=Idle(),
                track=[self.scheduler, *([self.batches] if self.rewinds else [])],
                config=esper.Config(**{**QUICK, **ours, **self.settings}), on_event=self.events.append,
            )  # fmt: skip

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            loss = mse(self.model, next(self.batches))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.grower is not None:
                self.grower.step(loss)
            self.scheduler.step()

    def hash(self) -> str:
        """All of the host's side: weights, buffers, moments, schedule, place in the data, random streams."""
        return digest(self.training.state())

    def told(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def cohort(self) -> Any:
        return next(iter(self.grower.kasmina.cohorts.values()), None)

    def bring(self, state: Lifecycle, further: int) -> None:
        """A cohort in ``state``, where it stays; ``further`` steps go by there if it can."""
        self.train(24)
        sites = [info.name for info in self.grower.sites()]
        seeds = tuple(SeedPlan(site=site, width=3, start="negative_gradient") for site in sites)
        self.grower.submit(Germinate(seeds=seeds))
        self.train()
        ending = {S.CULLED: Cull, S.CANCELLED: Cancel}.get(state)
        for _ in range(60):
            if self.cohort.state is (S.STABILIZATION if ending else state):
                break
            self.train()
        if ending is not None:
            self.grower.submit(ending(cohort=1, reason="test"))
            self.train()
            self.cohort.fading = -further
        elif further:
            self.grower.kasmina.set_paused(self.cohort, True, self.grower.clock.steps)
        self.train(further)
        assert self.cohort.state is state

    def damage(self, fault: str) -> None:
        for name in self.cohort.sites:
            bank = self.grower.kasmina.sites[name].banks[1]
            with torch.no_grad():
                if fault == "divergence":
                    bank.params["w2"].add_(300.0)
                elif fault == "gradient":
                    bank.bad_steps.add_(1)
                else:
                    bank.params["w1"][0, 0, 0] = math.nan if fault == "nan" else math.inf


@functools.cache
def alone(make: Any) -> tuple[str, ...]:
    """Hashes, step by step, of the host that never germinated and has no grower."""
    run = Run(make, grows=False)
    hashes = [run.hash()]
    for _ in range(LONGEST):
        run.train()
        hashes.append(run.hash())
    return tuple(hashes)


def check_survives(fault: str, state: Lifecycle, make: Any, further: int, then: int) -> str:
    """Inject, let the guard act, go on; returns what was done."""
    host = alone(make)  # first: both draw on the global streams
    run = Run(make)
    run.bring(state, further)
    run.damage(fault)
    for turn in range(40):  # two decision points at the least: a branch that leaves by itself may have done harm
        if turn >= 11 and run.cohort is None and run.grower.guard._suspicion is None:
            break
        run.train()
    assert run.cohort is None and [v.cohort for v in run.grower.verdicts] == [1]
    restored = run.told(Restored)
    assert all(event.verified and event.rewound for event in restored)
    known = bool(restored) or state in (S.GERMINATED, S.TRAINING)
    for _ in range(then + 1):
        step = run.batches.position
        assert run.grower.clock.steps == step
        if known:
            assert run.hash() == host[step], f"step {step} differs from the host that never germinated"
        run.train()
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    # a branch that fades out may be gone before a decision has noticed what did no lasting harm
    unnoticed = fault in ("gradient", "divergence") and state in (S.CULLED, S.CANCELLED)
    assert unnoticed or run.told(Incident)[0].cohort == 1
    return "restored" if restored else "removed"


def draw(number: int) -> tuple[str, Lifecycle, Any, int, int]:
    source = random.Random(f"fault {number}")
    fault = source.choice(FAULTS)
    states = STATES[2:] if fault == "divergence" else STATES  # what is outside of the forward pass harms nobody
    make, further, then = source.choice([adamw, momentum]), source.randrange(9), source.randrange(1, 8)
    return fault, source.choice(states), make, further, then


@pytest.mark.parametrize("part", range(4))
def test_injected_faults(part: int) -> None:
    done = Counter(check_survives(*draw(number)) for number in range(part, 48, 4))
    assert done["restored"] >= 3 and done["removed"] >= 3, done


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_thousand_injected_faults() -> None:
    done: Counter[tuple[str, str, str]] = Counter()
    failed: dict[int, str] = {}
    for number in range(1000):
        case = draw(number)
        try:
            done[check_survives(*case), case[0], case[1].name] += 1
        except AssertionError as error:
            failed[number] = f"{case}: {error}"
    print(sorted(done.items()))
    assert not failed, failed
    assert sum(done.values()) == 1000


def test_without_data_that_rewinds_the_next_batch_follows_and_it_is_said() -> None:
    run = Run(adamw, rewinds=False)
    run.bring(S.GRAFTING, 3)
    run.damage("nan")
    while run.cohort is not None:
        run.train()
    (restored,) = run.told(Restored)
    assert restored.verified and not restored.rewound
    assert "training goes on with the next batch (nothing in track= rewinds)" in restored.reason
    assert run.batches.position > run.grower.clock.steps == restored.to_step
    run.train(30)
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def poisoned(step: int) -> tuple[Tensor, Tensor]:
    x, y = batch_of(step)
    return (x * math.nan if step == 50 else x), y


def test_the_users_own_nan_is_reported_and_nothing_is_changed() -> None:
    hashes = []
    for grows in (True, False):
        run = Run(adamw, grows=grows)
        run.batches.source = poisoned
        if grows:
            with pytest.warns(RuntimeWarning, match="it is the host's"):
                run.train(80)
            (incident,) = run.told(Incident)
            assert incident.cohort is None and incident.action == "reported"
        else:
            run.train(80)
        hashes.append(run.hash())
    assert hashes[0] == hashes[1]


def test_the_users_own_nan_takes_the_suspect_and_stays_theirs() -> None:
    """With a cohort on trial it is the suspect: taken back, the same batch comes again, now with nobody to blame."""
    run, plain = Run(adamw), Run(adamw, grows=False)
    run.batches.source = plain.batches.source = poisoned
    run.bring(S.GRAFTING, 9)
    with pytest.warns(RuntimeWarning, match="it is the host's"):
        while run.batches.position < 70 or not run.told(Restored):
            run.train()
    assert [incident.action for incident in run.told(Incident)] == ["restored", "reported"]
    plain.train(run.batches.position)
    assert run.hash() == plain.hash()


def rising(step: int) -> tuple[Tensor, Tensor]:
    x, y = batch_of(step)
    return x, y + (100.0 if step >= 60 else 0.0)


def test_a_divergence_of_the_training_itself_is_reported_only() -> None:
    hashes = []
    for grows in (True, False):
        run = Run(adamw, grows=grows)
        run.batches.source = rising
        if grows:
            with pytest.warns(RuntimeWarning, match=r"diverges: .* after .* it is the training's own"):
                run.train(75)
        else:
            run.train(75)
        hashes.append(run.hash())
    assert hashes[0] == hashes[1]


def test_a_loss_that_comes_back_once_the_suspect_is_out_costs_the_host_nothing() -> None:
    run = Run(adamw)
    run.bring(S.STABILIZATION, 2)
    run.damage("divergence")
    with torch.no_grad():
        frozen = [p.detach().clone() for p in run.model.parameters()]
    while run.cohort is not None:
        run.train()
        with torch.no_grad():  # a host that is not moved by what the branch does to it
            for p, q in zip(run.model.parameters(), frozen, strict=True):
                p.copy_(q)
    assert run.grower.guard._suspicion is not None
    run.train(12)
    assert run.grower.guard._suspicion is None and not run.told(Restored)
    (incident,) = run.told(Incident)
    assert incident.action == "removed" and "the training loss diverges" in incident.reason


def test_snapshots_are_bounded_and_said_to_be_missing() -> None:
    run = Run(adamw, settings={"safety": esper.SafetyConfig(snapshot_bytes=1000)})
    with pytest.warns(RuntimeWarning, match="safety.snapshot_bytes = 1000"):
        run.bring(S.GRAFTING, 3)
    assert run.grower.guard.snapshots.num_bytes == 0
    run.damage("nan")
    with pytest.warns(RuntimeWarning, match="there is no snapshot to go back to"):
        while run.cohort is not None:
            run.train()
    assert not run.told(Restored)


def test_snapshots_are_let_go_when_their_cohort_has_ended() -> None:
    run = Run(adamw)
    run.bring(S.GRAFTING, 0)
    guard = run.grower.guard
    assert guard.snapshots.num_bytes > 0
    while run.cohort is not None:
        run.train()
    assert guard.snapshots.num_bytes > 0, "who has just left is suspect still"
    run.train(10)
    assert guard.snapshots.num_bytes == 0 and guard.snapshots.oldest_step is None
