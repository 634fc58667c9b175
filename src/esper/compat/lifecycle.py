"""``ExtendedLifecycle`` and ``LifecycleManager``: states and table of :mod:`esper.kasmina.lifecycle`, and its gates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from esper.compat.states import StateManager
from esper.errors import ConfigError
from esper.kasmina.gates import (
    Gate,
    capture_gate,
    evidence_gate,
    germination_gate,
    hold_gate,
    ramp_gate,
    sanity_gate,
    stability_gate,
)
from esper.kasmina.lifecycle import TABLE, check
from esper.protocol import Lifecycle

ExtendedLifecycle = Lifecycle
"""The eleven states, codes 0 to 10: :class:`esper.Lifecycle` itself."""

Validator = Callable[..., Gate]


class LifecycleManager:
    """Which transitions there are, and what decides each of them.

    The transitions are those of Esper's one table. It is stricter than "any state": only active seeds (GERMINATED to
    FINE_TUNING) can be cancelled or rolled back, and an end state is final. A gate refuses when a metric is missing or
    not finite, and its reason states the rule and the value.

    Parameters
    ----------
    states:
        Seeds for :meth:`transition`; none are needed to ask what is allowed.
    """

    def __init__(self, states: StateManager | None = None) -> None:
        self.states = states
        by_gate: dict[str, Validator] = {
            "germination": self.validate_germination,
            "capture": self.validate_training_start,
            "sanity": self.validate_reconstruction,
            "ramp": self.validate_ramp_complete,
            "stability": self.validate_stability,
            "evidence": self.validate_positive_eval,
            "hold": self.validate_improvement,
            "command": self.user_cancellation,
            "guard": self.emergency_rollback,
        }
        self.transitions: Mapping[tuple[Lifecycle, Lifecycle], Validator] = MappingProxyType(
            {
                (row.state, target): _Refusal(by_gate[gate]) if target is Lifecycle.CULLED else by_gate[gate]
                for row in TABLE
                for target, gate in row.successors.items()
            }
        )
        """What decides each legal transition: a function of metrics (keywords) that returns a
        :class:`~esper.kasmina.gates.Gate`. The way to CULLED is open where the gate of that state refuses."""

    validate_germination = staticmethod(germination_gate)
    validate_training_start = staticmethod(capture_gate)
    validate_reconstruction = staticmethod(sanity_gate)
    validate_ramp_complete = staticmethod(ramp_gate)
    validate_stability = staticmethod(stability_gate)
    validate_positive_eval = staticmethod(evidence_gate)
    validate_improvement = staticmethod(hold_gate)

    def validate_negative_eval(self, **metrics: Any) -> Gate:
        """EVALUATING -> CULLED: passes where :meth:`validate_positive_eval` refuses."""
        return _Refusal(self.validate_positive_eval)(**metrics)

    def validate_failure(self, **metrics: Any) -> Gate:
        """FINE_TUNING -> CULLED: passes where :meth:`validate_improvement` refuses."""
        return _Refusal(self.validate_improvement)(**metrics)

    @staticmethod
    def user_cancellation(*, reason: str = "cancelled") -> Gate:
        """Active -> CANCELLED: always passes."""
        return Gate("command", True, reason)

    @staticmethod
    def emergency_rollback(*, reason: str = "rolled back") -> Gate:
        """Active -> ROLLED_BACK: always passes."""
        return Gate("guard", True, reason)

    def validate(self, source: Lifecycle, target: Lifecycle, /, **metrics: Any) -> Gate:
        """Ask the gate between two states; without all that it asks for it lets nobody through, either way.

        Raises
        ------
        TransitionError
            The table has no such transition.
        """
        check(source, target)
        decides = self.transitions[Lifecycle(source), Lifecycle(target)]
        missing = [name for name in _needed(decides) if name not in metrics]
        if missing:
            reason = f"the gate must be told all that it asks for, got no {', '.join(missing)}; pass them by name"
            return Gate(TABLE[source].successors[Lifecycle(target)], False, reason)
        return decides(**metrics)

    def transition(
        self, seed_indices: Tensor | npt.ArrayLike, target: Lifecycle, /, *, step: int = 0, **metrics: Any
    ) -> Gate:
        """Move seeds of :attr:`states` to ``target`` if the gate lets them: all or none; returns what it said.

        Seeds in different states are asked for state by state, and the first refusal holds for all.

        Raises
        ------
        TransitionError
            The table does not lead from a seed's state to ``target``.
        ConfigError
            There are no states, or a seed does not exist.
        """
        if self.states is None:
            raise ConfigError("transition() moves seeds of a StateManager, got none; make LifecycleManager(states)")
        seeds = self.states.indices(seed_indices)
        sources = [Lifecycle(int(code)) for code in np.unique(self.states.lifecycle_states.numpy()[seeds])]
        gates = [self.validate(source, target, **metrics) for source in sources]
        refused = next((gate for gate in gates if not gate.passed), None)
        if refused is None:
            self.states.batch_update(seeds, {"lifecycle": int(target)}, step=step)
        return refused or (gates[0] if gates else Gate("command", True, "no seeds"))


def _needed(decides: Validator) -> list[str]:
    """Names of the metrics that a validator cannot do without."""
    asked = decides.gate if isinstance(decides, _Refusal) else decides
    return [name for name, metric in inspect.signature(asked).parameters.items() if metric.default is metric.empty]


class _Refusal:
    """A gate the other way round."""

    def __init__(self, gate: Validator) -> None:
        self.gate = gate

    def __call__(self, **metrics: Any) -> Gate:
        said = self.gate(**metrics)
        return Gate(said.name, not said.passed, said.reason)
