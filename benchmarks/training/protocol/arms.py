"""What is compared. An arm is a training function, and what it takes from the grown training of the same seed.

A peer is one more arm: one file in ``benchmarks/training/peers`` that calls :func:`register_arm`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from benchmarks.training.protocol.cells import Cell, Outcome

from esper.errors import ConfigError
from esper.kasmina.isolation import undisturbed
from esper.kasmina.ledger import forward_flops
from esper.protocol import Fitted, Germinated, Judged
from esper.runs import arms as training
from esper.runs.options import RunOptions
from esper.runs.preset import Preset

Given = Mapping[str, Any]
GROWN = "grown"
SHORT = 0.75
"""Of the FLOPs of the final shape's training: what the arms with fewer steps may cost."""
SPENT, TRIES = 0.85, 3
"""Growing in fewer steps is tried again with another number of steps while it spends less than this share of what it
may, or more than all of it; so many times at most."""
JUDGED = (
    "step", "stage", "gain", "gain_low", "gain_high", "e_value", "e_threshold", "confirm_p", "accepted", "reason",
)  # fmt: skip
FITTED = ("step", "site", "start", "explained", "t_statistic")


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished training: what choices may see, and the test split's ``score`` and ``loss``, which they may not."""

    outcome: Outcome
    score: float
    loss: float


def nothing_given(preset: Preset, twin: Outcome, steps: int) -> Given:
    return {}


def applies_always(preset: Preset) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Arm:
    """``train(preset, cell, given)`` must be a function of a module: worker processes import it by name."""

    name: str
    title: str
    train: Callable[[Preset, Cell, Given], Result]
    follows_grown: bool = False
    """Whether it waits for the grown training of its seed, and :attr:`derive` reads what it takes from there."""
    derive: Callable[[Preset, Outcome, int], Given] = nothing_given
    """From the preset, the grown training and the number of steps: plain JSON, kept in the record."""
    applies: Callable[[Preset], bool] = applies_always
    requires: str | None = None
    """A package without which the arm cannot be trained here (its finished cells can still be summed up)."""
    priority: int = 9
    """Lower ones are started first: what others wait for, then what takes longest."""

    @property
    def can_train(self) -> bool:
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


ARMS: dict[str, Arm] = {}


def register_arm(arm: Arm) -> Arm:
    """Make an arm known by its name.

    Raises
    ------
    ConfigError
        When the name is taken or cannot stand in a file name.
    """
    if not arm.name.replace("_", "").isalnum() or not arm.name.islower():
        raise ConfigError(f"an arm's name must be of a-z, 0-9 and _, got {arm.name!r}; rename it")
    if arm.name in ARMS and ARMS[arm.name].train is not arm.train:
        raise ConfigError(f"arm names must differ, got {arm.name!r} twice; rename one")
    ARMS[arm.name] = arm
    return arm


# ----------------------------------------------------------------------------------------------------------------------
# Esper and its controls


def train_esper(preset: Preset, cell: Cell, given: Given) -> Result:
    """One arm of :mod:`esper.runs.arms`, scored at its end."""
    accept = ("evidence.accept=always",) if cell.arm == "always" else ()
    run = training.Cell(
        arm=cell.arm, seed=cell.seed, lr=cell.lr, steps=cell.steps,
        widths=tuple(given.get("widths", preset.small_widths)),
        options=RunOptions(settings=(*cell.settings, *accept)), device=str(preset.device), size=cell.size,
        schedule=tuple(msgspec.convert(event, Germinated) for event in given.get("schedule", ())),
    )  # fmt: skip
    trained = training.train(run, preset, _unheard)
    if math.isfinite(trained.held_out):
        training.score(trained, preset)
    judged = [event for event in trained.events if isinstance(event, Judged)]
    fitted = [event for event in trained.events if isinstance(event, Fitted)]
    outcome = Outcome(
        held_out=trained.held_out, flops=trained.flops, params=trained.params, seconds=trained.seconds,
        widths=tuple(trained.widths), flops_parts=trained.flops_parts, cohorts=trained.cohorts,
        stopped=trained.stopped, schedule=tuple(msgspec.to_builtins(event) for event in trained.kept),
        judged=tuple({key: msgspec.to_builtins(getattr(event, key)) for key in JUDGED} for event in judged),
        fitted=tuple({key: msgspec.to_builtins(getattr(event, key)) for key in FITTED} for event in fitted),
    )  # fmt: skip
    return Result(outcome=outcome, score=trained.score, loss=trained.loss)


