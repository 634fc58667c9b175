"""The architect: for a site as it is now, which design should grow there next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from esper.karn.design import Design, on_grid
from esper.karn.experience import posterior
from esper.karn.selection import Candidates, find_selection
from esper.karn.snapshot import Snapshot
from esper.worth import Choice, Place, encode

_SIZES = (0.5, 1.0, 2.0)
"""Built-in designs are tried at these multiples of the size that the controller asks for."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site that something shall grow on."""

    place: Place
    offers: tuple[tuple[str, str], ...]
    """``(blueprint, start)`` pairs that can be there."""
    reference: float
    """Width that growth is counted in."""
    asked: int
    """Units that the controller wants there."""
    most: int
    """Units that there may be at most."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What to grow on a site."""

    design: Design
    width: int
    """Units of one seed."""
    seeds: int


class Architect:
    """Proposes from what a snapshot tells: a pure function of that, the site and the seed.

    Parameters
    ----------
    strategy:
        Name of a selection (:func:`esper.karn.selection.selections`).
    uniform:
        Draw evenly from the same candidates instead: the control that tells whether experience is worth anything.

    Raises
    ------
    UnknownNameError
        There is no such selection.
    """

    def __init__(self, snapshot: Snapshot, *, strategy: str = "hybrid", uniform: bool = False) -> None:
        self._select, self._uniform = find_selection(strategy), uniform
        self._known = posterior(snapshot.reports)
        failed = {design.name for design in snapshot.designs if design.status == "failed"}
        generated = [d for d in snapshot.designs if d.status == "passed" and d.operator not in ("menu", "observed")]
        self._failed, self._generated = frozenset(failed), tuple(generated)

    def propose(self, sites: Sequence[Site], *, seed: Sequence[int]) -> list[Proposal | None]:
        """One proposal a site, or ``None`` where there is nothing to choose from; the same seed, the same proposals."""
        rng = np.random.default_rng(list(seed))
        draw = self._known.sample(rng)
        proposals: list[Proposal | None] = []
        for site in sites:
            found = list(self.candidates(site))
            if not found:
                proposals.append(None)
                continue
            if self._uniform:
                proposals.append(found[int(rng.integers(len(found)))])
                continue
            features = np.array([encode(site.place, _as_grown(item, site)) for item in found])
            scores = self._select(Candidates(features, self._known, draw))
            proposals.append(found[int(np.argmax(scores))])
        return proposals

    def candidates(self, site: Site) -> Iterable[Proposal]:
        """All that could be proposed at a site: what is built in, at several sizes, and what was designed for its kind.

        What has failed its test, is too large, or comes to the same is left out.
        """
        seen: set[tuple[str, int, int]] = set()
        for design in (*_menu(site), *self._generated):
            if design.kind != site.place.kind or design.name in self._failed:
                continue
            if (design.choice.blueprint, design.choice.start) not in site.offers:
                continue
            proposal = _sized(design, site)
            if proposal is None or (key := (design.name, proposal.width, proposal.seeds)) in seen:
                continue
            seen.add(key)
            yield proposal


def _menu(site: Site) -> Iterable[Design]:
    asked = site.asked / site.reference
    for blueprint, start in site.offers:
        for size in _SIZES:
            choice = on_grid(Choice(blueprint=blueprint, start=start, growth=asked * size))
            yield Design(kind=site.place.kind, choice=choice, operator="menu", status="passed")


def _sized(design: Design, site: Site) -> Proposal | None:
    """The design in whole units, or ``None`` where it would be more than there may be."""
    units = max(1, round(design.choice.growth * site.reference))
    seeds = min(design.choice.seeds, units)
    width = max(1, math.floor(units / seeds))
    return Proposal(design=design, width=width, seeds=seeds) if width * seeds <= site.most else None


def _as_grown(proposal: Proposal, site: Site) -> Choice:
    return msgspec.structs.replace(
        proposal.design.choice, growth=proposal.width * proposal.seeds / site.reference, seeds=proposal.seeds
    )
