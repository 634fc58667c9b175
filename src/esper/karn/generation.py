"""New designs from those that have done well: mutation, crossover, and now and then one drawn at random."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from esper.karn.archive import Archive
from esper.karn.design import GROWTHS, LR_SCALES, SCALES, SEEDS, Design, on_grid
from esper.karn.snapshot import Snapshot
from esper.worth import Choice

_OPERATORS = ("mutation", "crossover", "random")
_RATES = (0.5, 0.3, 0.2)
_TRIES = 50
"""Draws for one new design before the search ends: what can be made nearby is then known already."""
_GENES = ("pair", "growth", "seeds", "scale", "lr_scale")


class Pair(NamedTuple):
    """What can be on sites of a kind."""

    blueprint: str
    start: str
    scalable: bool
    """Whether the size of the first weights matters."""
    sized: bool
    """Whether the width matters."""


Menu = Mapping[str, Sequence[Pair]]
"""Pairs by kind of site."""
Test = Callable[[Design], str | None]
"""Why a design must not be used, or ``None``."""


def breed(snapshot: Snapshot, menu: Menu, test: Test, *, num: int, seed: int) -> list[Design]:
    """Make up to ``num`` designs that the snapshot does not know, each tested; failed ones are among them, marked.

    Deterministic given the snapshot and the seed, but for the time of creation.

    Raises
    ------
    ConfigError
        pyribs is not installed.
    """
    rng = np.random.default_rng(seed)
    archive = Archive(snapshot, seed=seed)
    known = {design.name for design in snapshot.designs}
    kinds = sorted({design.kind for design in archive.elites if design.kind in menu}) or sorted(menu)
    made: list[Design] = []
    for _ in range(num * _TRIES):
        if len(made) == num:
            break
        design = _offspring(archive, menu, kinds, rng)
        if design is None or design.name in known:
            continue
        known.add(design.name)
        reason = test(design)
        status = "passed" if reason is None else "failed"
        made.append(msgspec.structs.replace(design, status=status, reason=reason or "", created=time.time()))
    return made


def _offspring(archive: Archive, menu: Menu, kinds: Sequence[str], rng: np.random.Generator) -> Design | None:
    operator = str(rng.choice(_OPERATORS, p=_RATES))
    if operator == "random" or not len(archive):
        return _random(menu, kinds[int(rng.integers(len(kinds)))], rng)
    parents = archive.draw(2 if operator == "crossover" else 1)
    first = parents[0]
    if first.kind not in menu:
        return None
    if operator == "mutation":
        choice = first.choice
        for gene in rng.choice(_GENES, size=1 + int(rng.integers(2)), replace=False):
            choice = _mutated(choice, str(gene), menu[first.kind], rng)
    elif parents[1].kind == first.kind and parents[1].name != first.name:
        choice = _crossed(first.choice, parents[1].choice, rng)
    else:
        return None
    valid = _valid(choice, menu[first.kind])
    if valid is None:
        return None
    return Design(
        kind=first.kind, choice=valid, parents=tuple(parent.name for parent in parents), operator=operator,
        generation=1 + max(parent.generation for parent in parents),
    )  # fmt: skip


def _random(menu: Menu, kind: str, rng: np.random.Generator) -> Design | None:
    pair = menu[kind][int(rng.integers(len(menu[kind])))]
    choice = Choice(
        blueprint=pair.blueprint, start=pair.start, growth=float(rng.choice(GROWTHS)), seeds=int(rng.choice(SEEDS[:3])),
        scale=float(rng.choice(SCALES)), lr_scale=float(rng.choice(LR_SCALES)),
    )  # fmt: skip
    valid = _valid(choice, menu[kind])
    return None if valid is None else Design(kind=kind, choice=valid, operator="random")


def _mutated(choice: Choice, gene: str, pairs: Sequence[Pair], rng: np.random.Generator) -> Choice:
    if gene == "pair":
        pair = pairs[int(rng.integers(len(pairs)))]
        return msgspec.structs.replace(choice, blueprint=pair.blueprint, start=pair.start)
    grid: tuple[float, ...] | tuple[int, ...]
    grid = {"growth": GROWTHS, "seeds": SEEDS, "scale": SCALES, "lr_scale": LR_SCALES}[gene]
    here = grid.index(getattr(on_grid(choice), gene))
    there = min(max(here + int(rng.choice((-1, 1))), 0), len(grid) - 1)
    return msgspec.structs.replace(choice, **{gene: grid[there]})


def _crossed(one: Choice, other: Choice, rng: np.random.Generator) -> Choice:
    """Each gene from one of both; blueprint and start stay together."""
    takes = {gene: bool(rng.integers(2)) for gene in _GENES}
    changes = {gene: getattr(other, gene) for gene in _GENES[1:] if takes[gene]}
    if takes["pair"]:
        changes |= {"blueprint": other.blueprint, "start": other.start}
    return msgspec.structs.replace(one, **changes)


def _valid(choice: Choice, pairs: Sequence[Pair]) -> Choice | None:
    """The choice on the grid, what would do nothing left out; ``None`` where the pair cannot be."""
    pair = next((p for p in pairs if (p.blueprint, p.start) == (choice.blueprint, choice.start)), None)
    if pair is None:
        return None
    if not pair.scalable:
        choice = msgspec.structs.replace(choice, scale=1.0)
    if not pair.sized:
        choice = msgspec.structs.replace(choice, growth=1.0)
    return on_grid(choice)
