"""Where each weight of a stack of hosts lies in one flat row a host.

Shapes: N hosts, P numbers a host, G groups of weights that share a step count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Weights = list[tuple[Tensor, Tensor]]
"""Weight and bias of each part; of a part without a bias ``(N, 0)``."""

VOID, HOST = 0, 1
"""Groups of weights: nobody's, and the host's own. Each site adds two more, see :func:`annex` and :func:`live`."""
ROUND_TO = 8
"""Capacities are multiples of this, so that a germination seldom changes the layout."""


def annex(site: int) -> int:
    """Group of what a site has grown for good."""
    return 2 + 2 * site


def live(site: int) -> int:
    """Group of a site's seed on trial."""
    return 3 + 2 * site


def num_groups(num_sites: int) -> int:
    return 2 + 2 * num_sites


@dataclass(frozen=True)
class Part:
    """One matrix of a host, ``weight (rows, columns)`` or ``(rows, columns, taps)``, and a bias a row.

    Its rows are the hidden units of the site ``rows_of``, or ``rows`` many that never change; so are its columns.
    Whatever else a host learns is a part without a site: a norm has one column, an embedding a row a token.
    """

    name: str
    """As in the host's module."""
    rows: int = 0
    columns: int = 0
    rows_of: int | None = None
    columns_of: int | None = None
    taps: int = 1
    """Positions of a kernel."""
    bias: bool = True
    uses: int = 1
    """How often a row of data is multiplied with it (positions, tokens); 0: that is no matrix product."""

    def shape(self, hidden: Sequence[int]) -> tuple[int, int]:
        """Rows and columns where sites have so many hidden units."""
        rows = self.rows if self.rows_of is None else hidden[self.rows_of]
        return rows, self.columns if self.columns_of is None else hidden[self.columns_of]

    def params(self, hidden: Sequence[int]) -> int:
        rows, columns = self.shape(hidden)
        return rows * (columns * self.taps + self.bias)

    def flops(self, hidden: Sequence[int]) -> float:
        """Forward FLOPs of a row of data."""
        rows, columns = self.shape(hidden)
        return 2.0 * self.uses * rows * columns * self.taps


@dataclass(frozen=True)
class Layout:
    """``hidden`` are capacities of sites. A row holds weight and bias, part by part."""

    parts: tuple[Part, ...]
    hidden: tuple[int, ...]

    @classmethod
    def of(cls, parts: tuple[Part, ...], hidden: Sequence[int]) -> Layout:
        """The smallest layout with room for so many hidden units."""
        return cls(parts, tuple(-(-units // ROUND_TO) * ROUND_TO for units in hidden))

    @property
    def length(self) -> int:
        return sum(part.params(self.hidden) for part in self.parts)

    @cached_property
    def _places(self) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """Of each part where its weight begins and ends and its bias ends, and the weight's shape."""
        found: list[tuple[int, int, int, tuple[int, ...]]] = []
        start = 0
        for part in self.parts:
            rows, columns = part.shape(self.hidden)
            middle = start + rows * columns * part.taps
            end = middle + rows * part.bias
            found.append((start, middle, end, (rows, columns) if part.taps == 1 else (rows, columns, part.taps)))
            start = end
        return found

    def views(self, flat: Tensor) -> Weights:
        """``[(weight (N, rows, columns[, taps]), bias (N, rows))]`` of ``flat (N, P)``: the same memory."""
        num = flat.shape[0]
        return [(flat[:, a:b].view(num, *shape), flat[:, b:c]) for a, b, c, shape in self._places]

    def moved(self, flat: Tensor, wider: Layout) -> Tensor:
        """``flat`` as a row of a layout with at least as much room; new places hold zeros."""
        made = flat.new_zeros(flat.shape[0], wider.length)
        copy_into(wider.views(made), self.views(flat))
        return made


def copy_into(target: Weights, weights: Weights) -> None:
    """Write weights into the first rows and columns of others."""
    for (weight, bias), (old_weight, old_bias) in zip(target, weights, strict=True):
        rows, columns = old_weight.shape[1:3]
        weight[:, :rows, :columns] = old_weight
        bias[:, : old_bias.shape[1]] = old_bias


def owners(layout: Layout, groups: Sequence[Tensor]) -> Tensor:
    """Which group each weight of one host belongs to, ``(P,)`` int64.

    A weight between two of the host's units is the host's. A grown unit owns what it reads (the host's units and what
    is grown for good) and what it writes to the host's units of the next layer; the rest is nobody's.

    Parameters
    ----------
    groups:
        For each site the group of each hidden unit, ``(capacity,)`` int64; ``VOID`` where there is none.
    """
    flat = torch.zeros(1, layout.length, dtype=torch.int64)
    for part, (weight, bias) in zip(layout.parts, layout.views(flat), strict=True):
        rows, columns = (
            torch.full((fixed,), HOST) if site is None else groups[site]
            for site, fixed in ((part.rows_of, part.rows), (part.columns_of, part.columns))
        )
        if part.bias:
            bias[0] = rows
        reads, writes = rows[:, None], columns[None, :]
        on_trial = (writes > HOST) & (writes % 2 == 1)
        grown = torch.where(on_trial | (writes == VOID), VOID, reads)
        owned = torch.where(reads == HOST, writes.expand_as(grown), grown)
        weight[0] = owned if part.taps == 1 else owned[:, :, None]
    return flat[0]
