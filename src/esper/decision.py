"""What is measured, observed and told at a decision point, before anything is decided."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from esper.accounts import Accounts
from esper.config import Config
from esper.errors import CONTAINED, contained
from esper.evidence.judge import Judge
from esper.journal import Journal
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock, stacked
from esper.kasmina.reading import Reading
from esper.observation import Frame, prepare
from esper.protocol import HeldOut, Observation
from esper.stages import Stages
from esper.state import Loop
from esper.tamiyo import Controller
from esper.tamiyo.registry import waits_of


class Watch(Protocol):
    """Reads losses and damage: the guard, seen from here."""

    @property
    def is_calm(self) -> bool: ...

    def ask(self, *, sensors: bool) -> Reading: ...


class Run(Protocol):
    """What a decision looks at: a grower, seen from here."""

    config: Config
    clock: HostClock
    kasmina: Kasmina
    judge: Judge
    stages: Stages
    accounts: Accounts
    journal: Journal
    loop: Loop
    watcher: Callable[[Observation], None] | None
    controller: Controller

    @property
    def guard(self) -> Watch: ...


def is_needed(run: Run, step: int) -> bool:
    """Whether the controller has to look at a decision point, unless growth is paused."""
    if run.loop.stopped is not None:
        return False
    waits = waits_of(run.controller)
    return (
        waits is None
        or bool(run.kasmina.cohorts)
        or not waits(step, total_steps=run.config.total_steps, num_ended=run.stages.verdicts.ended.total())
    )


def is_deciding(run: Run, step: int) -> bool:
    """Whether the controller looks at a decision point, as things are."""
    return run.loop.paused is None and is_needed(run, step)


def is_blind(run: Run, step: int) -> bool:
    """Whether a decision point is left to the guard, which waits for nobody: nothing is alive or to be measured, nobody
    looks, and what the guard reads lies in the host's memory."""
    is_read = _is_wanted(run, is_deciding(run, step)) or run.kasmina.cohorts or _measures(run, step)
    return run.kasmina.is_on_cpu and not is_read


def senses(run: Run, step: int) -> bool:
    """Whether the sensors report in a step: it is their turn, and something is alive or what they say will be read.

    A decision at which the held-out loss is measured counts as a reader, for rows a step are counted with the sensors.
    """
    telemetry, interval = run.config.telemetry, run.config.interval
    if not telemetry.is_due(step):
        return False
    if run.kasmina.cohorts or not run.kasmina.at_rest or _is_wanted(run, needed=False):
        return True
    decisions = range(step - step % interval + interval, step + max(telemetry.every, interval) + 1, interval)
    return any(_measures(run, decision) or is_needed(run, decision) for decision in decisions)


@dataclass(frozen=True)
class Early:
    """A reading that was begun in the step before its decision. ``changes`` tells whether anything changed since."""

    reading: Reading
    changes: int


def foresee(run: Run, *, needed: bool) -> Early | None:
    """At the end of a step: begin to read what the next one decides on, while nothing is alive.

    Whoever waits for what the device computes last leaves it idle until the next step is launched. A reading that lies
    a step back has arrived, or does while the device has that step to work on. With nothing on trial a loss, or what
    the sensors say, may be a step old; with a cohort alive the guard must see everything. The state of a run tells
    which of both it is, and all that is read, so a run that goes on from here reads the same.
    """
    step = run.loop.last_step
    if step < 1 or (step + 1) % run.config.interval or run.kasmina.cohorts or not run.guard.is_calm:
        return None
    if is_blind(run, step + 1):
        return None
    with run.journal.timed("observe"):
        return Early(run.guard.ask(sensors=_is_wanted(run, needed)), run.kasmina.num_changes)


@dataclass(frozen=True)
class Glance:
    """What a decision point reads, on its way to the host.

    ``frame`` is what could be prepared meanwhile: only while nothing is alive and nothing is to be measured first, for
    then nothing comes between the guard's look and the controller's. ``changes`` tells whether anything did.
    """

    reading: Reading
    frame: Frame | None
    changes: int
    lr_share: float


