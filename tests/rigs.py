"""Growers on small hosts: the loop that trains them, cohorts held in a state, runs with and without a grower."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.models import DEVICE, Batch, Pair, Task, assert_same_state, mse, rows, same_bits, snapshot
from torch import Tensor, nn

import esper
from esper.commands import apply
from esper.export.merge import strip
from esper.kasmina.cohort import Cohort
from esper.protocol import AnyEvent, Command, Germinate, Lifecycle, Observation, SeedPlan

# ----------------------------------------------------------------------------------------------------------------------
# Growers


class Idle:
    """A controller that does nothing: tests submit their own commands."""

    def decide(self, observation: Observation) -> Sequence[Command]:
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class Rig:
    """A host under a grower, with a loop in the order that the documentation shows."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    grower: esper.Grower
    batches: list[Batch]
    events: list[AnyEvent] = field(default_factory=list)
    turn: int = 0

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            loss = mse(self.model, self.batches[self.turn % len(self.batches)])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.grower.step(loss)
            self.turn += 1

    def backward(self) -> Tensor:
        """One forward and backward on the first batch; gradients stay."""
        self.optimizer.zero_grad()
        loss = mse(self.model, self.batches[0])
        loss.backward()
        return loss

    def order(self, command: Command) -> None:
        """Submit a command and take the step in which it is judged."""
        self.grower.submit(command)
        self.train()

    def germinate(self, *sites: str, start: str = "random_zero", width: int = 3, **plan: Any) -> Cohort:
        names = sites or tuple(info.name for info in self.grower.sites())
        seeds = tuple(SeedPlan(site=name, start=start, width=width, **plan) for name in names)
        self.order(Germinate(seeds=seeds))
        refusals = [event for event in self.events if type(event).__name__ == "Refused"]
        assert self.grower.kasmina.cohorts, refusals[-1:]
        return list(self.grower.kasmina.cohorts.values())[-1]

    def until(self, cohort: Cohort, state: Lifecycle, limit: int = 300) -> Cohort:
        for _ in range(limit):
            if cohort.state is state:
                return cohort
            self.train()
        raise AssertionError(f"{state.name} was not reached in {limit} steps, it is {cohort.state.name}")

    def bank(self, cohort: Cohort, site: str | None = None) -> Any:
        return self.grower.kasmina.sites[site or cohort.sites[0]].banks[cohort.number]

    def refused(self) -> list[Any]:
        return [event for event in self.events if type(event).__name__ == "Refused"]


QUICK = {
    "capture": esper.CaptureConfig(batches=4, rows=640),
    "fit": esper.FitConfig(steps=10, batch_rows=32, min_t=-1e9),
    "graft": esper.GraftConfig(
        ramp_steps=4, timeout=40, stabilize_steps=3, stabilize_window=8, fine_tune_steps=5, cull_steps=4,
        warmup_steps=1, embargo=20,
    ),
    "telemetry": esper.TelemetryConfig(every=3),
    "interval": 5,
}  # fmt: skip
"""Settings under which a whole life takes some thirty steps."""


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    batches: list[Batch] | None = None,
    held_out: Iterable[Batch] | None = None,
    loss: Callable[..., Tensor] = mse,
    track: Sequence[Any] = (),
    controller: Any = None,
    train_step: Any = None,
    audit: Any = None,
    **settings: Any,
) -> Rig:
    """A rig with quick settings and an idle controller; ``settings`` are those of ``Config``."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 3e-3)
    events: list[AnyEvent] = []
    grower = esper.Grower(
        model,
        optimizer,
        loss=loss,
        evaluate=_beside(model, rows(16, seed=7)) if held_out is None else held_out,
        track=track,
        train_step=train_step,
        audit=audit,
        config=esper.Config(**{**QUICK, **settings}),
        controller=controller or Idle(),
        on_event=events.append,
    )
    return Rig(model, optimizer, grower, _beside(model, rows(10)) if batches is None else batches, events)


def _beside(model: nn.Module, batches: list[Batch]) -> list[Batch]:
    device = next(model.parameters()).device
    return [(x.to(device), wanted.to(device)) for x, wanted in batches]


# ----------------------------------------------------------------------------------------------------------------------
# The same training with and without a grower


@dataclass
class Trajectory:
    """Everything a run leaves behind that Esper must not touch."""

    losses: list[Tensor]
    outputs: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    moments: list[Tensor]
    random: tuple[float, float, float]
    """The next draw of Python's, NumPy's and torch's global streams."""

    def assert_equals(self, other: Trajectory) -> None:
        assert_same_state({str(i): v for i, v in enumerate(self.losses)}, dict(_numbered(other.losses)))
        assert same_bits(self.outputs, other.outputs)
        assert_same_state(self.gradients, other.gradients)
        assert_same_state(self.state, other.state)
        assert_same_state(dict(_numbered(self.moments)), dict(_numbered(other.moments)))
        assert self.random == other.random


