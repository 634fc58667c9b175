"""Judge and apply one command: the single place through which controllers and operators change a run."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from itertools import chain, repeat
from typing import Any, Protocol, TypeVar

from esper.accounts import Accounts
from esper.errors import CONTAINED, EsperError, contained
from esper.journal import Journal
from esper.kasmina.cohort import Cohort
from esper.kasmina.execution import Kasmina
from esper.kasmina.gates import Gate
from esper.kasmina.host import HostClock
from esper.kasmina.lifecycle import is_active
from esper.kasmina.strategies import STRATEGIES
from esper.orders import Keeping, Orders, checked
from esper.protocol import (
    Cancel,
    Command,
    Commanded,
    Cull,
    Germinate,
    Germinated,
    GrowthPaused,
    Lifecycle,
    Order,
    Pause,
    Refused,
    Resume,
    RollBack,
    SetBudget,
    SetStrategy,
    Snapshot,
    Stop,
    Transitioned,
)
from esper.stages import Stages
from esper.state import Loop

T = TypeVar("T")


class Desk(Protocol):
    """Where orders from outside wait: it writes them down before it hands them out."""

    @property
    def is_replaying(self) -> bool:
        """Whether orders of an earlier life are still to come."""
        ...

    def turn(self, step: int) -> Generator[Order, None, None]:
        """The orders to apply in this real step, one after another; each is answered before the next is taken."""
        ...

    def answer(self, order: Order, step: int, gate: Gate, *, hold: bool) -> None:
        """What became of one; with ``hold`` nobody is told before the next checkpoint."""
        ...

    def kept(self, refusal: str | None = None) -> None:
        """A checkpoint was written, or refused."""
        ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Undo(Protocol):
    """Takes a graft back exactly: the guard, seen from here."""

    def take_back(self, cohort: Cohort, step: int, reason: str) -> Gate: ...


class Run(Protocol):
    """What a command can read and change: a grower, seen from here."""

    kasmina: Kasmina
    clock: HostClock
    stages: Stages
    accounts: Accounts
    journal: Journal
    loop: Loop
    keeping: Keeping

    @property
    def guard(self) -> Undo: ...

    @property
    def stopped(self) -> str | None: ...

    def stop(self, reason: str) -> None: ...

    def set_budget(self, params: int | None, flops_share: float | None) -> None: ...


def obey(run: Run, orders: Orders, desk: Desk | None, step: int) -> None:
    """Apply what waits, until the run is taken back: first what was given again, then what comes over the desk."""
    while run.clock.steps == step and (order := orders.take(step)) is not None:
        gate = apply(run, order.command, step, issuer=order.issuer)
        if order.id:
            _tell(run, order, gate, step, again=True)
    if desk is None or run.clock.steps != step:
        return
    with closing(desk.turn(step)) as turn:
        for order in turn:
            orders.note(order, step)
            gate = apply(run, order.command, step, issuer=order.issuer)
            _tell(run, order, gate, step)
            desk.answer(order, step, gate, hold=run.keeping.holds)
            if run.clock.steps != step:
                return


def _tell(run: Run, order: Order, gate: Gate, step: int, *, again: bool = False) -> None:
    outcome = "applied" if gate.passed else "refused"
    run.journal.emit(
        Commanded(
            step=step, id=order.id, issuer=order.issuer, kind=order.kind, outcome=outcome, gate=gate.name,
            reason=gate.reason, again=again,
        )
    )  # fmt: skip


def apply(run: Run, command: Command, step: int, *, issuer: str) -> Gate:
    """Apply ``command`` or refuse it with a reason; a refusal is an event and changes nothing."""
    try:
        gate = _HANDLERS[type(command)](run, checked(command), step)
    except EsperError as error:
        gate = Gate("validation", False, str(error))
    except CONTAINED as error:  # a blueprint or start of the user's, or no memory for it
        gate = Gate("failure", False, contained(error))
    if not gate.passed:
        kind = str(command.__struct_config__.tag)
        told = f"{kind} by {issuer}"
        run.journal.emit(Refused(step=step, command=told, gate=gate.name, reason=gate.reason, issuer=issuer))
    return gate


def _germinate(run: Run, command: Germinate, step: int) -> Gate:
    if run.stopped is not None:
        return Gate("stopped", False, f"growth has stopped: {run.stopped}")
    if run.loop.paused is not None:
        return Gate("paused", False, f"growth is paused: {run.loop.paused}; resume it first")
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
            params=per_seed(bank.num_params // bank.num_slots for bank in banks.values()),
            scales=per_seed(member.scale for member in cohort.members.values()),
            lr_scales=per_seed(bank.lr_scale for bank in banks.values()),
            designs=per_seed(member.design for member in cohort.members.values()),
            model_params=run.kasmina.params - cohort.added_params, added_flops_share=cohort.added_flops_share,
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
        if command.cohort is None:
            return _pause_growth(run, paused, command.reason, step)
        cohort = _active(run, command.cohort)
        if cohort.paused != paused:
            run.kasmina.set_paused(cohort, paused, step)
        return Gate("command", True, "")

    return handle


def _pause_growth(run: Run, paused: bool, reason: str, step: int) -> Gate:
    if (run.loop.paused is not None) != paused:
        reason = reason or "by command"
        run.loop.paused = reason if paused else None
        run.journal.emit(GrowthPaused(step=step, paused=paused, reason=reason))
    elif paused and reason:
        run.loop.paused = reason  # the newest reason stands: it says who may lift it
    return Gate("command", True, "")


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
    if command.emergency:
        for cohort in list(run.kasmina.cohorts.values()):
            run.stages.expel(cohort, step, f"emergency stop: {command.reason}")
    return Gate("command", True, "")


def _snapshot(run: Run, command: Snapshot, step: int) -> Gate:
    if not run.keeping.on_demand:
        return Gate("snapshot", False, "this training writes no checkpoints on demand; let its loop look for them")
    run.keeping.due = command.reason or "by command"
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
    Snapshot: _snapshot,
}