def _unheard(event: object) -> None:
    """The records keep what is needed of events."""


def final_shape(preset: Preset, twin: Outcome, steps: int) -> Given:
    return {"widths": list(twin.widths)}


def equal_flops(preset: Preset, twin: Outcome, steps: int) -> Given:
    small, final = preset.small_widths, twin.widths
    if tuple(final) == tuple(small):  # nothing was kept, and there is no direction: widen evenly
        final = tuple(2 * width for width in small)
    return {"widths": list(training.equal_flops_widths(preset, twin.flops, steps, small, final))}


def schedule(preset: Preset, twin: Outcome, steps: int) -> Given:
    return {"schedule": list(twin.schedule)}


register_arm(Arm(name=GROWN, title="grown", train=train_esper, priority=0))
register_arm(Arm(name="always", title="grown, every cohort kept", train=train_esper, priority=1))
register_arm(Arm(name="static_small", title="small, no growth", train=train_esper, priority=5))
register_arm(
    Arm(
        name="static_final",
        title="final shape from the start",
        train=train_esper,
        follows_grown=True,
        derive=final_shape,
        priority=3,
    )
)
register_arm(
    Arm(
        name="static_equal_flops",
        title="fixed shape, same FLOPs",
        train=train_esper,
        follows_grown=True,
        derive=equal_flops,
        priority=4,
    )
)
register_arm(
    Arm(
        name="random_growth",
        title="random growth, same schedule",
        train=train_esper,
        follows_grown=True,
        derive=schedule,
        priority=2,
    )
)


# ----------------------------------------------------------------------------------------------------------------------
# Fewer steps: is the final shape's quality there for three quarters of its FLOPs?


def static_flops(preset: Preset, widths: Sequence[int], steps: int) -> float:
    """FLOPs of training a network that never grows."""
    model, batch = preset.host(widths).to(preset.device), preset.train_batch(0, 0)
    with undisturbed(model):
        return 3.0 * steps * forward_flops(model, lambda: preset.loss(model, batch))


def short_growth(preset: Preset, twin: Outcome, steps: int) -> Given:
    """What growing may cost, ``SHORT`` of the final shape's training, and the steps for it by what the twin's cost."""
    allowed = SHORT * static_flops(preset, twin.widths, steps)
    return {"steps": max(1, min(steps, int(steps * allowed / twin.flops))), "flops": allowed}


def short_training(preset: Preset, twin: Outcome, steps: int) -> Given:
    return {"widths": list(twin.widths), "steps": round(SHORT * steps)}


def train_shorter(preset: Preset, cell: Cell, given: Given, *, arm: str) -> Result:
    """An arm of Esper's over fewer steps; its schedules are those of a training of that length."""
    return train_esper(preset, replace(cell, arm=arm, steps=int(given["steps"])), given)


def grow_shorter(preset: Preset, cell: Cell, given: Given) -> Result:
    """Growing in as many steps as may cost ``given["flops"]``. What a step costs depends on what is grown, so their
    number is found by trying: the costs alone decide, and the longest training that keeps to them is the result."""
    allowed, steps = float(given["flops"]), int(given["steps"])
    tried: dict[int, Result] = {}
    while len(tried) < TRIES and steps not in tried:
        tried[steps] = result = train_shorter(preset, cell, {"steps": steps}, arm=GROWN)
        share = result.outcome.flops / allowed
        if SPENT <= share <= 1 or (share < 1 and steps == cell.steps):
            break
        within = [number for number, done in tried.items() if done.outcome.flops <= allowed]
        beyond = [number for number in tried if number not in within]
        lowest, highest = max(within, default=1), min(beyond, default=cell.steps + 1) - 1
        steps = max(lowest, min(highest, int(steps * (1 + SPENT) / 2 / share)))
    affordable = [number for number, done in tried.items() if done.outcome.flops <= allowed]
    return tried[max(affordable) if affordable else min(tried)]


register_arm(
    Arm(
        name="grown_short",
        title="grown, at 75% of the final shape's FLOPs",
        train=grow_shorter,
        follows_grown=True,
        derive=short_growth,
        priority=3,
    )
)
register_arm(
    Arm(
        name="static_final_short",
        title="final shape, at 75% of the steps",
        train=functools.partial(train_shorter, arm="static_final"),
        follows_grown=True,
        derive=short_training,
        priority=4,
    )
)
