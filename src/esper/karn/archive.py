"""A MAP-Elites archive of designs (Mouret & Clune 2015, arXiv:1504.04909): the best one of each cell.

A cell is a cost, a kind of site, a blueprint and a start: categories are cells, for between two of them there is
nothing. The numbers of a design are the archive's solution, in octaves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from esper.errors import ConfigError
from esper.karn.design import Design
from esper.karn.experience import standings
from esper.karn.snapshot import Snapshot
from esper.worth.features import BLUEPRINTS, STARTS
from esper.worth.place import SITE_KINDS

COSTS = 8
_LOG2_COST = (-6.0, 2.0)
"""Costs from a 64th of the model's FLOPs to four times them; what lies outside counts for the outermost."""


class Archive:
    """The elites among the designs of a snapshot that have been used.

    Parameters
    ----------
    seed:
        Of the draws among elites.

    Raises
    ------
    ConfigError
        pyribs is not installed.
    """

    def __init__(self, snapshot: Snapshot, *, seed: int = 0) -> None:
        try:
            from ribs.archives import GridArchive
        except ModuleNotFoundError as error:
            raise ConfigError(
                "breeding designs needs pyribs, which is not installed; pip install 'esper-morph[karn]'"
            ) from error
        dims = (COSTS, len(SITE_KINDS) + 1, len(BLUEPRINTS) + 1, len(STARTS) + 1)
        self._grid: Any = GridArchive(
            solution_dim=4, dims=dims, ranges=[_LOG2_COST, *((0.0, float(size)) for size in dims[1:])], seed=seed,
            extra_fields={"design": ((), np.int64)},
        )  # fmt: skip
        done = standings(snapshot)
        self._designs = [design for design in snapshot.designs if design.name in done]
        for number, design in enumerate(self._designs):
            standing = done[design.name]
            self._grid.add_single(
                _solution(design), standing.efficiency, _cell(design, standing.cost), design=number
            )  # fmt: skip

    def __len__(self) -> int:
        """Cells that are taken."""
        return int(self._grid.stats.num_elites)

    @property
    def elites(self) -> list[Design]:
        """The best of each cell, the best of all first."""
        data = self._grid.data(["objective", "design"])
        order = np.lexsort((data["design"], -data["objective"]))
        return [self._designs[int(data["design"][row])] for row in order]

    def draw(self, num: int) -> list[Design]:
        """Elites drawn evenly, cells being alike."""
        drawn = self._grid.sample_elites(num)
        return [self._designs[int(number)] for number in drawn["design"]]


def _solution(design: Design) -> list[float]:
    choice = design.choice
    return [math.log2(value) for value in (choice.growth, choice.seeds, choice.scale, choice.lr_scale)]


def _cell(design: Design, cost: float) -> list[float]:
    """Measures in the middle of their cells."""
    low, high = _LOG2_COST
    octaves = min(max(math.log2(max(cost, 1e-9)), low), high - 1e-6)
    codes = (_code(design.kind, SITE_KINDS), _code(design.choice.blueprint, BLUEPRINTS))
    return [octaves, *(code + 0.5 for code in codes), _code(design.choice.start, STARTS) + 0.5]


def _code(name: str, known: tuple[str, ...]) -> int:
    """The position of a name; all that are not listed share the last one."""
    return known.index(name) if name in known else len(known)