def _numbered(values: Iterable[Tensor]) -> Iterable[tuple[str, Tensor]]:
    return ((str(i), value) for i, value in enumerate(values))


EVERY = esper.TelemetryConfig(every=1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)


def momentum_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-3, nesterov=True)


def trajectory(
    task: Task,
    steps: int,
    join: Callable[[nn.Module, torch.optim.Optimizer, Task], Rig] | None = None,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    bf16: bool = False,
    clip: float | None = None,
    each: Callable[[Rig, int], None] | None = None,
) -> Trajectory:
    """Train from the same seeds; ``join`` attaches a grower, ``each`` is called after each step of it."""
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    torch.use_deterministic_algorithms(DEVICE.type == "cuda")
    model = task.build()
    batches = task.batches(10)
    stepper = optimizer(model)
    rig = None if join is None else join(model, stepper, task)
    losses: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        x, wanted = batches[step % len(batches)]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = (model(x + 0.1 * torch.randn_like(x) if x.is_floating_point() else x) - wanted).square().mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.detach())
        if rig is not None:
            rig.grower.step(loss)
            if each is not None:
                each(rig, step)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        outputs = model(batches[0][0])
    moments = [v for entry in stepper.state.values() for v in entry.values() if isinstance(v, Tensor)]
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), device=DEVICE)))
    return Trajectory(losses, outputs, gradients, snapshot(model), moments, drawn)


# ----------------------------------------------------------------------------------------------------------------------
# Cohorts held in a state

S = Lifecycle
S = Lifecycle
PATH = (S.TRAINING, S.GRAFTING, S.STABILIZATION, S.EVALUATING, S.FINE_TUNING)
"""The way of a seed that is kept, from GERMINATED on."""
ALPHA = 0.4


def hold(state: Lifecycle, model: nn.Module | None = None) -> tuple[Rig, Cohort | None]:
    """A host with one cohort resting in ``state``, its branch of visible size; an ended one at its end."""
    rig = attach(model or Pair())
    rig.train(2)
    if state is S.DORMANT:
        return rig, None
    cohort = rig.germinate(start="negative_gradient")
    assert cohort.state is S.GERMINATED
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    for passed in PATH:
        if state is cohort.state or (state in (S.CULLED, S.CANCELLED, S.ROLLED_BACK) and cohort.state is S.EVALUATING):
            break
        kasmina.move(cohort, passed, step)
        if passed is S.GRAFTING:
            kasmina.drop_captures(cohort)
            kasmina.graft(cohort)
            kasmina.set_alpha(cohort, ALPHA)
            for site in cohort.sites:
                make_visible(rig.bank(cohort, site))
    if state is S.FOSSILIZED:
        kasmina.fossilise(cohort, step, rig.grower.clock.hosts)
    elif state in (S.CULLED, S.CANCELLED, S.ROLLED_BACK):
        rig.grower.stages.end(cohort, state, step, "test")
    else:
        kasmina.set_paused(cohort, True, step)
    return rig, cohort


