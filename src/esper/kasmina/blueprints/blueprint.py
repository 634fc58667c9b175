"""What every blueprint offers.

A blueprint works on *stacked* parameters: S seeds of one size on one site share tensors with a leading slot axis, so
that thousands run as one operation. It returns the sum of nothing but its own branch; the bank adds
``alpha * branch`` to the site's output.

Shapes: S slots, U units (hidden units, channels or rank), K output columns a slot, I read features, N rows.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.errors import CONTAINED, ExportError
from esper.kasmina.geometry import Geometry
from esper.kasmina.layers import BatchNorm
from esper.kasmina.registry import Registry
from esper.protocol import SiteKind

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Axes:
    """Axes of one stacked parameter (slot axis 0 included in the count); ``None`` where it has none of that kind.

    Parameters without a unit axis are added up where others are concatenated.
    """

    unit: int | None = None
    read: int | None = None
    column: int | None = None


@dataclass(frozen=True)
class Cost:
    """What one seed costs: parameters, and forward FLOPs per output row (2 a multiply-add; a row is a position)."""

    params: int
    flops_per_row: float


@dataclass
class Parts:
    """Host modules of a site at export: ``norm`` and ``up`` (a gated span's second factor) where it has them."""

    head: nn.Module
    tail: nn.Module
    norm: BatchNorm | None
    up: nn.Module | None = None


class Port(enum.Enum):
    """What a branch reads."""

    INPUT = "input"
    """The site's input."""
    OUTPUT = "output"
    """The site's own output, all features, before anything is added to it."""
    COLUMNS = "columns"
    """The same, only those columns that the branch adds to."""


class Blueprint(ABC):
    """One family of branches. Stateless: parameters and buffers are passed in."""

    kinds: frozenset[SiteKind]
    """Site kinds it can sit on."""
    axes: dict[str, Axes]
    """Every parameter and its axes; those with a column axis are the output weights."""
    buffer_axes: dict[str, Axes] = {}  # noqa: RUF012  (overridden as a whole, never mutated)

    port: Port = Port.INPUT
    absorbs: bool = True
    """Whether permanent branches of a site become one branch (units side by side, or sums), and not a list of them."""
    stacks_plainly: bool = False
    """Whether :meth:`plain` takes all slots of a bank at once, which are one module then."""
    fits_rows: bool = True
    """Whether captured rows of what it reads are all it takes to compute rows of its output."""

    product_with: str | None = None
    """Name of an output weight ``(S, K, U)``, where :meth:`project` is the product with it and ``hidden`` begins with
    products and holds no state: such a branch can be computed again in the backward pass."""

    is_perceptron: bool = False
    """Whether a branch is ``W2 silu(W1 y + b1)`` of the columns that it adds to, its parameters called w1, b1, w2."""

    def refusal(self, geometry: Geometry) -> str | None:
        """Why it cannot sit on a site of a kind that it claims, or ``None``."""
        return None

    def resolve_units(self, geometry: Geometry, asked: int | None) -> int:
        """Units of a seed that was ``asked`` to have so many (``None``: the default for the site)."""
        return asked if asked is not None else max(1, geometry.hidden_features or min(geometry.in_features, 8))

    def folds(self, geometry: Geometry) -> bool:
        """Whether :meth:`merge` leaves ordinary layers; otherwise :meth:`plain` is exported beside the host's layer."""
        return True

    @abstractmethod
    def init(
        self, geometry: Geometry, *, num_slots: int, units: int, columns: int, reads: int, generator: torch.Generator
    ) -> tuple[Tensors, Tensors]:
        """Random parameters and buffers on the CPU, fp32, drawn from ``generator`` alone."""

    @abstractmethod
    def hidden(
        self,
        params: Tensors,
        buffers: Tensors,
        x: Tensor,
        geometry: Geometry,
        *,
        training: bool,
        generator: torch.Generator | None,
        norm_momentum: float | None = None,
    ) -> Tensor:
        """Activations of all hidden units, ``S * U`` features on the feature axis.

        ``training`` is the host's flag at the site: it switches dropout (masks from ``generator``) and batch
        statistics, whose running averages are updated as the host's are. ``norm_momentum`` forces batch statistics
        with this momentum while norms are recalibrated.
        """

    @abstractmethod
    def project(self, params: Tensors, h: Tensor, geometry: Geometry, *, alpha: Tensor) -> Tensor:
        """``alpha * out(h)``: ``S * K`` features. ``alpha (S,)`` multiplies the weights, so it costs nothing a row."""

    @abstractmethod
    def cost(self, geometry: Geometry, *, units: int, columns: int, reads: int) -> Cost:
        """Declared cost of one seed."""

    def plain(self, params: Tensors, buffers: Tensors, geometry: Geometry) -> nn.Module:
        """The branch (S = 1, alpha = 1) as a module without anything of Esper in it: what it reads in, columns out.

        Where ``stacks_plainly``, of any S: the columns of all slots in, and out.
        """
        raise ExportError(
            f"a branch on a {geometry.kind} must have a plain form to be exported beside others, got one that has "
            "none; grow one blueprint a site"
        )

    def merge(self, parts: Parts, params: Tensors, buffers: Tensors, geometry: Geometry) -> Parts:
        """New plain modules that compute host plus branch (S = 1, alpha = 1, all columns), nothing of Esper inside.

        Called where :meth:`folds` says so.

        ``params['...']`` reads only the host's own input here; what it reads of an upstream annex is merged by the
        upstream's widening, which the exporter has already applied to ``parts.head``.
        """
        raise ExportError(
            f"a branch must be linear in what a {geometry.kind} computes to become part of its weights, got one that "
            "is not; export it beside the layer"
        )

    def output_names(self) -> tuple[str, ...]:
        return tuple(name for name, axes in self.axes.items() if axes.column is not None)

    def input_names(self) -> tuple[str, ...]:
        """Parameters that belong to units and are no output weights: what the units read by, and their biases."""
        return tuple(name for name, axes in self.axes.items() if axes.unit is not None and axes.column is None)


BLUEPRINTS: Registry[Blueprint] = Registry("blueprint")


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Gaussian weights on the CPU from Esper's own stream."""
    return torch.randn(shape, generator=generator) * std


def dropped(h: Tensor, p: float, training: bool, generator: torch.Generator | None) -> Tensor:
    """Inverted dropout with a generator of its own: the host's stream is not advanced."""
    if not training or p == 0.0 or generator is None:
        return h
    keep = torch.rand(h.shape, generator=generator, device=h.device) >= p
    return h * keep.to(h.dtype) / (1.0 - p)


def refusal_of(name: str, geometry: Geometry) -> str | None:
    """Why a blueprint cannot sit on a site of a kind that it claims, or ``None``. One that raises cannot.

    Every registered blueprint is asked about every site, also those that nobody has named.
    """
    try:
        return BLUEPRINTS[name].refusal(geometry)
    except CONTAINED as error:
        return f"it raised {type(error).__name__}: {error}; mend it, or use another blueprint"