def glance(run: Run, step: int, early: Early | None = None, *, needed: bool = True) -> Glance:
    """Begin to read everything at once, before anybody waits, and prepare while the device still works.

    What was begun ``early`` is taken if nothing has changed since; ``needed`` as for :func:`look`.
    """
    with run.journal.timed("observe"):
        is_calm = not run.kasmina.cohorts and not _measures(run, step)
        prepares = is_calm and _is_wanted(run, needed)
        if early is not None and early.changes == run.kasmina.num_changes:
            reading, frame = early.reading, None
        else:
            reading, frame = run.guard.ask(sensors=prepares), None
        prepares &= reading.has_sensors
        if is_calm:
            # what the sensors do next is known, and no forward pass comes before the next step
            run.kasmina.watch(senses(run, step + 1))
        if prepares:
            frame = prepare(run.kasmina, step=step, verdicts=run.stages.verdicts)
        return Glance(reading, frame, run.kasmina.num_changes, _lr_share(run.clock) if prepares else math.nan)


def look(run: Run, step: int, begun: Glance | None = None, *, needed: bool = True) -> Observation | None:
    """Measure the held-out loss where that is due, observe everything, and tell of it.

    What has ``begun`` is used if nothing has changed since. ``None`` where the observation is not ``needed`` for a
    decision and nobody else listens.
    """
    if _measures(run, step):
        with run.journal.timed("evidence"):
            measure_held_out(run, step)
    if not _is_wanted(run, needed):
        return None
    with run.journal.timed("observe"):
        losses, observation = _observe(run, step, begun)
    loss = losses[-1] if losses else math.nan
    flops = run.accounts.ledger.total
    run.journal.publish(observation, run.kasmina.cohorts.values(), loss=loss, flops=flops)
    if run.watcher is not None:
        with run.journal.timed("bus"):
            run.watcher(observation)
    return observation


def _measures(run: Run, step: int) -> bool:
    """Whether the held-out loss is due."""
    return step % run.config.held_out_every == 0 or math.isnan(run.loop.held_out_initial)


def _is_wanted(run: Run, needed: bool) -> bool:
    """Whether anybody is going to look at an observation."""
    return needed or run.journal.is_heard or run.watcher is not None


def measure_held_out(run: Run, step: int) -> None:
    """One point of the held-out curve; the first one is what gains are relative to."""
    try:
        loss = run.judge.held_out(run.config.evidence.held_out_batches)
    except CONTAINED as error:
        run.journal.warn("held-out", f"the held-out loss cannot be measured ({contained(error)}); check loss=", step)
        return
    run.stages.held_out = loss
    if math.isnan(run.loop.held_out_initial):
        run.loop.held_out_initial = loss
    run.journal.emit(HeldOut(step=step, loss=loss, params=run.kasmina.params, flops=run.accounts.ledger.total))


def _observe(run: Run, step: int, begun: Glance | None) -> tuple[list[float], Observation]:
    """The losses of the last steps, and the observation."""
    if begun is None or begun.frame is None or begun.changes != run.kasmina.num_changes:
        reading = Reading((), (), run.loop.losses, run.kasmina.readout)
        frame, lr_share = prepare(run.kasmina, step=step, verdicts=run.stages.verdicts), _lr_share(run.clock)
    else:
        reading, frame, lr_share = begun.reading, begun.frame, begun.lr_share
    losses = reading.window if run.loop.losses else []  # the guard forgets those of an incident
    observation = frame.complete(
        reading.blocks,
        total_steps=run.config.total_steps,
        held_out=run.stages.held_out,
        held_out_initial=run.loop.held_out_initial,
        host_flops=run.accounts.host_flops_per_step,
        budget_params=run.accounts.budget.params,
        budget_flops=run.accounts.budget_flops,
        stopped=run.loop.stopped,
        losses=recent_losses(losses),
        lr_share=lr_share,
        price=run.config.tamiyo.min_gain_per_cost,
    )
    return losses, observation


def recent_losses(losses: Sequence[Tensor | float]) -> tuple[float, float]:
    """Mean of the latest training losses, and their standard deviation as a share of it; NaN where unknown.

    Waits for the device.
    """
    if not losses:
        return math.nan, math.nan
    numbers = [loss for loss in losses if not isinstance(loss, Tensor)]
    known = len(numbers) == len(losses)
    values: list[float] = (array("f", numbers) if known else stacked(losses)).tolist()  # either rounds the same
    mean = sum(values) / len(values)
    if len(values) < 2 or mean == 0:
        return mean, math.nan
    squares = sum([(value - mean) ** 2 for value in values])
    return mean, math.sqrt(squares / (len(values) - 1)) / abs(mean)


def _lr_share(clock: HostClock) -> float:
    shares = [host.lr / host.peak_lr for host in clock.hosts.values() if host.peak_lr > 0]
    return sum(shares) / len(shares) if shares else math.nan
