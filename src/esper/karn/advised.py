"""A controller that asks the architect what to grow: *when* and *where* stay the other controller's decision."""

from __future__ import annotations

import math
from typing import Any, Protocol

import msgspec

from esper.errors import ConfigError
from esper.karn.architect import Architect, Proposal, Site
from esper.protocol import Command, Germinate, Observation, SeedPlan
from esper.worth import Place, places, reference_width

_MOST = 2
"""Times the units that the controller asked for, where no budget is set."""


class Decider(Protocol):
    """A controller, seen from here (:class:`esper.tamiyo.Controller`)."""

    def decide(self, observation: Observation) -> tuple[Command, ...]: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class AdvisedController:
    """Passes on what ``inner`` decides; each germination gets blueprint, start and size from the architect.

    Under a budget no proposal is larger than what was asked for. Deterministic given the architect's snapshot, the
    seed, and its own state.

    Parameters
    ----------
    inner:
        Decides when and where.
    seed:
        Of the proposals' own generator.
    """

    def __init__(self, inner: Decider, architect: Architect, *, seed: int = 0) -> None:
        self.inner = inner
        self._architect, self._seed = architect, seed
        self._germinations = 0

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """The inner controller's commands, with what grows chosen by the architect."""
        commands = self.inner.decide(observation)
        return tuple(
            self._advised(command, observation) if isinstance(command, Germinate) else command for command in commands
        )

    def state(self) -> dict[str, Any]:
        """Of the inner controller, and the number of proposals so far."""
        return {"inner": self.inner.state(), "germinations": self._germinations}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; raises ``ConfigError`` if it does not fit."""
        number = state.get("germinations")
        if set(state) != {"inner", "germinations"} or not isinstance(number, int) or number < 0:
            raise ConfigError(
                f"an advised controller's state must have the keys germinations and inner, got {sorted(state)}; "
                "load it into the controller that saved it"
            )
        self.inner.load(state["inner"])
        self._germinations = number

    def _advised(self, command: Germinate, observation: Observation) -> Germinate:
        if not observation.offers:
            return command  # nothing is known of what could be elsewhere
        rows = {name: row for row, name in enumerate(observation.site_names)}
        around = places(observation)
        capped = observation.budget_params is not None or observation.budget_flops is not None
        sites: list[Site] = []
        for plan in command.seeds:
            row = rows[plan.site]
            reference = _reference(around[row], int(observation.hidden[row]))
            asked = max(1, round(reference) if plan.width is None else plan.width * plan.seeds)
            sites.append(
                Site(
                    place=around[row], offers=observation.offers[row], reference=reference, asked=asked,
                    most=asked if capped else _MOST * asked,
                )
            )  # fmt: skip
        proposals = self._architect.propose(sites, seed=(self._seed, self._germinations))
        self._germinations += 1
        plans = [_with(plan, proposal) for plan, proposal in zip(command.seeds, proposals, strict=True)]
        designs = dict.fromkeys(plan.design for plan in plans if plan.design is not None)
        told = f"{command.reason}; Karn proposes {', '.join(designs)}" if designs else command.reason
        return msgspec.structs.replace(command, seeds=tuple(plans), reason=told)


def _reference(place: Place, hidden: int) -> float:
    inputs, outputs = (0 if value is None else round(math.exp(value)) for value in (place.log_in, place.log_out))
    return reference_width(inputs, outputs, hidden)


def _with(plan: SeedPlan, proposal: Proposal | None) -> SeedPlan:
    if proposal is None:
        return plan
    choice = proposal.design.choice
    return msgspec.structs.replace(
        plan, blueprint=choice.blueprint, start=choice.start, width=proposal.width, seeds=proposal.seeds, keep=None,
        scale=choice.scale, lr_scale=choice.lr_scale, design=proposal.design.name,
    )  # fmt: skip
