"""Judge and apply one command: the single place through which controllers and operators change a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from esper.errors import EsperError
from esper.kasmina.cohort import Cohort
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

if TYPE_CHECKING:
    from esper.grower import Grower


def apply(grower: Grower, command: Command, step: int, *, issuer: str) -> Gate:
    """Apply ``command`` or refuse it with a reason; a refusal is an event and changes nothing."""
    try:
        gate = _HANDLERS[type(command)](grower, command, step)
    except EsperError as error:
        gate = Gate("validation", False, str(error))
    if not gate.passed:
        kind = str(command.__struct_config__.tag)
        grower._emit(Refused(step=step, command=f"{kind} by {issuer}", gate=gate.name, reason=gate.reason))
    return gate


def _germinate(grower: Grower, command: Germinate, step: int) -> Gate:
    if grower.stopped is not None:
        return Gate("stopped", False, f"growth has stopped: {grower.stopped}")
    made = grower.kasmina.germinate(
        command.seeds,
        step=step,
        host_flops=grower.host_flops_per_step,
        budget_params=grower._params_budget,
        budget_flops=grower.budget_flops,
    )
    if isinstance(made, Gate):
        return made
    _announce(grower, made, command.reason, step)
    return Gate("germination", True, "")


def _announce(grower: Grower, cohort: Cohort, reason: str, step: int) -> None:
    per_seed = [(name, member, slot) for name, member in cohort.members.items() for slot in member.slots]
    banks = {name: grower.kasmina.sites[name].banks[cohort.number] for name in cohort.sites}
    grower._emit(
        Germinated(
            step=step, cohort=cohort.number, seeds=cohort.seed_ids, sites=tuple(name for name, _, _ in per_seed),
            blueprints=tuple(banks[name].blueprint for name, _, _ in per_seed),
            starts=tuple(member.start for _, member, _ in per_seed),
            widths=tuple(banks[name].units for name, _, _ in per_seed), added_params=cohort.added_params, reason=reason,
        )
    )  # fmt: skip
    grower._emit(
        Transitioned(
            step=step, cohort=cohort.number, seeds=cohort.seed_ids, source=Lifecycle.DORMANT,
            target=Lifecycle.GERMINATED, alpha=0.0, reason="germination: slot, budget and embargo allow it",
        )
    )  # fmt: skip


def _active(grower: Grower, number: int) -> Cohort:
    cohort = grower.kasmina.cohorts.get(number)
    if cohort is None or not bool(is_active(int(cohort.state))):
        alive = [c.number for c in grower.kasmina.cohorts.values() if bool(is_active(int(c.state)))]
        raise EsperError(f"no active cohort has the number {number}; active: {alive or 'none'}")
    return cohort


def _ending(target: Lifecycle) -> Callable[[Grower, Any, int], Gate]:
    def handle(grower: Grower, command: Any, step: int) -> Gate:
        grower.stages.end(_active(grower, command.cohort), target, step, command.reason)
        return Gate("command", True, "")

    return handle


def _pausing(paused: bool) -> Callable[[Grower, Any, int], Gate]:
    def handle(grower: Grower, command: Any, step: int) -> Gate:
        cohort = _active(grower, command.cohort)
        if cohort.paused != paused:
            grower.kasmina.set_paused(cohort, paused, step)
        return Gate("command", True, "")

    return handle


def _set_budget(grower: Grower, command: SetBudget, step: int) -> Gate:
    if command.params is not None and command.params < grower.kasmina.host_params:
        return Gate(
            "budget",
            False,
            f"budget.params must be at least the host's {grower.kasmina.host_params}, got {command.params}; raise it",
        )
    if command.flops is not None and command.flops < 1:
        return Gate("budget", False, f"budget.flops must be at least 1 (the host itself), got {command.flops}; raise it")
    grower.set_budget(command.params, command.flops)
    return Gate("command", True, "")


def _set_strategy(grower: Grower, command: SetStrategy, step: int) -> Gate:
    STRATEGIES[command.strategy]
    cohort = _active(grower, command.cohort)
    cohort.strategy = command.strategy
    cohort.memory.clear()
    grower.kasmina.table.strategy[cohort.slots] = STRATEGIES.code(command.strategy)
    return Gate("command", True, "")


def _stop(grower: Grower, command: Stop, step: int) -> Gate:
    grower._stop(command.reason)
    return Gate("command", True, "")


_HANDLERS: dict[type, Callable[[Grower, Any, int], Gate]] = {
    Germinate: _germinate,
    Cull: _ending(Lifecycle.CULLED),
    Cancel: _ending(Lifecycle.CANCELLED),
    RollBack: _ending(Lifecycle.ROLLED_BACK),
    Pause: _pausing(True),
    Resume: _pausing(False),
    SetBudget: _set_budget,
    SetStrategy: _set_strategy,
    Stop: _stop,
}

