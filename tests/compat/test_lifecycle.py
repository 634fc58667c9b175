"""The plan's states and manager against the one table."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.compat import ExtendedLifecycle, LifecycleManager, StateManager
from esper.errors import ConfigError, TransitionError
from esper.kasmina.lifecycle import LEGAL, TABLE

pytestmark = pytest.mark.unit

E = ExtendedLifecycle
PLAN = {
    "DORMANT": 0, "GERMINATED": 1, "TRAINING": 2, "GRAFTING": 3, "STABILIZATION": 4, "EVALUATING": 5,
    "FINE_TUNING": 6, "FOSSILIZED": 7, "CULLED": 8, "CANCELLED": 9, "ROLLED_BACK": 10,
}  # fmt: skip
GOOD: dict[tuple[E, E], dict[str, Any]] = {
    (E.DORMANT, E.GERMINATED): {
        "free_slots": 1, "chunks_free": 1, "embargo": 0, "params_after": 10, "budget_params": None, "flops_after": 1,
        "budget_flops": None, "bytes_needed": 0, "bytes_free": 0,
    },
    (E.GERMINATED, E.TRAINING): {"batches": 4, "needed": 4},
    (E.TRAINING, E.GRAFTING): {
        "kind": "gradient", "t_statistic": 3.0, "min_t": 2.0, "capture_age": 1, "max_age": 50,
    },
    (E.GRAFTING, E.STABILIZATION): {"alpha": 1.0, "target": 1.0},
    (E.STABILIZATION, E.EVALUATING): {"losses": [1.0] * 20, "steps": 20, "min_steps": 10},
    (E.EVALUATING, E.FINE_TUNING): {
        "e_value": 50.0, "threshold": 41.0, "confirm_p": 0.01, "level": 0.05, "gain": 0.1,
    },
    (E.FINE_TUNING, E.FOSSILIZED): {
        "gain": 0.1, "harm": -0.05, "tolerated_harm": 0.01, "gain_per_cost": 1.0, "min_gain_per_cost": 0.0,
    },
}  # fmt: skip
"""The way of a seed that is kept, with metrics that every gate accepts."""
BAD = {
    E.TRAINING: {"t_statistic": 0.1}, E.GRAFTING: {"alpha": 0.5}, E.STABILIZATION: {"steps": 1},
    E.EVALUATING: {"gain": -0.1}, E.FINE_TUNING: {"gain": float("nan")},
}  # fmt: skip
"""What makes the gate of a state refuse."""


def test_codes_are_those_of_the_plan() -> None:
    assert issubclass(ExtendedLifecycle, enum.IntEnum)
    assert {state.name: state.value for state in ExtendedLifecycle} == PLAN


def test_transitions_are_those_of_the_table() -> None:
    manager = LifecycleManager()
    assert {(s, t) for s in E for t in E if LEGAL[s, t]} == set(manager.transitions)
    plan = [*GOOD, (E.EVALUATING, E.CULLED), (E.FINE_TUNING, E.CULLED)]
    plan += [(E(code), target) for code in range(1, 7) for target in (E.CANCELLED, E.ROLLED_BACK)]
    assert set(plan) <= set(manager.transitions)
    with pytest.raises(TypeError):
        manager.transitions[E.DORMANT, E.FOSSILIZED] = manager.user_cancellation  # type: ignore[index]


@given(st.sampled_from(E), st.sampled_from(E))
def test_what_the_table_does_not_list_is_refused(source: E, target: E) -> None:
    manager = LifecycleManager()
    if LEGAL[source, target]:
        assert (source, target) in manager.transitions
        return
    with pytest.raises(TransitionError, match=f"{source.name} -> {target.name} is not a legal transition"):
        manager.validate(source, target)


@pytest.mark.parametrize(("source", "target"), list(GOOD))
def test_gates_pass_and_refuse_as_in_the_product(source: E, target: E) -> None:
    manager, good = LifecycleManager(), GOOD[source, target]
    assert manager.validate(source, target, **good).passed
    if source in BAD:
        bad = {**good, **BAD[source]}
        refused, cull = manager.validate(source, target, **bad), manager.validate(source, E.CULLED, **bad)
        assert not refused.passed and cull.passed and cull.reason == refused.reason
        assert not manager.validate(source, E.CULLED, **good).passed, "what is good is not culled by its gate"


@pytest.mark.parametrize(("source", "target"), [*GOOD, (E.EVALUATING, E.CULLED), (E.FINE_TUNING, E.CULLED)])
def test_without_its_metrics_a_gate_lets_nobody_through(source: E, target: E) -> None:
    """Not even to CULLED: a keyword that was forgotten is no reason to take a seed out."""
    gate = LifecycleManager().validate(source, target)
    assert not gate.passed and gate.reason.startswith("the gate must be told all that it asks for, got no ")
    assert gate.name == TABLE[source].successors[target]


@pytest.mark.parametrize("state", ["TRAINING", None, 1.0])
def test_what_is_no_code_is_refused(state: Any) -> None:
    manager = LifecycleManager(StateManager(2))
    with pytest.raises(TransitionError, match=f"target must be a state code between 0 and 10, got {state!r}"):
        manager.validate(E.DORMANT, state)
    with pytest.raises(TransitionError, match=f"target must be a state code between 0 and 10, got {state!r}"):
        manager.transition([0], state)


def test_named_validators() -> None:
    manager = LifecycleManager()
    evaluation, hold = GOOD[E.EVALUATING, E.FINE_TUNING], GOOD[E.FINE_TUNING, E.FOSSILIZED]
    assert manager.validate_positive_eval(**evaluation).passed
    assert not manager.validate_negative_eval(**evaluation).passed
    assert manager.validate_negative_eval(**{**evaluation, "gain": None}).passed
    assert manager.validate_failure(**{**hold, "gain": -0.5}).passed
    assert manager.user_cancellation(reason="operator").reason == "operator"
    assert manager.emergency_rollback().passed


def test_seeds_go_their_way_together() -> None:
    states = StateManager(8)
    manager = LifecycleManager(states)
    for number, ((_, target), metrics) in enumerate(GOOD.items()):
        gate = manager.transition(torch.tensor([1, 5, 6]), target, step=number, **metrics)
        assert gate.passed
        assert states.lifecycle_states.tolist() == [0, target, 0, 0, 0, target, target, 0]
    with pytest.raises(TransitionError, match="FOSSILIZED -> CANCELLED"):
        manager.transition([1], E.CANCELLED)


def test_a_refusal_moves_nobody() -> None:
    states = StateManager(3)
    manager = LifecycleManager(states)
    manager.transition([0, 1], E.GERMINATED, **GOOD[E.DORMANT, E.GERMINATED])
    before = states.state_tensor
    gate = manager.transition([0, 1], E.TRAINING, batches=3, needed=4)
    assert not gate.passed and "captured batches must be at least 4, got 3" in gate.reason
    with pytest.raises(TransitionError, match="DORMANT -> TRAINING"):
        manager.transition([0, 1, 2], E.TRAINING, batches=4, needed=4)
    assert torch.equal(states.state_tensor, before)
    assert manager.transition([], E.TRAINING).passed
    assert manager.transition([0, 1], E.ROLLED_BACK).passed
    with pytest.raises(ConfigError, match=r"got none; make LifecycleManager\(states\)"):
        LifecycleManager().transition([0], E.GERMINATED)
