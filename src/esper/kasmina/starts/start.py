"""Starts: how a branch's first weights are made. One file and one registration each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.config import FitConfig
from esper.errors import CONTAINED
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.geometry import Geometry
from esper.kasmina.layers import weight_matrix
from esper.kasmina.registry import Registry

SPAN_BLUEPRINTS = ("bottleneck", "bottleneck_conv")
"""Blueprints whose units are hidden units of the span itself: what starts that follow a paper's algebra work on."""


@dataclass(frozen=True)
class StartReport:
    """What a start measured on rows of other batches; NaN where it has no target. ``flops`` is what it cost."""

    explained: float = float("nan")
    t_statistic: float = float("nan")
    flops: float = 0.0


@dataclass(frozen=True)
class HostUnits:
    """The span's own hidden units as a blueprint's parameters (one slot, fp32 copies), and what it has grown.

    ``params`` holds ``w1 (1, H, I, ...)`` and, where the span has them, ``b1``, ``gamma``, ``beta`` ``(1, H)``;
    ``buffers`` the norm's ``mean`` and ``var``. ``tail_bias`` says whether the last layer can add a constant.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    tail_bias: bool
    annex: Bank | None = None
    further: Tensor | None = None
    """``(1, H, G, ...)``: by which the units read the G features that the span before has grown. On a chain those are
    written by its annex, into the very outputs of this span's head."""

    @classmethod
    def of(
        cls, head: nn.Module, norm: nn.Module | None, tail: nn.Module, annex: Bank | None, before: Bank | None = None
    ) -> HostUnits:
        """Copies of what the layers of a span hold now; ``before`` is the annex of the span before."""
        named = {"b1": (head, "bias"), "gamma": (norm, "weight"), "beta": (norm, "bias")}
        params = {name: getattr(module, attribute, None) for name, (module, attribute) in named.items()}
        params["w1"] = weight_matrix(head)
        buffers = {name: getattr(norm, attribute, None) for name, attribute in _NORM_BUFFERS.items()}
        written = None if before is None else before.params.get("w2")
        further = None if written is None else written.detach().float().clone()
        return cls(_one_slot(params), _one_slot(buffers), getattr(tail, "bias", None) is not None, annex, further)


_NORM_BUFFERS = {"mean": "running_mean", "var": "running_var"}


def _one_slot(values: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: value.detach().float().clone()[None] for name, value in values.items() if value is not None}


class Start(ABC):
    """One way to make first weights. Stateless."""

    needs_rows: bool
    """Whether the site must capture before this start can run."""
    fits: bool = False
    """Whether it trains the branch (``FitConfig.steps``), which costs FLOPs worth a budget."""
    needs_host: bool = False
    """Whether :meth:`prepare` needs the host's own units."""
    keeps_draw: bool = False
    """Whether it goes on from the branch's random input weights, so that their size matters (``SeedPlan.scale``)."""
    preserves_function: bool
    """Whether the branch's output is zero after it, so that alpha needs no ramp (``gradmax`` on activations with a kink
    at zero keeps a ten-thousandth of the host's weights: exact zeros could never learn there)."""
    sanity: str
    """What the isolated training promises (``gradient``, ``reconstruction`` or ``none``): see ``sanity_gate``."""

    def refusal(self, blueprint: str, geometry: Geometry) -> str | None:
        """Why this start cannot make this blueprint's weights on such a site, or ``None``."""
        return None

    def max_units(self, geometry: Geometry, *, columns: int, reads: int) -> int | None:
        """Most units of one seed that it can give a direction of their own (its rank), or ``None`` without a cap."""
        return None

    @abstractmethod
    def prepare(
        self,
        bank: Bank,
        rows: Rows | None,
        config: FitConfig,
        generator: torch.Generator,
        host: HostUnits | None = None,
    ) -> StartReport:
        """Set the first weights of ``bank`` in place."""


STARTS: Registry[Start] = Registry("start")


def fit_and_check_rows(rows: Rows) -> tuple[Rows, Rows]:
    """Split rows by training batch: the last quarter of the batches (at least one) is for checking only."""
    batches = torch.unique(rows.batch)
    held = batches[-max(1, len(batches) // 4) :]
    checking = torch.isin(rows.batch, held)
    first = int((~checking).sum())
    if bool(checking[first:].all()):  # in the order of their batches, as captures have them: nothing is copied
        return rows.select(slice(None, first)), rows.select(slice(first, None))
    return rows.select(~checking), rows.select(checking)


@torch.no_grad()
def set_output_size(bank: Bank, rows: Rows, config: FitConfig) -> None:
    """Output RMS of the branch = ``base_scale`` times the RMS of the site's output."""
    part = slice(0, 512)
    ones = torch.ones_like(bank.alpha)
    read = bank.pick(rows.x[part], rows.y[part]).float()
    out = bank.branch(read, alpha=ones, training=False, generator=None)
    size = float(out.square().mean().sqrt())
    if size > 0 and math.isfinite(size):
        bank.scale_output(config.base_scale * float(rows.y[part].square().mean().sqrt()) / size)


def refusal_of(name: str, blueprint: str, geometry: Geometry) -> str | None:
    """Why a start cannot make a blueprint's first weights on a site, or ``None``. One that raises cannot."""
    try:
        return STARTS[name].refusal(blueprint, geometry)
    except CONTAINED as error:
        return f"start {name!r} raised {type(error).__name__}: {error}; mend it, or use another start"
