"""A controller that plays back a fixed list of germinations: the control that isolates *what* grew from *when*."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.errors import ConfigError, SiteError
from esper.protocol import Command, Germinate, Germinated, Observation, SeedPlan, Stop


@dataclass(frozen=True, kw_only=True)
class ScheduleEntry:
    """Germinate ``seeds`` at the first decision point at or after ``step``."""

    step: int
    seeds: tuple[SeedPlan, ...]


class ScheduleController:
    """Germinates its entries in order, at most one a decision point, then stops growth.

    An entry that is due waits until all its sites are eligible; later ones wait behind it.

    Parameters
    ----------
    entries:
        In order of steps.

    Raises
    ------
    ConfigError
        Steps that decrease, or an entry without seeds.
    """

    def __init__(self, entries: Iterable[ScheduleEntry]) -> None:
        self.entries = tuple(entries)
        steps = [entry.step for entry in self.entries]
        if steps != sorted(steps):
            raise ConfigError(f"schedule steps must not decrease, got {steps}; sort the entries by step")
        if not all(entry.seeds for entry in self.entries):
            raise ConfigError("every schedule entry must hold at least one seed, got an empty one; leave it out")
        self._next = 0

    @classmethod
    def replay(cls, germinated: Iterable[Germinated], *, start: str = "random_zero") -> ScheduleController:
        """Repeat the germinations of another run (same steps, sites, blueprints, widths) with another start."""
        return cls(ScheduleEntry(step=event.step, seeds=_plans(event, start)) for event in germinated)

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return nothing, the entry that is due, or ``Stop`` after the last one.

        Raises
        ------
        SiteError
            The entry that is due names a site the run does not have.
        """
        if observation.stopped is not None:
            return ()
        if self._next == len(self.entries):
            num = "1 cohort" if self._next == 1 else f"{self._next} cohorts"
            return (Stop(reason=f"schedule finished: {num} germinated"),)
        entry = self.entries[self._next]
        if observation.step < entry.step or not self._sites_are_free(entry, observation):
            return ()
        self._next += 1
        return (Germinate(seeds=entry.seeds, reason=f"scheduled for step {entry.step}"),)

    def waits(self, step: int, *, total_steps: int | None, num_ended: int) -> bool:
        """Return whether the next entry is for a later step."""
        return self._next < len(self.entries) and step < self.entries[self._next].step

    def state(self) -> dict[str, Any]:
        """Return the number of entries played."""
        return {"next": self._next}

    def load(self, state: dict[str, Any]) -> None:
        """Go on after the entries already played; raises ``ConfigError`` if the state does not fit this schedule."""
        position = state.get("next")
        if not isinstance(position, int) or not 0 <= position <= len(self.entries):
            raise ConfigError(
                f"a schedule's state must hold 'next' between 0 and {len(self.entries)}, got {state!r}; "
                "load it into the controller that saved it"
            )
        self._next = position

    @staticmethod
    def _sites_are_free(entry: ScheduleEntry, observation: Observation) -> bool:
        rows = {name: row for row, name in enumerate(observation.site_names)}
        for plan in entry.seeds:
            if plan.site not in rows:
                near = difflib.get_close_matches(plan.site, rows, n=3)
                hint = f"near: {', '.join(map(repr, near))}; " if near else ""
                raise SiteError(f"no site is called {plan.site!r}; {hint}list all: grower.sites()")
        return bool(np.all(observation.eligible[[rows[plan.site] for plan in entry.seeds]]))


def _plans(event: Germinated, start: str) -> tuple[SeedPlan, ...]:
    """One plan a site: as many seeds as it had, over as many chunks (the first ones)."""
    seeds = Counter(event.sites)
    held = dict(zip(event.sites, event.chunks, strict=False))
    return tuple(
        SeedPlan(
            site=site, blueprint=blueprint, width=width, start=start, seeds=seeds.pop(site),
            chunks=tuple(range(num * held[site])) if site in held else (),
        )
        for site, blueprint, width in zip(event.sites, event.blueprints, event.widths, strict=True)
        if (num := seeds.get(site, 0))
    )  # fmt: skip
