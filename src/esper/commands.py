"""Judge and apply one command: the single place through which controllers and operators change a run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any, Protocol, TypeVar

import msgspec

from esper.accounts import Accounts
from esper.errors import CONTAINED, EsperError, contained
from esper.journal import Journal
from esper.kasmina.cohort import Cohort
from esper.kasmina.execution import Kasmina
from esper.kasmina.lifecycle import Gate, is_active
from esper.kasmina.strategies import STRATEGIES
from esper.protocol import (
    Cancel,
    Command,
    Cull,
    Germinate,
    Germinated,
    Lifecycle,
    Pause,
    Refused,
    Resume,
    RollBack,
    SetBudget,
    SetStrategy,
    Stop,
    Transitioned,
)
from esper.stages import Stages

T = TypeVar("T")


class Orders:
    """Commands that wait for the next step: from any thread, first come first served, none lost."""

    def __init__(self) -> None:
        self._waiting: deque[Command] = deque()
        self.applied: list[tuple[int, Command]] = []
        """Step and command, for as long as a snapshot from before could undo them."""
        self._lock = threading.Lock()

    def put(self, command: Command) -> None:
        with self._lock:
            self._waiting.append(command)

    def take(self, step: int) -> Command | None:
        """The oldest one, or ``None``; it is remembered as applied in ``step``."""
        with self._lock:
            if not self._waiting:
                return None
            self.applied.append((step, self._waiting.popleft()))
            return self.applied[-1][1]

    def forget(self, step: int | None) -> None:
        """Nothing before ``step`` will be undone (``None``: nothing at all)."""
        self.applied = [] if step is None else [entry for entry in self.applied if entry[0] > step]

    def undone(self, step: int) -> None:
        """Everything after ``step`` was undone: the commands since then wait again, before those that came later.

        What asked for the undoing itself does not.
        """
        with self._lock:
            again = [command for at, command in self.applied if at > step and not _undoes(command)]
            self._waiting.extendleft(reversed(again))
            self.applied = [entry for entry in self.applied if entry[0] <= step]

    def state(self) -> list[dict[str, Any]]:
        """What waits, as plain values."""
        with self._lock:
            return [msgspec.to_builtins(command) for command in self._waiting]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Let exactly the commands wait that :meth:`state` has told of."""
        commands = [msgspec.convert(plain, Command) for plain in state]
        with self._lock:
            self._waiting = deque(commands)


