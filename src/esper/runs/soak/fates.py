"""A controller that never rests: it germinates whenever it can and ends cohorts in every way there is."""

from __future__ import annotations

import random
from typing import Any

from esper.errors import ConfigError
from esper.protocol import Cancel, Command, Cull, Germinate, Lifecycle, Observation, RollBack, SeedPlan

FATES = {"leave": 0.40, "roll back": 0.25, "cancel": 0.15, "cull": 0.20}
"""What becomes of a cohort, as shares; ``leave`` lets the gates decide."""
STATES = (
    Lifecycle.GERMINATED, Lifecycle.GRAFTING, Lifecycle.STABILIZATION, Lifecycle.EVALUATING, Lifecycle.FINE_TUNING,
)  # fmt: skip
"""Where a fate may strike. TRAINING lasts less than a step."""


class Restless:
    """Keeps one cohort alive at all times.

    Every draw comes from its own generator: the same seed gives the same commands for the same observations.
    """

    def __init__(self, *, seed: int, width: int = 2) -> None:
        self._random = random.Random(seed)
        self.width = width
        self._fate: tuple[str, Lifecycle] = ("leave", Lifecycle.GERMINATED)
        self._cohort: int | None = None

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Germinate on a free site, or let its fate strike the cohort that lives."""
        alive = [view for view in observation.alive if view.state in STATES or view.state is Lifecycle.TRAINING]
        if alive:
            return self._strike(alive[-1].cohort, alive[-1].state)
        sites = [name for name, free in zip(observation.site_names, observation.eligible, strict=True) if free]
        if not sites:
            return ()
        fate = self._random.choices(list(FATES), list(FATES.values()))[0]
        self._fate, self._cohort = (fate, self._random.choice(STATES)), None
        chosen = self._random.sample(sites, self._random.randint(1, len(sites)))
        plans = tuple(SeedPlan(site=name, width=self.width, start=self._random.choice(_STARTS)) for name in chosen)
        return (Germinate(seeds=plans, reason="soak"),)

    def _strike(self, cohort: int, state: Lifecycle) -> tuple[Command, ...]:
        fate, when = self._fate
        if self._cohort == cohort or state < when:  # once, at the first decision point from then on
            return ()
        self._cohort = cohort
        if fate == "roll back":
            return (RollBack(cohort=cohort, reason="soak"),)
        if fate == "cancel":
            return (Cancel(cohort=cohort, reason="soak"),)
        if fate == "cull" and state >= Lifecycle.GRAFTING:
            return (Cull(cohort=cohort, reason="soak"),)
        return ()

    def state(self) -> dict[str, Any]:
        """Return its stream and what it has in mind, as plain values."""
        version, internal, gauss = self._random.getstate()
        fate, when = self._fate
        return {
            "random": [version, list(internal), gauss], "fate": fate, "when": int(when), "cohort": self._cohort,
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; raises ``ConfigError`` if it does not fit."""
        if set(state) != {"random", "fate", "when", "cohort"}:
            raise ConfigError(f"a soak's controller has other keys, got {sorted(state)}; pass what state() returned")
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))
        self._fate, self._cohort = (state["fate"], Lifecycle(state["when"])), state["cohort"]


_STARTS = ("random_zero", "negative_gradient")
