"""A decision point reads the device once, and sees bit for bit what a reading of one thing after another sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import CONV, TRANSFORMER, Pair, Task, mse
from tests.rigs import Rig, S, attach, hold, keep_visible
from torch.overrides import TorchFunctionMode

import esper
from esper import decision, grower, rest
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.defaults import default_blueprint
from esper.kasmina.reading import Reading
from esper.kasmina.telemetry import Readout, TelemetryBuffer
from esper.observation import NUM_PRESSING
from esper.protocol import SITE_FEATURES, Germinate, HeldOut, Observation, SeedPlan, TrainLoss

pytestmark = pytest.mark.integration

COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}
READS = ("cpu", "tolist", "item", "numpy", "__float__", "__int__", "__bool__", "__array__", "nonzero")


# ----------------------------------------------------------------------------------------------------------------------
# One reading


class Waits(TorchFunctionMode):
    """Notes every call that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS or (name == "to" and "cpu" in map(str, args[1:])):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def waits(rig: Rig) -> list[str]:
    """Calls that wait in the next ``grower.step``."""
    loss = mse(rig.model, rig.batches[rig.turn % len(rig.batches)])
    loss.backward()
    rig.optimizer.step()
    rig.optimizer.zero_grad()
    with Waits() as mode:
        rig.grower.step(loss)
    rig.turn += 1
    return mode.calls


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed from values that have arrived is no reading; losses stay where they are, as on a GPU."""
    monkeypatch.setattr(decision, "recent_losses", lambda _: (1.0, 0.1))
    for place in (grower, rest):
        monkeypatch.setattr(place, "read_loss", lambda loss: loss.detach().clone())


ONCE = ["cpu", "numpy"]
"""One copy and one look at it."""


@pytest.mark.parametrize("has_grown", [False, True])
@pytest.mark.parametrize("controller", [None, "heuristic"])
def test_a_dormant_decision_reads_once_and_other_steps_never(
    on_the_host: None, has_grown: bool, controller: str | None
) -> None:
    made = controller and esper.tamiyo.make_controller(controller, esper.TamiyoConfig(first=10_000))
    rig = attach(Pair(), controller=made)
    if has_grown:
        keep_visible(rig, "fc1-fc2", 3)
    rig.train(10 - rig.turn % 5)
    assert [waits(rig) for _ in range(5)] == [[]] * 3 + [ONCE, []], "begun a step early, and waited for in the decision"


def test_a_decision_beside_live_seeds_reads_twice(on_the_host: None) -> None:
    rig, _ = hold(S.GRAFTING)
    rig.train(5 - rig.grower.clock.steps % 5 + 4)
    assert waits(rig) == ONCE * 2, "losses and damage before anything moves, sensors afterwards"


def test_a_reading_is_of_its_moment() -> None:
    loss, later = torch.tensor(1.0), torch.tensor(2.0, dtype=torch.float64)
    buffer = TelemetryBuffer(np.arange(4), 8, torch.device("cpu"))
    buffer.statistics.copy_(torch.arange(6.0).view(2, 3))
    reading = Reading((), [loss], [loss, later], Readout([buffer]))
    loss.zero_()
    buffer.statistics.zero_()
    assert reading.losses == [1.0] and reading.window == [1.0, 2.0]
    assert buffer.latest is None
    ((numbers, block),) = reading.blocks
    assert numbers.tolist() == [0] and np.array_equal(block[0], buffer.latest, equal_nan=True)  # type: ignore[arg-type]
    assert np.array_equal(buffer.latest[:2], np.arange(6.0).reshape(2, 3))


def test_means_of_buffers_of_any_sizes_are_those_of_each_alone() -> None:
    sizes = [1, 768, 5, 768, 1024, 131, 5, 2049, 768]
    buffers = [TelemetryBuffer(np.arange(size + 1), 8, torch.device("cpu")) for size in sizes]
    source = torch.Generator().manual_seed(0)
    for buffer in buffers:
        buffer.statistics.copy_(torch.randn(buffer.statistics.shape, generator=source).exp())
        buffer.gradient_energy.copy_(torch.rand(buffer.gradient_energy.shape, generator=source))
    blocks = Reading((), (), (), Readout(buffers)).blocks
    alone = [_sensors(buffer) for buffer in buffers]
    for numbers, block in blocks:
        means = np.add.reduce(block, axis=2) / block.shape[2]
        assert np.array_equal(means, [np.add.reduce(alone[n], axis=1) / alone[n].shape[1] for n in numbers])
    assert sorted(number for numbers, _ in blocks for number in numbers) == list(range(len(sizes)))
    assert all(np.array_equal(buffer.latest, one) for buffer, one in zip(buffers, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_losses_keep_every_digit_they_were_computed_with(dtype: torch.dtype) -> None:
    losses = [torch.tensor(value, dtype=dtype) for value in (1 / 3, -0.0, 1e-40, math.inf, math.nan)]
    mixed = [*losses, 1 / 3, torch.tensor(0.1), torch.tensor(7), 1e300]
    reading = Reading((), mixed, mixed)
    wanted = [float(value) for value in mixed]
    assert np.array_equal(reading.window, wanted, equal_nan=True)
    rounded = [float(torch.as_tensor(value).to(torch.float32)) for value in mixed]
    assert np.array_equal(reading.losses, rounded, equal_nan=True)
    assert Reading((), (), ()).losses == [] and Reading((), (), ()).damage == {}


# ----------------------------------------------------------------------------------------------------------------------
# The same observation


def by_one_after_another(rig: Rig) -> dict[str, Any]:
    """The parts of an observation that depend on devices or are remembered between decisions, each read by itself."""
    kasmina, loop = rig.grower.kasmina, rig.grower.loop
    sites = kasmina.sites.values()
    snapshots = [_sensors(site.telemetry) for site in sites]
    rows = np.full((len(snapshots), 3), np.nan)
    for row, snapshot in enumerate(snapshots):
        rows[row] = np.add.reduce(snapshot, axis=1) / snapshot.shape[1]
    energies = np.concatenate([snapshot[2] for snapshot in snapshots])
    offsets = np.concatenate(([0], np.cumsum([snapshot.shape[1] for snapshot in snapshots])))
    order = np.argsort(-energies, kind="stable")
    order = order[np.isfinite(energies[order])][:NUM_PRESSING]
    site_of = np.searchsorted(offsets, order, side="right") - 1
    costs = [_cost(site, default_blueprint(site.info.kind)) for site in sites]
    per_step = np.array(list(kasmina.rows_per_step.values()))
    return {
        "sensors": rows,
        "chunk_site": site_of,
        "chunk_index": order - offsets[site_of],
        "chunk_pressure": energies[order].astype(np.float64),
        "train_loss": decision.recent_losses(loop.losses)[0],
        "loss_noise": decision.recent_losses(loop.losses)[1],
        "unit_params": np.array([cost.params for cost in costs], dtype=np.float64),
        "unit_flops": np.array([cost.flops_per_row for cost in costs]) * per_step,
        "grown": np.array([kasmina.units(name) for name in kasmina.sites]),
        "params": kasmina.params,
        "flops_per_step": rig.grower.accounts.host_flops_per_step + kasmina.added_flops_per_step(),
    }


READ = ("sensors", "chunk_site", "chunk_index", "chunk_pressure", "train_loss", "loss_noise")
"""What of it a reading brings: in a dormant run that of the end of the step before."""


def _sensors(telemetry: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.concatenate([telemetry.statistics.numpy(), telemetry.gradient_energy.numpy()[None]])


def _cost(site: Any, blueprint: str) -> Any:
    return BLUEPRINTS[blueprint].cost(site.geometry, units=1, columns=site.info.out_features, reads=site.reads)


def assert_same(seen: Observation, wanted: dict[str, Any]) -> None:
    columns = [COLUMN[name] for name in ("activation_mean", "activation_var", "gradient_energy")]
    stated = {**{field.name: getattr(seen, field.name) for field in fields(seen)}, "sensors": seen.sites[:, columns]}
    for name, value in wanted.items():
        assert np.array_equal(stated[name], value, equal_nan=True), name


@pytest.mark.parametrize("task", [CONV, TRANSFORMER], ids=str)
def test_every_observation_of_a_life_is_the_one_that_was_read_piece_by_piece(task: Task) -> None:
    rig = attach(
        task.build(), batches=task.batches(10), held_out=task.batches(16, seed=7), held_out_every=15, interval=3,
        sites=esper.SitesConfig(layers=True),
    )  # fmt: skip
    told: list[tuple[int, bool]] = []
    foresee, begun = rig.grower._foresee, dict[str, Any]()

    def note() -> None:
        foresee()
        begun.update(by_one_after_another(rig) if rig.grower._early is not None else dict.fromkeys(READ))

    def compare(observation: Observation) -> None:
        wanted = by_one_after_another(rig)
        has_measured = any(isinstance(event, HeldOut) and event.step == observation.step for event in rig.events)
        if begun[READ[0]] is not None and not observation.alive and not has_measured:
            wanted |= {name: begun[name] for name in READ}
        assert_same(observation, wanted)
        told.append((observation.step, bool(observation.alive)))

    rig.grower.watcher, rig.grower._foresee = compare, note  # type: ignore[method-assign]
    rig.train(12)
    spans = [info.name for info in rig.grower.sites() if info.kind.is_span]
    cohort = rig.germinate(*spans, start="negative_gradient")
    rig.until(cohort, S.GRAFTING)
    rig.grower.submit(esper.protocol.Cull(cohort=cohort.number, reason="test"))
    rig.train(20)
    assert not rig.grower.kasmina.cohorts and told[-1][1] is False
    assert [step for step, _ in told] == list(range(3, rig.grower.clock.steps + 1, 3))
    assert {alive for _, alive in told} == {False, True}
    seen = [site.telemetry.gradient_energy for site in rig.grower.kasmina.sites.values()]  # type: ignore[union-attr]
    assert any(bool(energy.isfinite().any()) for energy in seen), "pressing chunks were to be compared"
    seen[0].mul_(0.5)  # what is remembered of pressing chunks must not outlive a change of a single site
    seen[-1].fill_(7.0)
    rig.train(6)


def test_an_order_of_the_same_step_is_seen() -> None:
    rig = attach(Pair())
    looks: list[Observation] = []
    rig.grower.watcher = looks.append
    rig.train(14)
    rig.order(Germinate(seeds=(SeedPlan(site="fc1-fc2", width=3, start="random_zero"),)))
    assert looks[-1].step == 15 and looks[-1].alive[0].num_seeds == 1 and not looks[-1].eligible.any()


def test_losses_of_an_incident_are_forgotten_and_double_precision_is_told() -> None:
    rig = attach(Pair())
    rig.train(8)
    rig.grower.guard.note(math.nan)
    with pytest.warns(RuntimeWarning, match="not finite"):
        rig.train(2)
    told = [event for event in rig.events if isinstance(event, TrainLoss)]
    assert math.isnan(told[-1].loss)
    model = Pair().double()
    batches = [(x.double(), wanted.double()) for x, wanted in rig.batches]
    again = attach(model, batches=batches, held_out=batches * 2)
    again.train(10)
    (*_, last) = [event for event in again.events if isinstance(event, TrainLoss)]
    assert last.loss == again.grower.loop.losses[-2] != float(torch.tensor(last.loss).float())