class Applied:
    """Commands that a snapshot could undo, as a part of what is stored with the snapshots."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    def state(self) -> list[list[Any]]:
        return [[step, msgspec.to_builtins(command)] for step, command in self._orders.applied]

    def restore(self, state: list[list[Any]]) -> None:
        self._orders.applied = [(step, msgspec.convert(plain, Command)) for step, plain in state]


def _undoes(command: Command) -> bool:
    return isinstance(command, RollBack) and command.exact


class Undo(Protocol):
    """Takes a graft back exactly: the guard, seen from here."""

    def take_back(self, cohort: Cohort, step: int, reason: str) -> Gate: ...


class Run(Protocol):
    """What a command can read and change: a grower, seen from here."""

    kasmina: Kasmina
    stages: Stages
    accounts: Accounts
    journal: Journal

    @property
    def guard(self) -> Undo: ...

    @property
    def stopped(self) -> str | None: ...

    def stop(self, reason: str) -> None: ...

    def set_budget(self, params: int | None, flops_share: float | None) -> None: ...


def apply(run: Run, command: Command, step: int, *, issuer: str) -> Gate:
    """Apply ``command`` or refuse it with a reason; a refusal is an event and changes nothing."""
    try:
        gate = _HANDLERS[type(command)](run, command, step)
    except EsperError as error:
        gate = Gate("validation", False, str(error))
    except CONTAINED as error:  # a blueprint or start of the user's, or no memory for it
        gate = Gate("failure", False, contained(error))
    if not gate.passed:
        kind = str(command.__struct_config__.tag)
        run.journal.emit(Refused(step=step, command=f"{kind} by {issuer}", gate=gate.name, reason=gate.reason))
    return gate


def _germinate(run: Run, command: Germinate, step: int) -> Gate:
    if run.stopped is not None:
        return Gate("stopped", False, f"growth has stopped: {run.stopped}")
    made = run.kasmina.germinate(
        command.seeds,
        step=step,
        host_flops=run.accounts.host_flops_per_step,
        budget_params=run.accounts.budget.params,
        budget_flops=run.accounts.budget_flops,
    )
    if isinstance(made, Gate):
        return made
    _announce(run, made, command.reason, step)
    return Gate("germination", True, "")


def _announce(run: Run, cohort: Cohort, reason: str, step: int) -> None:
    banks = {name: run.kasmina.sites[name].banks[cohort.number] for name in cohort.sites}

    def per_seed(values: Iterable[T]) -> tuple[T, ...]:
        counts = [len(member.slots) for member in cohort.members.values()]
        return tuple(chain.from_iterable(repeat(value, count) for value, count in zip(values, counts, strict=True)))

    run.journal.emit(
        Germinated(
            step=step, cohort=cohort.number, seeds=cohort.seed_ids, sites=per_seed(cohort.sites),
            blueprints=per_seed(bank.blueprint for bank in banks.values()),
            starts=per_seed(member.start for member in cohort.members.values()),
            widths=per_seed(bank.units for bank in banks.values()), added_params=cohort.added_params,
            reason="; ".join([reason, *cohort.notes]),
            chunks=tuple(run.kasmina.table.num_chunks[cohort.slots].tolist()),
        )
    )  # fmt: skip
    run.journal.emit(
        Transitioned(
            step=step, cohort=cohort.number, seeds=cohort.seed_ids, source=Lifecycle.DORMANT,
            target=Lifecycle.GERMINATED, alpha=0.0, reason="germination: slot, budget and embargo allow it",
        )
    )  # fmt: skip


def _active(run: Run, number: int) -> Cohort:
    cohort = run.kasmina.cohorts.get(number)
    if cohort is None or not bool(is_active(int(cohort.state))):
        alive = [c.number for c in run.kasmina.cohorts.values() if bool(is_active(int(c.state)))]
        raise EsperError(f"no active cohort has the number {number}; active: {alive or 'none'}")
    return cohort


def _ending(target: Lifecycle) -> Callable[[Run, Any, int], Gate]:
    def handle(run: Run, command: Any, step: int) -> Gate:
        run.stages.end(_active(run, command.cohort), target, step, command.reason)
        return Gate("command", True, "")

    return handle


def _roll_back(run: Run, command: RollBack, step: int) -> Gate:
    cohort = _active(run, command.cohort)
    if command.exact:
        return run.guard.take_back(cohort, step, command.reason)
    run.stages.end(cohort, Lifecycle.ROLLED_BACK, step, command.reason)
    return Gate("command", True, "")


def _pausing(paused: bool) -> Callable[[Run, Any, int], Gate]:
    def handle(run: Run, command: Any, step: int) -> Gate:
        cohort = _active(run, command.cohort)
        if cohort.paused != paused:
            run.kasmina.set_paused(cohort, paused, step)
        return Gate("command", True, "")

    return handle


def _set_budget(run: Run, command: SetBudget, step: int) -> Gate:
    if command.params is not None and command.params < run.kasmina.host_params:
        return Gate(
            "budget",
            False,
            f"budget.params must be at least the host's {run.kasmina.host_params}, got {command.params}; raise it",
        )
    if command.flops is not None and command.flops < 1:
        return Gate(
            "budget", False, f"budget.flops must be at least 1 (the host itself), got {command.flops}; raise it"
        )
    run.set_budget(command.params, command.flops)
    return Gate("command", True, "")


def _set_strategy(run: Run, command: SetStrategy, step: int) -> Gate:
    STRATEGIES[command.strategy]
    cohort = _active(run, command.cohort)
    cohort.strategy = command.strategy
    cohort.memory.clear()
    run.kasmina.table.strategy[cohort.slots] = STRATEGIES.code(command.strategy)
    return Gate("command", True, "")


def _stop(run: Run, command: Stop, step: int) -> Gate:
    run.stop(command.reason)
    return Gate("command", True, "")


_HANDLERS: dict[type, Callable[[Run, Any, int], Gate]] = {
    Germinate: _germinate,
    Cull: _ending(Lifecycle.CULLED),
    Cancel: _ending(Lifecycle.CANCELLED),
    RollBack: _roll_back,
    Pause: _pausing(True),
    Resume: _pausing(False),
    SetBudget: _set_budget,
    SetStrategy: _set_strategy,
    Stop: _stop,
}
