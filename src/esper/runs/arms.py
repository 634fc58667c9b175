"""Train one arm once: the grown network, or one of its controls, from a seed and a learning rate."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn

from esper.config import Config
from esper.grower import Grower
from esper.kasmina.isolation import undisturbed
from esper.kasmina.ledger import forward_flops
from esper.protocol import AnyEvent, ArmFinished, Germinated, HeldOut, Lifecycle, TrainLoss, Transitioned
from esper.runs.hosts import widen
from esper.runs.interrupt import obey
from esper.runs.options import RunOptions
from esper.runs.preset import Preset
from esper.runs.presets import make_preset
from esper.settings import with_settings
from esper.tamiyo import ScheduleController

ARMS = ("grown", "static_small", "static_final", "static_equal_flops", "random_growth")
Emit = Callable[[AnyEvent], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training to do. ``widths`` are the host's inner widths; ``schedule`` is what a growing control repeats."""

    arm: str
    seed: int
    lr: float
    steps: int
    widths: tuple[int, ...]
    options: RunOptions
    device: str
    size: str
    schedule: tuple[Germinated, ...] = ()


@dataclass
class Trained:
    """What a training left behind. ``weights`` are those of the plain network (grown layers merged); a training that
    diverged (``held_out`` is not finite) has none."""

    cell: Cell
    held_out: float
    params: int
    flops: float
    seconds: float
    widths: tuple[int, ...]
    flops_parts: dict[str, float] = field(default_factory=dict[str, float])
    cohorts: dict[str, int] = field(default_factory=dict[str, int])
    stopped: str | None = None
    kept: tuple[Germinated, ...] = ()
    events: list[AnyEvent] = field(default_factory=list[AnyEvent])
    weights: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    layers: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    score: float = float("nan")
    loss: float = float("nan")


def load_preset(options: RunOptions, device: str, size: str) -> Preset:
    return make_preset(options.preset, torch.device(device), size=size, data=options.data)


def train(cell: Cell, preset: Preset, emit: Emit) -> Trained:
    """Train one cell. Deterministic by seed on the CPU: model, batches and Esper's streams follow from it."""
    torch.manual_seed(cell.seed)
    model = preset.host(cell.widths).to(preset.device)
    optimizer = preset.optimizer(model, cell.lr)
    events: list[AnyEvent] = []

    def record(event: AnyEvent) -> None:
        tagged = _tagged(event, cell)
        events.append(tagged)
        emit(tagged)

    started = time.perf_counter()
    grower = _grower(cell, preset, model, optimizer, record)
    flops = _loop(cell, preset, model, optimizer, grower, record)
    if grower is not None:
        grower.finish()
    seconds = time.perf_counter() - started
    held_out = _mean_loss(preset, model, preset.held_out())
    trained = Trained(
        cell=cell, held_out=held_out, params=_params(model, grower),
        flops=grower.ledger.total if grower is not None else flops, seconds=seconds,
        widths=_final_widths(cell, grower), events=events,
    )  # fmt: skip
    if not math.isfinite(held_out):  # diverged: there is no network to export, and the next rate may do better
        return trained
    plain = model
    if grower is not None:
        plain = _add_growth(trained, grower, events)
    trained.weights = {name: value.detach().cpu().clone() for name, value in plain.state_dict().items()}
    return trained


def score(trained: Trained, preset: Preset) -> ArmFinished:
    """Score the plain network on the test split: once, and only for the learning rate that was chosen."""
    cell = trained.cell
    model = widen(preset.host(cell.widths), trained.layers)
    model.load_state_dict(trained.weights, strict=True)
    model.to(preset.device)
    with undisturbed(model):
        trained.score, trained.loss = preset.test(model)
    return ArmFinished(
        step=cell.steps, arm=cell.arm, seed=cell.seed, score=trained.score, score_name=preset.score_name,
        loss=trained.loss, params=trained.params, flops=trained.flops, seconds=trained.seconds, lr=cell.lr,
        widths=preset.describe_widths(trained.widths),
    )  # fmt: skip


