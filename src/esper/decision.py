"""What is measured, observed and told at a decision point, before anything is decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from esper.accounts import Accounts
from esper.config import Config
from esper.errors import CONTAINED, contained
from esper.evidence.judge import Judge
from esper.journal import Journal
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock, stacked
from esper.observation import observe
from esper.protocol import HeldOut, Observation
from esper.stages import Stages
from esper.state import Loop


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


def look(run: Run, step: int, *, needed: bool = True) -> Observation | None:
    """Measure the held-out loss where that is due, observe everything, and tell of it.

    ``None`` where the observation is not ``needed`` for a decision and nobody else listens.
    """
    if step % run.config.held_out_every == 0 or math.isnan(run.loop.held_out_initial):
        with run.journal.timed("evidence"):
            measure_held_out(run, step)
    if not (needed or run.journal.is_heard or run.watcher is not None):
        return None
    with run.journal.timed("observe"):
        observation = _observe(run, step)
    loss = float(run.loop.losses[-1]) if run.loop.losses else math.nan
    flops = run.accounts.ledger.total
    run.journal.publish(observation, run.kasmina.cohorts.values(), loss=loss, flops=flops)
    if run.watcher is not None:
        with run.journal.timed("bus"):
            run.watcher(observation)
    return observation


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


def _observe(run: Run, step: int) -> Observation:
    return observe(
        run.kasmina,
        step=step,
        total_steps=run.config.total_steps,
        held_out=run.stages.held_out,
        held_out_initial=run.loop.held_out_initial,
        host_flops=run.accounts.host_flops_per_step,
        budget_params=run.accounts.budget.params,
        budget_flops=run.accounts.budget_flops,
        verdicts=run.stages.verdicts,
        stopped=run.loop.stopped,
        losses=recent_losses(run.loop.losses),
        lr_share=_lr_share(run.clock),
        price=run.config.tamiyo.min_gain_per_cost,
    )


def recent_losses(losses: Sequence[Tensor | float]) -> tuple[float, float]:
    """Mean of the latest training losses, and their standard deviation as a share of it; NaN where unknown.

    Waits for the device.
    """
    if not losses:
        return math.nan, math.nan
    values: list[float] = stacked(losses).tolist()
    mean = sum(values) / len(values)
    if len(values) < 2 or mean == 0:
        return mean, math.nan
    squares = sum([(value - mean) ** 2 for value in values])
    return mean, math.sqrt(squares / (len(values) - 1)) / abs(mean)


def _lr_share(clock: HostClock) -> float:
    shares = [host.lr / host.peak_lr for host in clock.hosts.values() if host.peak_lr > 0]
    return sum(shares) / len(shares) if shares else math.nan
