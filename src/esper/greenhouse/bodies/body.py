"""What a kind of host must say, so that many of it can be stacked and grown: its parts, its sites, its passes.

Shapes: N hosts, B rows of data, C places in a site's hidden layer, R rows that a matrix multiplies (B, or B times
positions).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from esper.greenhouse.layout import Layout, Part, Weights, copy_into
from esper.protocol import SiteKind


@dataclass(frozen=True)
class Span:
    """A site: the part that its hidden units are rows of (head), the one that they are columns of (tail), its costs.
    Both have a bias.

    ``positions`` are rows that both put out for a row of data.
    """

    name: str
    """As a grower names it."""
    head: int
    tail: int
    head_taps: int = 1
    tail_taps: int = 1
    positions: int = 1

    def params(self, units: int, reads: int, columns: int) -> int:
        """Parameters of hidden units that read and write so many features."""
        return units * (reads * self.head_taps + columns * self.tail_taps + 1)

    def flops(self, units: int, reads: int, columns: int) -> float:
        """Forward FLOPs of a row of data through them."""
        return 2.0 * self.positions * units * (reads * self.head_taps + columns * self.tail_taps)


@dataclass
class Pass:
    """What one forward has computed.

    ``output`` is ``(N, B, O)``, of sequences ``(N, B, T, O)``.
    """

    output: Tensor
    inputs: Mapping[int, Tensor]
    """By number of a part what its matrix reads, of every head and tail; hidden units are times alpha. The body's own
    layout, see :meth:`Body.tail_rows`."""
    kept: list[Tensor] = field(default_factory=list[Tensor])
    """What else the backward needs."""


class Body(ABC):
    """A kind of host, in one family's sizes.

    Attributes
    ----------
    parts:
        In the order in which they lie in a host's row.
    spans:
        Its sites, in the order in which a grower finds them.
    """

    kind: ClassVar[SiteKind]
    """Of all its sites."""
    blueprint: ClassVar[str]
    """What grows on them."""
    starts: ClassVar[tuple[str, ...]] = ("random_zero",)
    """Starts that stacks know; any but ``random_zero`` needs rows (:meth:`head_rows`, deltas of :meth:`backward`)."""
    parts: tuple[Part, ...]
    spans: tuple[Span, ...]

    # ---------------------------------------------------------------------------------------------- to be written

    @abstractmethod
    def draw(self, widths: Sequence[int], generator: Generator) -> list[tuple[Tensor, Tensor | None]]:
        """First weights of one host, float32: of each part ``(rows, columns[, taps])`` and a bias, as in its module."""

    @abstractmethod
    def module(self, widths: Sequence[int], generator: Generator, dtype: torch.dtype) -> nn.Module:
        """The same host as an ordinary module, with the weights that :meth:`draw` gives."""

    @abstractmethod
    def forward(
        self, weights: Weights, x: Tensor, alphas: Sequence[Tensor] | None = None, *, learns: bool = False
    ) -> Pass:
        """Run all hosts on ``x (N, B, ...)``.

        Parameters
        ----------
        alphas:
            For each site ``(N, C)``: how much of each hidden unit is blended in; ``None``: all are in.
        learns:
            Whether :meth:`backward` follows.
        """

    @abstractmethod
    def backward(
        self, weights: Weights, gradients: Weights, run: Pass, delta: Tensor, alphas: Sequence[Tensor] | None = None
    ) -> Sequence[Tensor]:
        """Write the gradients of all weights; ``delta`` is that of ``run.output``.

        Returns
        -------
        By number of a part the gradient of its output ``(N, R, rows)``; nothing where ``starts`` need no rows.
        """

    def head_rows(self, run: Pass, site: int, host: int, places: Tensor) -> Tensor:
        """``(R, I)`` what a site's head reads of some features."""
        return run.inputs[self.spans[site].head][host][:, places]

    def tail_rows(self, run: Pass, site: int, host: int, places: Tensor | slice) -> Tensor:
        """``(R, U * taps)`` what a site's tail multiplies with the columns of some hidden units, in the order of a
        grower's rows: by row of data, then by position."""
        return run.inputs[self.spans[site].tail][host][:, places]

    def host_flops(self, widths: Sequence[int]) -> float:
        """Forward FLOPs of a row of data through the host alone, as PyTorch counts them."""
        return sum(part.flops(widths) for part in self.parts)

    # ---------------------------------------------------------------------------------------------- what follows

    @property
    def num_sites(self) -> int:
        return len(self.spans)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of its sites."""
        return tuple(span.name for span in self.spans)

    def head(self, site: int) -> Part:
        return self.parts[self.spans[site].head]

    def tail(self, site: int) -> Part:
        return self.parts[self.spans[site].tail]

    def taps(self, site: int) -> tuple[int, int]:
        """Of a site's head and tail."""
        return self.head(site).taps, self.tail(site).taps

    def behind(self, site: int) -> int | None:
        """The site whose units read what this one's tail computes, if any."""
        return self.tail(site).rows_of

    def params(self, widths: Sequence[int]) -> int:
        """Parameters of the host alone."""
        return sum(part.params(widths) for part in self.parts)

    def layout(self, hidden: Sequence[int]) -> Layout:
        """The smallest layout with room for so many hidden units."""
        return Layout.of(self.parts, hidden)

    def first(self, layout: Layout, widths: Sequence[int], generator: Generator, dtype: torch.dtype) -> Tensor:
        """First weights of one host as a row, ``(P,)``."""
        flat = torch.zeros(1, layout.length, dtype=dtype)
        drawn = self.draw(widths, generator)
        none = torch.zeros(1, 0)
        copy_into(layout.views(flat), [(w[None], none if bias is None else bias[None]) for w, bias in drawn])
        return flat[0]