class _ByStep:
    """Tells the grower that batches and learning rates follow from the step alone, so that they go back with it."""

    rewinds = True

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def _loop(
    cell: Cell, preset: Preset, model: nn.Module, optimizer: torch.optim.Optimizer, grower: Grower | None, record: Emit
) -> float:
    """The user's own training loop; returns the FLOPs of a static arm."""
    held = preset.held_out()
    per_step = 0.0
    if grower is None:
        batch = preset.train_batch(cell.seed, 0)
        with undisturbed(model):
            per_step = 3.0 * forward_flops(model, lambda: preset.loss(model, batch))
    step = 0
    while step < cell.steps:
        obey()
        for group in optimizer.param_groups:
            group["lr"] = cell.lr * preset.schedule(step / cell.steps)
        batch = preset.train_batch(cell.seed, step)
        loss = _train_step(preset, model, optimizer, batch)
        step += 1
        if grower is not None:
            grower.step(loss, batch=batch)
            step = grower.clock.steps  # behind what was just done, where the grower has taken the training back
        elif step % preset.held_out_every == 0:
            spent = per_step * step
            record(TrainLoss(step=step, loss=float(loss.detach()), flops=spent))
            value = _mean_loss(preset, model, held[:: max(1, len(held) // 8)])
            record(HeldOut(step=step, loss=value, params=_params(model, None), flops=spent))
    return per_step * cell.steps


def _train_step(preset: Preset, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> torch.Tensor:
    loss = preset.loss(model, batch)
    loss.backward()
    preset.clip(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def _grower(
    cell: Cell, preset: Preset, model: nn.Module, optimizer: torch.optim.Optimizer, record: Emit
) -> Grower | None:
    if cell.arm.startswith("static"):
        return None
    config = configure(preset.config(cell.steps), cell.options, cell.seed)
    controller = None
    if cell.arm == "random_growth":
        controller = ScheduleController.replay(cell.schedule, start="random_zero")
        config = dataclasses.replace(config, evidence=dataclasses.replace(config.evidence, accept="always"))
    return Grower(
        model, optimizer, loss=preset.loss, evaluate=preset.held_out(), config=config, controller=controller,
        train_step=functools.partial(_train_step, preset), on_event=record, track=[_ByStep()],
    )  # fmt: skip


def configure(config: Config, options: RunOptions, seed: int) -> Config:
    """The preset's settings with what the user asked for on top."""
    tamiyo = config.tamiyo
    if options.temper is not None:
        tamiyo = dataclasses.replace(tamiyo, temper=options.temper)
    if options.controller is not None:
        tamiyo = dataclasses.replace(tamiyo, controller=options.controller)
    if options.growth is not None:
        tamiyo = dataclasses.replace(tamiyo, growth=options.growth)
    fit = config.fit if options.start is None else dataclasses.replace(config.fit, start=options.start)
    budget = config.budget
    if options.budget_params is not None:
        budget = dataclasses.replace(budget, params=options.budget_params)
    config = dataclasses.replace(config, tamiyo=tamiyo, fit=fit, budget=budget, seed=seed)
    return with_settings(config, options.changed_settings())


def _add_growth(trained: Trained, grower: Grower, events: Sequence[AnyEvent]) -> nn.Module:
    verdicts = grower.verdicts
    kept = {e.cohort: frozenset(e.seeds) for e in events if isinstance(e, Transitioned) and _is_permanent(e)}
    germinated = [event for event in events if isinstance(event, Germinated)]
    count = {state: sum(v.state is state for v in verdicts) for state in Lifecycle}
    trained.cohorts = {
        "germinated": len(germinated),
        "accepted": count[Lifecycle.FOSSILIZED],
        "culled": count[Lifecycle.CULLED],
        "cancelled": count[Lifecycle.CANCELLED],
        "rolled_back": count[Lifecycle.ROLLED_BACK],
    }
    trained.kept = tuple(_only(event, kept[event.cohort]) for event in germinated if event.cohort in kept)
    trained.stopped = grower.stopped_because
    trained.flops_parts = dict(grower.ledger.spent)
    trained.layers = grower.export_structure()
    plain = grower.export()
    trained.params = _params(plain, None)  # a branch that folds into the host's own weight adds none
    return plain


def _is_permanent(event: Transitioned) -> bool:
    return event.target is Lifecycle.FOSSILIZED


def _only(event: Germinated, seeds: frozenset[int]) -> Germinated:
    """The seeds of a germination that became permanent (sites and seeds may be dropped on the way)."""
    rows = [row for row, seed in enumerate(event.seeds) if seed in seeds]
    fields = ("seeds", "sites", "blueprints", "starts", "widths", "chunks")
    return msgspec.structs.replace(event, **{name: tuple(getattr(event, name)[row] for row in rows) for name in fields})


def _final_widths(cell: Cell, grower: Grower | None) -> tuple[int, ...]:
    if grower is None:
        return cell.widths
    return tuple(grower.report().widths.values())


def _params(model: nn.Module, grower: Grower | None) -> int:
    return sum(p.numel() for p in model.parameters()) if grower is None else grower.kasmina.params


def _mean_loss(preset: Preset, model: nn.Module, batches: Sequence[Any]) -> float:
    with undisturbed(model):
        return sum(float(preset.loss(model, batch)) for batch in batches) / len(batches)


def _tagged(event: AnyEvent, cell: Cell) -> AnyEvent:
    return msgspec.structs.replace(event, arm=cell.arm, seed=cell.seed)


def equal_flops_widths(
    preset: Preset, flops: float, steps: int, small: Sequence[int], final: Sequence[int]
) -> tuple[int, ...]:
    """Inner widths between (or beyond) small and final whose training costs ``flops`` in as many steps.

    The nearest to it on the straight line between the two shapes, where the widths round up one after another.
    """
    batch = preset.train_batch(0, 0)

    def cost(widths: Sequence[int]) -> float:
        model = preset.host(widths).to(preset.device)
        with undisturbed(model):
            return 3.0 * steps * forward_flops(model, lambda: preset.loss(model, batch))

    low, high = 0.0, 2.0
    while cost(_between(small, final, high)) < flops and high < 64:  # fits and evidence outweigh a tiny network
        high *= 2
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(_between(small, final, middle)) < flops else (low, middle)
    below, above = _between(small, final, low), _between(small, final, high)
    steps_up = [above[:number] + below[number:] for number in range(len(below) + 1)]
    return min(dict.fromkeys(steps_up), key=lambda widths: abs(cost(widths) - flops))


def _between(small: Sequence[int], final: Sequence[int], t: float) -> tuple[int, ...]:
    return tuple(max(1, round(a + t * (b - a))) for a, b in zip(small, final, strict=True))
