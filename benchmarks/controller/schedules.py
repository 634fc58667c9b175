"""Schedules of growth: scripts that ask for so much at such a time, whatever they see."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from esper.greenhouse.hosts import Hosts
from esper.protocol import SeedPlan
from esper.tamiyo.schedule import ScheduleController, ScheduleEntry

STARTS = ("random_zero", "negative_gradient", "tiny")
LEAST = 4
"""Fewest units of a seed, as in the allocation of controllers."""


@dataclass(frozen=True)
class Growth:
    """At ``step`` (or as soon as the sites are free) so many times the host's own width. ``site`` -1: all of them."""

    step: int
    site: int
    size: float
    start: str | None


Schedule = tuple[Growth, ...]
NEVER: Schedule = ()


def even_schedules(interval: int, steps: int) -> list[Schedule]:
    """All sites at once, ``num`` times in equal distances: what has to be beaten."""
    found: list[Schedule] = []
    for (first, num), size in product(((1, 1), (1, 2), (1, 3), (4, 1), (4, 2), (8, 1)), (1.0, 2.0)):
        spacing = max(4, int(0.6 * steps / interval - first) // max(1, num))
        start = STARTS[len(found) % len(STARTS)]
        found.append(tuple(Growth(interval * (first + spacing * n), -1, size, start) for n in range(num)))
    return found


def tuned_schedules(interval: int, steps: int) -> list[Schedule]:
    """The even schedules, each with every start: what the best even one is chosen from."""
    found = even_schedules(interval, steps)
    return [tuple(replace(growth, start=start) for growth in schedule) for start in STARTS for schedule in found]


def schedules(interval: int, steps: int, sites: int, num: int = 64) -> list[Schedule]:
    """Never, the even ones, and drawn ones: sizes, sites, times and starts differ. Always the same list (one is in it
    twice)."""
    drawn = random.Random(7)
    found = [NEVER, *even_schedules(interval, steps)]
    last = int(0.75 * steps / interval)
    while len(found) < num:
        times = sorted(drawn.sample(range(1, last), drawn.choice((1, 1, 2, 2, 3, 4))))
        start = drawn.choice(STARTS)
        found.append(
            tuple(
                Growth(interval * time, drawn.randrange(-1, sites), drawn.choice((0.5, 1.0, 2.0, 3.0)), start)
                for time in times
            )
        )
    return found


def controller(schedule: Schedule, hosts: Hosts, host: int) -> ScheduleController:
    """The schedule on one host."""
    return scripted(schedule, hosts.lives[host].widths, hosts.site_names)


def scripted(schedule: Schedule, widths: Sequence[int], names: Sequence[str]) -> ScheduleController:
    """The schedule on sites of such widths."""
    entries: list[ScheduleEntry] = []
    for growth in schedule:
        sites = range(len(names)) if growth.site < 0 else (growth.site,)
        plans = tuple(
            SeedPlan(site=names[site], width=max(LEAST, round(growth.size * widths[site])), start=growth.start)
            for site in sites
        )
        entries.append(ScheduleEntry(step=growth.step, seeds=plans))
    return ScheduleController(entries)
