"""On a GPU: no training step waits for the device, and CUDA graphs hold (``make test-gpu``)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.models import CONV, DEVICE, MLP, TRANSFORMER, Task, mse, same_bits
from tests.rigs import EVERY, QUICK, Rig, attach
from torch import nn

import esper
from esper.kasmina import memory
from esper.kasmina.ops import dispatch
from esper.protocol import Lifecycle

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(DEVICE.type != "cuda", reason="runs on a GPU: make test-gpu"),
]
INTERVAL = 20
AFTER_TRAINING = (
    Lifecycle.GRAFTING, Lifecycle.STABILIZATION, Lifecycle.EVALUATING, Lifecycle.FINE_TUNING,
)  # fmt: skip
TASKS = pytest.mark.parametrize("task", [MLP, CONV, TRANSFORMER], ids=str)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever would wait for the device raises."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype", category=UserWarning)  # said of the mode itself
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rig_for(task: Task, batches: int = 4) -> Rig:
    return attach(
        task.build(), batches=task.batches(10), held_out=task.batches(16, seed=7), interval=INTERVAL, telemetry=EVERY,
        capture=esper.CaptureConfig(batches=batches, rows=4096, timeout=10_000, max_age=10_000),
        graft=replace(QUICK["graft"], ramp_steps=200, timeout=400),
    )  # fmt: skip


def between_decisions(rig: Rig) -> None:
    """Train up to a decision, then nearly to the next without waiting once."""
    rig.train(INTERVAL - rig.turn % INTERVAL + 1)
    torch.cuda.synchronize()
    with no_waiting():
        rig.train(INTERVAL - 3)


def test_the_check_itself_notices() -> None:
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.zeros((), device=DEVICE).item()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("operation", dispatch.OPERATIONS)
def test_kernels_are_taken_whatever_precision_the_host_has_chosen(operation: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        importlib.import_module(f"esper.kasmina.ops.{operation}.agreement").check(DEVICE)
    finally:
        torch.set_float32_matmul_precision(before)


@TASKS
def test_dormant_with_telemetry_every_step(task: Task) -> None:
    between_decisions(rig_for(task))


@TASKS
@pytest.mark.parametrize("has_grown", [False, True])
def test_a_dormant_decision_waits_once(task: Task, has_grown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but one event is waited for, from well before the decision until well after it, and that was recorded
    at the end of the step before: the device has the decision's own step to work on meanwhile."""
    rig = rig_for(task)
    if has_grown:
        site = next(info.name for info in rig.grower.sites() if info.kind.is_span)
        cohort = rig.germinate(site, start="random_zero")
        step = rig.grower.clock.steps
        for state in AFTER_TRAINING:
            rig.grower.kasmina.move(cohort, state, step)
            if state is Lifecycle.GRAFTING:
                rig.grower.kasmina.graft(cohort)
        rig.grower.kasmina.fossilise(cohort, step, rig.grower.clock.hosts)
    rig.train(2 * INTERVAL - 4 - rig.grower.clock.steps % INTERVAL)
    recorded: list[tuple[int, torch.cuda.Event]] = []
    waits: list[tuple[int, torch.cuda.Event]] = []
    record, wait = torch.cuda.Event.record, torch.cuda.Event.synchronize

    def noted(event: torch.cuda.Event, stream: torch.cuda.Stream | None = None) -> None:
        recorded.append((rig.grower.clock.steps, event))
        record(event, stream)

    def counted(event: torch.cuda.Event) -> None:
        waits.append((rig.grower.clock.steps, event))
        wait(event)

    monkeypatch.setattr(torch.cuda.Event, "record", noted)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", counted)
    torch.cuda.synchronize()
    with no_waiting():
        rig.train(8)
    assert rig.grower.clock.steps // INTERVAL == (rig.grower.clock.steps - 8) // INTERVAL + 1
    decided = rig.grower.clock.steps // INTERVAL * INTERVAL
    assert [step for step, _ in recorded] == [decided - 1] and [step for step, _ in waits] == [decided]
    assert recorded[0][1] is waits[0][1] and not rig.grower.kasmina.cohorts
    seen = next(iter(rig.grower.kasmina.sites.values())).telemetry
    assert seen is not None and seen.latest is not None and bool((seen.latest[:2] == seen.latest[:2]).all())


