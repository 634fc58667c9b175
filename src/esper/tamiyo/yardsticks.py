"""Controllers that learn nothing and look at little: what the others are measured against."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.protocol import Command, Germinate, Observation, SeedPlan, Stop
from esper.tamiyo.actions import commands, draw, together
from esper.tamiyo.allocation import asked_widths, fit_widths, room, unit_costs
from esper.tamiyo.features import FeatureReader
from esper.tamiyo.registry import register_controller
from esper.tamiyo.sight import see

_FIRST_SHARE, _FIRST = 0.2, 100
"""When even growth begins where ``first`` does not say: after this share of the run, or so many steps."""
_LAST_SHARE = 0.6
"""Nothing germinates after this share of the run."""
_GROWTH = 1.0


@register_controller("never")
class NeverController:
    """Grows nothing: stops growth at its first decision."""

    def __init__(self, config: TamiyoConfig, *, seed: int = 0) -> None:
        pass

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return ``Stop`` as long as growth goes on."""
        return () if observation.stopped is not None else (Stop(reason="the controller 'never' grows nothing"),)

    def state(self) -> dict[str, Any]:
        """Return nothing: it remembers nothing."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on; raises ``ConfigError`` for the state of another controller."""
        _same_keys("never", state, ())


@register_controller("schedule")
class EvenController:
    """Grows all sites at fixed times, whatever it sees: the first time at ``config.first`` (``None``: after a fifth of
    the run), with ``config.spacing`` again after so many steps, until 60% of the run; then it stops growth.

    Each time a site gets ``config.growth`` (``None``: one) times the host's own width, less where ceilings demand it. A
    time that comes while no site is free waits for one.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int = 0) -> None:
        self._first, self._spacing = config.first, config.spacing
        self._growth = _GROWTH if config.growth is None else config.growth
        self._done = 0

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return nothing, one ``Germinate``, or ``Stop`` after the last time."""
        if observation.stopped is not None:
            return ()
        total, due = observation.total_steps, self._due(observation.total_steps)
        if due is None or (total is not None and observation.step > _LAST_SHARE * total):
            num = "1 cohort" if self._done == 1 else f"{self._done} cohorts"
            return (Stop(reason=f"schedule finished: {num} germinated"),)
        if observation.step < due:
            return ()
        rows = together(observation)
        widths = asked_widths(observation, self._growth)[rows]
        costs = unit_costs(observation)
        widths = fit_widths(
            widths, costs._replace(params=costs.params[rows], flops=costs.flops[rows]), room(observation)
        )
        plans = tuple(
            SeedPlan(site=observation.site_names[row], width=width)
            for row, width in zip(rows.tolist(), widths.tolist(), strict=True) if width
        )  # fmt: skip
        if not plans:
            return ()
        self._done += 1
        return (Germinate(seeds=plans, reason=f"scheduled for step {due}"),)

    def waits(self, step: int, *, total_steps: int | None, num_ended: int) -> bool:
        """Return whether the next time is still to come."""
        due = self._due(total_steps)
        return due is not None and step < due and (total_steps is None or step <= _LAST_SHARE * total_steps)

    def state(self) -> dict[str, Any]:
        """Return the number of times that are over."""
        return {"done": self._done}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; raises ``ConfigError`` for that of another controller."""
        _same_keys("schedule", state, ("done",))
        self._done = int(state["done"])

    def _due(self, total_steps: int | None) -> int | None:
        """The step of the next time; ``None`` after the last one."""
        if self._done and not self._spacing:
            return None
        first = self._first
        if first is None:
            first = _FIRST if total_steps is None else round(_FIRST_SHARE * total_steps)
        return first + self._done * self._spacing


@register_controller("random")
class RandomController:
    """Draws every factor of an action evenly among what is valid, stopping included; nothing before ``config.first``
    (``None``: from the start)."""

    def __init__(self, config: TamiyoConfig, *, seed: int = 0) -> None:
        self._first, self._seed = config.first or 0, seed
        self._reader = FeatureReader()
        self._decisions = 0

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return the commands of one drawn action."""
        sight = see(self._reader, observation)
        if observation.step < self._first:
            return ()
        self._decisions += 1  # a generator of its own for each decision: the count is all there is to save
        action = draw(sight.masks, np.random.default_rng([self._seed, self._decisions]))
        return commands(action, observation, reason="random")

    def state(self) -> dict[str, Any]:
        """Return the count of decisions and what is remembered of the run."""
        return {"decisions": self._decisions, "reader": self._reader.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; raises ``ConfigError`` for that of another controller."""
        _same_keys("random", state, ("decisions", "reader"))
        reader = FeatureReader()
        reader.load(state["reader"])
        self._reader, self._decisions = reader, int(state["decisions"])


def _same_keys(name: str, state: dict[str, Any], keys: tuple[str, ...]) -> None:
    if set(state) != set(keys):
        raise ConfigError(
            f"a state of the controller {name!r} has the keys {sorted(keys)}, got {sorted(state)}; load it into the "
            "controller that saved it"
        )
