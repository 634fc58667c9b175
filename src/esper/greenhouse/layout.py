"""Where each weight of a stack of MLPs lies in one flat row a host.

Shapes: N hosts, P numbers a host, L hidden layers, G groups of weights that share a step count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
class Layout:
    """``sizes``: inputs, capacity of each hidden layer, outputs. A row holds weight and bias, layer by layer."""

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, inputs: int, hidden: Sequence[int], outputs: int) -> Layout:
        """The smallest layout with room for so many hidden units."""
        return cls((inputs, *(-(-units // ROUND_TO) * ROUND_TO for units in hidden), outputs))

    @property
    def num_layers(self) -> int:
        """Linear layers; one more than hidden layers."""
        return len(self.sizes) - 1

    @property
    def hidden(self) -> tuple[int, ...]:
        return self.sizes[1:-1]

    @property
    def length(self) -> int:
        return sum(rows * (columns + 1) for columns, rows in self._shapes)

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``[(weight (N, rows, columns), bias (N, rows))]`` of ``flat (N, P)``: the same memory."""
        found: list[tuple[Tensor, Tensor]] = []
        start, num = 0, flat.shape[0]
        for columns, rows in self._shapes:
            middle, end = start + rows * columns, start + rows * (columns + 1)
            found.append((flat[:, start:middle].view(num, rows, columns), flat[:, middle:end]))
            start = end
        return found

    def moved(self, flat: Tensor, wider: Layout) -> Tensor:
        """``flat`` as a row of a layout with at least as much room; new places hold zeros."""
        made = flat.new_zeros(flat.shape[0], wider.length)
        for (weight, bias), (old_weight, old_bias) in zip(wider.views(made), self.views(flat), strict=True):
            rows, columns = old_weight.shape[1:]
            weight[:, :rows, :columns] = old_weight
            bias[:, :rows] = old_bias
        return made


def owners(layout: Layout, groups: Sequence[Tensor]) -> Tensor:
    """Which group each weight of one host belongs to, ``(P,)`` int64.

    A weight between two of the host's units is the host's. A grown unit owns what it reads (the host's units and what
    is grown for good) and what it writes to the host's units of the next layer; the rest is nobody's.

    Parameters
    ----------
    groups:
        For each hidden layer the group of each unit, ``(capacity,)`` int64; ``VOID`` where there is none.
    """
    flat = torch.zeros(1, layout.length, dtype=torch.int64)
    ends = [torch.full((layout.sizes[0],), HOST), *groups, torch.full((layout.sizes[-1],), HOST)]
    for layer, (weight, bias) in enumerate(layout.views(flat)):
        columns, rows = ends[layer], ends[layer + 1]
        bias[0] = rows
        reads, writes = rows[:, None], columns[None, :]
        on_trial = (writes > HOST) & (writes % 2 == 1)
        grown = torch.where(on_trial | (writes == VOID), VOID, reads)
        weight[0] = torch.where(reads == HOST, writes.expand_as(grown), grown)
    return flat[0]
