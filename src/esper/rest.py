"""Steps without work. While nothing of Esper is alive a step is counted and its loss kept, and that is all.

A training step of a small network takes less than a millisecond: what must be asked before it is known that there is
nothing to do is asked once, and again when something has changed.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from esper import decision
from esper.kasmina.host import read_loss
from esper.orders import Orders
from esper.trials import Trials


class Watch(decision.Watch, Protocol):
    """Takes in losses as well: the guard, seen from here."""

    def note(self, loss: Tensor | float) -> None: ...


class Run(decision.Run, Protocol):
    """What could be at work: a grower, seen from here."""

    trials: Trials

    @property
    def guard(self) -> Watch: ...


class Rest:
    """From the step after which nothing was alive, for as long as that is so.

    Attributes
    ----------
    due:
        First step in which something is to be done nevertheless, in it or to prepare the next one.
    """

    def __init__(self, run: Run, orders: Orders) -> None:
        self._run, self._orders = run, orders
        self._clock, self._loop, self._kasmina = run.clock, run.loop, run.kasmina
        self._note, self._spent = run.guard.note, run.accounts.ledger.spent
        self._changes, self._watcher = run.kasmina.num_changes, run.watcher
        self.plan(run.loop.last_step)

    @staticmethod
    def of(run: Run, orders: Orders) -> Rest | None:
        """``None`` where anything is alive, or could be changed by what is still to come of earlier steps."""
        if run.kasmina.is_dormant and orders.is_empty and run.guard.is_calm and not run.trials.are_open:
            return None if run.clock.has_scaler else Rest(run, orders)
        return None

    def plan(self, step: int) -> None:
        """``step`` is done: find out when there is something to do again."""
        run, interval = self._run, self._run.config.interval
        coming = step - step % interval + interval
        turns = range(run.config.telemetry.next_due(step), coming + 1, run.config.telemetry.every)
        sensing = next((turn for turn in turns if decision.senses(run, turn)), None)
        is_blind = decision.is_blind(run, coming)
        if sensing is not None:
            self.due = max(step + 1, sensing - 1)
        else:
            self.due = max(step + 1, coming if is_blind else coming - 1)
        self._flops = run.accounts.host_step_flops
        if coming == step + 1 and not is_blind:
            self._clock.rouse()
        else:
            self._clock.rest()

    @property
    def holds(self) -> bool:
        """Whether nothing has changed since it began."""
        run = self._run
        return (
            run.kasmina.num_changes == self._changes and self._orders.is_empty and run.loop.last_step == run.clock.steps
        )

    def counts(self, step: int, loss: Tensor | float) -> bool:
        """Count a real step, unless something has come to life; FLOPs of one that is :attr:`due` are not booked."""
        clock, loop = self._clock, self._loop
        if self._kasmina.num_changes != self._changes or not self._orders.is_empty:
            return False
        if self._run.watcher is not self._watcher:
            return False  # somebody looks from now on, or nobody any more
        if not clock.rests and (clock.backwards_since_step or clock.has_scaler):
            return False
        loop.last_step, loop.calls_without_step, loop.skipped = step, 0, 0
        value = read_loss(loss)
        loop.losses.append(value)
        self._note(value)
        if step < self.due:
            self._spent["host"] += self._flops
        return True
