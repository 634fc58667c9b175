"""Seeds that capture and train on their own leave the host as it is: bit for bit, whatever its training does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.models import CONV, DROPOUT_MLP, MLP, TASKS, TRANSFORMER, Task, assert_same_state, snapshot
from tests.rigs import Rig, adamw, attach, momentum_sgd, trajectory
from torch import nn

import esper
from esper.kasmina.incubator import fit
from esper.protocol import Fitted, Germinate, Lifecycle, Pause, Resume, SeedPlan

pytestmark = pytest.mark.integration


def joining(batches: int, start: str, layers: bool = False) -> Callable[..., Rig]:
    """Germinate a seed on every site in the first step."""

    def join(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> Rig:
        rig = attach(
            model, optimizer, held_out=task.batches(16, seed=7),
            sites=esper.SitesConfig(layers=layers, exclude=("*norm*",) if layers and task is CONV else ()),
            capture=esper.CaptureConfig(batches=batches, rows=4096, timeout=10_000, max_age=10_000),
        )  # fmt: skip
        # a scale and a shift, which is what norms grow, are not fitted
        seeds = tuple(SeedPlan(site=info.name, start=start, width=3) for info in rig.grower.sites())
        rig.grower.submit(Germinate(seeds=seeds))
        return rig

    return join


def hold_in_training(until: int) -> Callable[[Rig, int], None]:
    """Pause the cohort as soon as it is TRAINING; fit it at step ``until`` and stop before it takes effect."""
    seen: dict[str, object] = {}

    def each(rig: Rig, step: int) -> None:
        (cohort,) = rig.grower.kasmina.cohorts.values()
        if cohort.state is Lifecycle.TRAINING and "paused" not in seen:
            seen["paused"] = step
            rig.grower.kasmina.set_paused(cohort, True, step + 1)
        assert "paused" in seen or step < 10, "the captures were to fill up"
        for site in rig.grower.kasmina.sites.values():
            assert site.capture is not None and not site.adds
        if step == until:
            # what `Stages` does when a TRAINING cohort has its turn, but for the graft that follows
            gates = [rig.grower.stages.fitting.fit(cohort, name, step) for name in cohort.sites]
            assert all(gate.passed for gate in gates), [gate.reason for gate in gates]
            assert all(member.report.flops > 0 for member in cohort.members.values()), "the seeds were to be fitted"

    return each


SETTINGS = [
    pytest.param(task, optimizer, clip, bf16, id=f"{task}-{optimizer.__name__}-clip{clip}-{'bf16' if bf16 else 'fp32'}")
    for task, optimizer, clip, bf16 in [
        (MLP, adamw, None, False),
        (DROPOUT_MLP, adamw, 0.05, False),
        (DROPOUT_MLP, momentum_sgd, 0.05, True),
        (CONV, momentum_sgd, 0.05, False),
        (CONV, adamw, None, True),
        (TRANSFORMER, adamw, 0.05, False),
        (TRANSFORMER, momentum_sgd, None, True),
    ]
]


@pytest.mark.parametrize(("task", "optimizer", "clip", "bf16"), SETTINGS)
def test_200_steps_with_every_seed_training(
    task: Task, optimizer: Callable[..., torch.optim.Optimizer], clip: float | None, bf16: bool
) -> None:
    alone = trajectory(task, 200, optimizer=optimizer, clip=clip, bf16=bf16)
    join = joining(4, "negative_gradient")
    each = hold_in_training(150)
    trajectory(task, 200, join, optimizer=optimizer, clip=clip, bf16=bf16, each=each).assert_equals(alone)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_captures_that_go_on_for_the_whole_run(task: Task) -> None:
    def each(rig: Rig, step: int) -> None:
        (cohort,) = rig.grower.kasmina.cohorts.values()
        filled = [site.capture.filled for site in rig.grower.kasmina.sites.values() if site.capture is not None]
        assert cohort.state is Lifecycle.GERMINATED and filled == [step] * len(cohort.sites)

    alone = trajectory(task, 60, clip=0.5)
    trajectory(task, 60, joining(61, "reconstruction"), clip=0.5, each=each).assert_equals(alone)


@pytest.mark.parametrize("task", [MLP, CONV], ids=str)
def test_layer_sites_are_isolated_too(task: Task) -> None:
    alone = trajectory(task, 60)
    join = joining(4, "negative_gradient", layers=True)

    def span_only(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> Rig:
        rig = join(model, optimizer, task)
        assert any(not info.kind.is_span for info in rig.grower.sites())
        return rig

    trajectory(task, 60, span_only, each=hold_in_training(40)).assert_equals(alone)


@pytest.mark.parametrize("start", ["negative_gradient", "reconstruction"])
def test_a_fit_runs_in_its_own_step_and_changes_the_branch_alone(start: str) -> None:
    rig = attach(MLP.build())
    cohort = rig.germinate(start=start)
    rig.until(cohort, Lifecycle.TRAINING)
    weights = {name: p.clone() for name, p in rig.bank(cohort).params.items()}
    rig.order(Pause(cohort=cohort.number))
    assert all(torch.equal(p, weights[name]) for name, p in rig.bank(cohort).params.items())
    grads = [p.grad for p in rig.model.parameters()]
    before, stream = snapshot(rig.model), torch.get_rng_state()
    gate = rig.grower.stages.fitting.fit(cohort, cohort.sites[0], rig.grower.clock.steps)
    assert gate.name == "sanity"
    assert not torch.equal(rig.bank(cohort).params["w1"], weights["w1"])
    assert_same_state(before, snapshot(rig.model))
    assert [p.grad for p in rig.model.parameters()] == grads
    assert torch.equal(stream, torch.get_rng_state())
    assert [event.start for event in rig.events if isinstance(event, Fitted)] == [start]


def test_captured_rows_are_copies_of_what_the_host_saw() -> None:
    rig = attach(MLP.build(), capture=esper.CaptureConfig(batches=2, rows=32))
    rig.germinate("fc1-fc2", start="negative_gradient")
    capture = rig.grower.kasmina.sites["fc1-fc2"].capture
    assert capture is not None
    rig.grower.submit(Pause(cohort=1))
    x = rig.batches[rig.turn][0]
    kept = x.clone()
    rig.train()
    recorded, _, _, _ = capture._done[0]
    x.mul_(0)  # the user's buffer is used again for something else
    assert all((kept == row).all(1).any() for row in recorded)
    rig.train()
    found = capture.rows()
    assert found.g.shape == (32, 12) and found.batch.unique().numel() == 2
    for batch in (0, 1):
        assert float(found.g[found.batch == batch].square().mean().sqrt()) == pytest.approx(1.0, rel=1e-5)


def test_loss_scale_and_accumulation_do_not_change_what_is_captured() -> None:
    def captured(scale: float) -> torch.Tensor:
        torch.manual_seed(3)
        rig = attach(MLP.build(), capture=esper.CaptureConfig(batches=2, rows=32))
        rig.germinate("fc1-fc2", start="negative_gradient")
        rig.optimizer.param_groups[0]["lr"] = 0.0
        for batch in rig.batches[:2]:
            ((rig.model(batch[0]) - batch[1]).square().mean() * scale).backward()
        capture = rig.grower.kasmina.sites["fc1-fc2"].capture
        assert capture is not None
        return capture.rows().g

    torch.testing.assert_close(captured(65536.0), captured(1.0))


def test_a_non_finite_batch_is_dropped_from_the_rows() -> None:
    rig = attach(MLP.build(), capture=esper.CaptureConfig(batches=3, rows=48))
    rig.germinate("fc1-fc2", start="negative_gradient")
    capture = rig.grower.kasmina.sites["fc1-fc2"].capture
    assert capture is not None
    for number, (x, wanted) in enumerate(rig.batches[:3]):
        loss = (rig.model(x) - wanted).square().mean() * (float("inf") if number == 1 else 1.0)
        loss.backward()
    rows = capture.rows()
    assert capture.full and capture.dropped_batches == 1
    assert sorted(rows.batch.unique().tolist()) == [0, 2] and torch.isfinite(rows.g).all()


def test_a_fit_draws_from_the_generator_it_is_given(unchanged_rng: None) -> None:
    state = torch.get_rng_state()
    rig = attach(MLP.build(), capture=esper.CaptureConfig(batches=2, rows=32))
    cohort = rig.germinate("fc1-fc2", start="negative_gradient")
    rig.grower.submit(Resume(cohort=cohort.number))
    rig.train(2)
    capture = rig.grower.kasmina.sites["fc1-fc2"].capture
    assert capture is not None
    rows, bank = capture.rows(), rig.bank(cohort)
    first = {name: p.clone() for name, p in bank.params.items()}
    results = []
    for _ in range(2):
        for name, p in bank.params.items():
            p.detach().copy_(first[name])
        generator = torch.Generator().manual_seed(4)
        fit(bank, rows, -rows.g, steps=5, batch_rows=8, lr=1e-2, generator=generator)
        results.append(bank.params["w1"].detach().clone())
    torch.set_rng_state(state)
    assert torch.equal(*results) and not torch.equal(results[0], first["w1"])


def test_starts_without_a_fit_need_no_captures() -> None:
    rig = attach(MLP.build())
    cohort = rig.germinate(start="random_zero")
    assert cohort.state is Lifecycle.TRAINING
    assert all(site.capture is None for site in rig.grower.kasmina.sites.values())