@TASKS
def test_capturing(task: Task) -> None:
    rig = rig_for(task, batches=100)
    cohort = rig.germinate(start="negative_gradient")
    between_decisions(rig)
    assert cohort.state in (Lifecycle.GERMINATED, Lifecycle.TRAINING)
    captures = [site.capture for site in rig.grower.kasmina.sites.values()]
    assert all(capture is not None and capture.filled > INTERVAL for capture in captures)


@TASKS
def test_grafting(task: Task) -> None:
    rig = rig_for(task)
    cohort = rig.until(rig.germinate(start="negative_gradient"), Lifecycle.GRAFTING)
    between_decisions(rig)
    assert cohort.state is Lifecycle.GRAFTING


@TASKS
def test_cuda_graphs(task: Task) -> None:
    """``mode="reduce-overhead"`` replays a hooked model with what it computes eagerly, before and after a graft."""
    rig = rig_for(task)
    compiled = torch.compile(rig.model.eval(), mode="reduce-overhead")
    x, _ = rig.batches[0]

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            results = [compiled(x).clone() for _ in range(4)]
            assert all(same_bits(results[-1], result) for result in results[1:])
            return rig.model(x), results[-1]

    plain, replayed = both()
    torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)
    rig.model.train()
    rig.until(rig.germinate(start="negative_gradient"), Lifecycle.GRAFTING)
    rig.train(30)
    rig.model.eval()
    grafted, replayed = both()
    assert not torch.equal(grafted, plain)
    torch.testing.assert_close(replayed, grafted, rtol=1e-4, atol=1e-5)


def test_training_with_cuda_graphs() -> None:
    """A compiled, graph-replayed training step takes the course of the eager one."""
    ends = []
    for compile_it in (False, True):
        torch.manual_seed(3)
        rig = rig_for(MLP)
        model = torch.compile(rig.model, mode="reduce-overhead") if compile_it else rig.model
        losses = []
        for x, wanted in rig.batches * 6:
            torch.compiler.cudagraph_mark_step_begin()
            loss = mse(model, (x, wanted))
            loss.backward()
            rig.optimizer.step()
            rig.optimizer.zero_grad()
            rig.grower.step(loss)
            losses.append(float(loss.detach()))
        ends.append(torch.tensor(losses))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


def test_copies_that_lie_in_the_cpus_memory_are_pinned_and_nobody_waits_for_them() -> None:
    value = torch.randn(1 << 20, device=DEVICE)
    expected = value.cpu()
    with no_waiting():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        parked = memory.Parked([value])
        value.zero_()
        assert torch.cuda.max_memory_allocated() == held
    parked.wait()
    assert parked.copies[0].is_pinned() and same_bits(parked.copies[0], expected)


def test_branches_that_compute_again_keep_no_hidden_unit() -> None:
    def kept(recompute: bool | None) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 1024), nn.GELU(), nn.Linear(1024, 64)).to(DEVICE)
        batches = [(torch.randn(4096, 64, device=DEVICE), torch.randn(4096, 64, device=DEVICE)) for _ in range(2)]
        held_out = [(x[:64], wanted[:64]) for x, wanted in batches * 8]
        rig = attach(model, batches=batches, held_out=held_out, graft=replace(QUICK["graft"], recompute=recompute))
        rig.until(rig.germinate(width=1024), Lifecycle.GRAFTING)
        before = torch.cuda.memory_allocated()
        loss = mse(model, batches[0])
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        return held

    hidden = 4096 * 1024 * 4
    assert kept(False) - kept(True) >= 2 * hidden, "before and behind the activation"
    assert kept(None) == kept(True), "on a GPU it is the default"
