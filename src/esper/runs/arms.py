"""Train one arm once: the grown network, or one of its controls, from a seed and a learning rate."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import Counter
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
from esper.runs.cell_store import CellStore, decode_events
from esper.runs.hosts import widen
from esper.runs.interrupt import obey
from esper.runs.options import RunOptions
from esper.runs.preset import Preset
from esper.runs.presets import make_preset
from esper.safety.training import Training
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
    difference: dict[str, float] = field(default_factory=dict[str, float])
    """Of the plain network from the grown one: of the loss and of the output, relative."""
    score: float = float("nan")
    loss: float = float("nan")


def load_preset(options: RunOptions, device: str, size: str) -> Preset:
    return make_preset(options.preset, torch.device(device), size=size, data=options.data)


def train(cell: Cell, preset: Preset, emit: Emit, store: CellStore | None = None) -> Trained:
    """Train one cell. Deterministic by seed on the CPU: model, batches and Esper's streams follow from it.

    With a ``store`` the training is kept there now and then, and goes on from what is kept; its events are told from
    the first one on either way.
    """
    finished = None if store is None else store.finished
    if finished is not None:
        for event in finished["events"]:
            emit(event)
        return Trained(cell=cell, **finished)
    torch.manual_seed(cell.seed)
    model = preset.host(cell.widths).to(preset.device)
    optimizer = preset.optimizer(model, cell.lr)
    teller = _Teller(cell, emit)
    progress = None if store is None else store.progress
    teller.is_silent = progress is not None
    grower = _grower(cell, preset, model, optimizer, teller.tell)
    course = _Course(cell, preset, model, optimizer, grower, teller, store)
    if progress is not None:
        course.go_on_from(progress)
    flops = course.run()
    if grower is not None:
        grower.finish()
    held_out = _mean_loss(preset, model, preset.held_out())
    trained = Trained(
        cell=cell, held_out=held_out, params=_params(model, grower),
        flops=grower.ledger.total if grower is not None else flops, seconds=course.seconds,
        widths=_final_widths(cell, grower), events=teller.events,
    )  # fmt: skip
    if math.isfinite(held_out):  # else there is no network to export, and the next rate may do better
        plain = model if grower is None else _add_growth(trained, grower, teller.events)
        trained.weights = {name: value.detach().cpu().clone() for name, value in plain.state_dict().items()}
    if store is not None:
        store.finish(trained)
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


class _Teller:
    """Tags the events of a training and tells them; what was told before an interruption is told from memory."""

    def __init__(self, cell: Cell, emit: Emit) -> None:
        self._cell, self._emit = cell, emit
        self.events: list[AnyEvent] = []
        self.is_silent = False

    def tell(self, event: AnyEvent) -> None:
        if not self.is_silent:
            self.tell_again([_tagged(event, self._cell)])

    def tell_again(self, events: Sequence[AnyEvent]) -> None:
        """Events that have their tags."""
        for event in events:
            self.events.append(event)
            self._emit(event)


class _Course:
    """The user's own training loop, which can be left and entered again after any step."""

    def __init__(
        self, cell: Cell, preset: Preset, model: nn.Module, optimizer: torch.optim.Optimizer, grower: Grower | None,
        teller: _Teller, store: CellStore | None,
    ) -> None:  # fmt: skip
        self.cell, self.preset, self.model, self.optimizer, self.grower = cell, preset, model, optimizer, grower
        self.teller, self.store = teller, store
        self._first = 0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent on the training, in all processes that had it."""
        return time.perf_counter() - self._started

    def go_on_from(self, progress: Any) -> None:
        """Enter where :meth:`_keep` has left."""
        self._first = progress["step"]
        self._started = time.perf_counter() - progress["seconds"]
        if self.grower is not None:
            self.grower.load_state_dict(progress["training"])
        else:
            training = Training(self.model, [self.optimizer], ())
            training.check(progress["training"])
            training.restore(progress["training"])
        self.teller.is_silent = False
        self.teller.tell_again(decode_events(progress))

    def run(self) -> float:
        """Train to the end; returns the FLOPs of a static arm."""
        cell, preset, model = self.cell, self.preset, self.model
        held = preset.held_out()
        per_step = 0.0 if self.grower is not None else self._flops_per_step()
        step = self._first
        while step < cell.steps:
            obey()
            for group in self.optimizer.param_groups:
                group["lr"] = cell.lr * preset.schedule(step / cell.steps)
            batch = preset.train_batch(cell.seed, step)
            loss = _train_step(preset, model, self.optimizer, batch)
            step += 1
            if self.grower is not None:
                self.grower.step(loss, batch=batch)
                step = self.grower.clock.steps  # an earlier one, where the grower has taken the training back
            elif step % preset.held_out_every == 0:
                spent = per_step * step
                self.teller.tell(TrainLoss(step=step, loss=float(loss.detach()), flops=spent))
                value = _mean_loss(preset, model, held[:: max(1, len(held) // 8)])
                self.teller.tell(HeldOut(step=step, loss=value, params=_params(model, None), flops=spent))
            if self.store is not None and self.store.is_due():
                self._keep(self.store, step)
        return per_step * cell.steps

    def _keep(self, store: CellStore, step: int) -> None:
        if self.grower is not None:
            training = self.grower.state_dict()
        else:
            training = Training(self.model, [self.optimizer], ()).state()
        store.save(training, step=step, seconds=self.seconds, events=self.teller.events)

    def _flops_per_step(self) -> float:
        batch = self.preset.train_batch(self.cell.seed, 0)
        with undisturbed(self.model):
            return 3.0 * forward_flops(self.model, lambda: self.preset.loss(self.model, batch))


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
    kept = {e.cohort: frozenset(e.seeds) for e in events if isinstance(e, Transitioned) and _is_permanent(e)}
    germinated = [event for event in events if isinstance(event, Germinated)]
    count = Counter(grower.ended)
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
    assert grower.export_difference is not None
    measured = {f"{name}_difference": getattr(grower.export_difference, name) for name in ("loss", "output")}
    trained.difference = {name: value for name, value in measured.items() if math.isfinite(value)}
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