def make_visible(bank: Any) -> None:
    source = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in bank.params.values():
            value.copy_(0.5 * torch.randn(value.shape, generator=source))


def keep_visible(rig: Rig, site: str, width: int) -> None:
    """Make a visible branch at a site permanent, without its gates."""
    kasmina = rig.grower.kasmina
    cohort = rig.germinate(site, width=width)
    step = rig.grower.clock.steps
    kasmina.move(cohort, S.GRAFTING, step)
    kasmina.graft(cohort)
    make_visible(rig.bank(cohort, site))
    kasmina.set_alpha(cohort, 1.0)
    for state in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
        kasmina.move(cohort, state, step)
    x = rig.batches[4][0]
    with torch.no_grad():
        before = rig.model(x)
        kasmina.fossilise(cohort, step, rig.grower.clock.hosts)
        torch.testing.assert_close(rig.model(x), before, rtol=1e-4, atol=1e-5)


def host_of(model: nn.Module) -> nn.Module:
    """A copy without any hook."""
    plain = copy.deepcopy(model)
    strip(plain)
    for parameter in plain.parameters():
        parameter.grad = None
    return plain


def delta(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The branch written out by hand for one seed."""
    return F.linear(F.gelu(F.linear(x, params["w1"][0], params["b1"][0])), params["w2"][0])


def graft(rig: Rig, *sites: str, alpha: float = 0.5) -> Cohort:
    """A cohort in GRAFTING, paused, with a branch of visible size."""
    cohort = rig.germinate(*sites)
    rig.until(cohort, S.GRAFTING)
    rig.grower.kasmina.set_alpha(cohort, alpha)
    rig.grower.kasmina.set_paused(cohort, True, rig.grower.clock.steps)
    source = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for site in cohort.sites:
            for value in rig.bank(cohort, site).params.values():
                value.copy_(0.5 * torch.randn(value.shape, generator=source))
    return cohort


def branch_gradients(rig: Rig, cohort: Cohort) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for site in cohort.sites:
        for name, value in rig.bank(cohort, site).params.items():
            assert value.grad is not None, f"{site}.{name} was to get a gradient"
            found[f"{site}.{name}"] = value.grad.clone()
            value.grad = None
    return found


def host_gradients(rig: Rig) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in rig.model.named_parameters() if p.grad is not None}


def assert_gone(rig: Rig, cohort: Cohort) -> None:
    """The host computes what it would alone, nothing is held, and the chunks rest."""
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    host = host_of(rig.model)
    x = rig.batches[3][0]
    for module in (rig.model, host):
        module.zero_grad()
    out, alone = rig.model(x), host(x)
    assert same_bits(out, alone)
    out.sum().backward()
    alone.sum().backward()
    gradients = [(p.grad, q.grad) for p, q in zip(rig.model.parameters(), host.parameters(), strict=True)]
    assert all(one is not None and two is not None and same_bits(one, two) for one, two in gradients)
    rig.optimizer.zero_grad()
    assert kasmina.cohorts == {} and kasmina.live_banks == []
    assert all(not s.grafted and s.capture is None and s.annex is None for s in kasmina.sites.values())
    assert len(kasmina.table.occupied()) == 0 and (kasmina.table.owner == -1).all()
    assert (kasmina.table.embargo_until > step).all(), "its chunks were to rest"
    assert kasmina.params == sum(p.numel() for p in rig.model.parameters())
    assert [verdict.cohort for verdict in rig.grower.verdicts] == [cohort.number]
    gate = apply(rig.grower, Germinate(seeds=(SeedPlan(site="fc1-fc2"),)), step, issuer="test")
    assert not gate.passed
    later = step + QUICK["graft"].embargo + 1  # type: ignore[attr-defined]
    assert len(kasmina.table.free_chunks(0, later)) == kasmina.table.owner.size


def guard(grower: esper.Grower) -> None:
    """What a decision point does about numbers that are not finite, now."""
    grower.guard.look(grower.clock.steps, grower.guard.ask(sensors=False))
