"""What one host has been through: cohorts, verdicts, costs. Plain Python beside the stacked tensors."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from esper.evidence.acceptance import Acceptance
from esper.greenhouse.bodies.body import Span
from esper.kasmina.ledger import Ledger
from esper.protocol import Lifecycle, Verdict

NAN = float("nan")


@dataclass
class Seed:
    """A cohort's units on one site; ``places (U,)`` are their rows in the site's hidden layer."""

    span: Span
    places: Tensor
    start: str
    reads: int
    columns: int
    flops_share: float = 0.0
    preserves_function: bool = False
    explained: float = NAN
    """What its fit explained on rows of other batches, and how sure that is."""
    t_statistic: float = NAN

    @property
    def units(self) -> int:
        return self.places.numel()

    @property
    def params(self) -> int:
        return self.span.params(self.units, self.reads, self.columns)

    @property
    def flops_per_row(self) -> float:
        """Forward FLOPs of a row of data."""
        return self.span.flops(self.units, self.reads, self.columns)


@dataclass
class Cohort:
    """Seeds of one host that are judged together; fields as of :class:`esper.kasmina.cohort.Cohort`."""

    number: int
    seeds: dict[int, Seed]
    entered: int
    added_params: int
    added_flops_share: float
    state: Lifecycle = Lifecycle.GERMINATED
    grafted: bool = False
    alpha: float = 0.0
    ramped: int = 0
    fading: int = 0
    fading_from: float = 0.0
    gain: tuple[float, float, float] = (NAN, NAN, NAN)
    gain_error: float = NAN
    gain_shrunken: float = NAN


@dataclass
class Capture:
    """Rows of a site's input, output and gradient, one entry a training batch."""

    x: list[Tensor] = field(default_factory=list[Tensor])
    y: list[Tensor] = field(default_factory=list[Tensor])
    g: list[Tensor] = field(default_factory=list[Tensor])


@dataclass
class Life:
    """One host's history.

    ``widths`` are the host's own hidden units, ``grown`` the units of its annexes, ``reads`` what an annex reads.
    """

    widths: tuple[int, ...]
    grown: list[int]
    evidence: Acceptance
    losses: deque[float]
    embargo: list[int]
    ledger: Ledger = field(default_factory=Ledger)
    cohorts: dict[int, Cohort] = field(default_factory=dict[int, Cohort])
    captures: dict[int, Capture] = field(default_factory=dict[int, Capture])
    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    looks: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    sensed: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    early: tuple[float, ...] | None = None
    """Losses that the next decision reads, where that was begun in the step before it."""
    last_grafted: int | None = None
    """The last step at whose end a cohort was in the forward pass."""
    fitted: set[int] = field(default_factory=set[int])
    """Sites with a gradient reading."""
    refused: list[str] = field(default_factory=list[str])
    held_out: float = NAN
    held_out_initial: float = NAN
    stopped: str | None = None
    next_cohort: int = 1

    def clone(self) -> Life:
        """A copy that goes its own way."""
        return copy.deepcopy(self)

    def seed_on(self, site: int) -> Seed | None:
        """The seed that sits on a site now, those that fade out included."""
        for cohort in self.cohorts.values():
            if site in cohort.seeds:
                return cohort.seeds[site]
        return None
