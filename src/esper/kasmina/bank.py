"""A bank: seeds of one cohort on one site, stacked so that they run and learn as one.

The annex of a site is a bank too: one slot over all columns, of what has become permanent.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from esper.kasmina.blueprints import BLUEPRINTS, Blueprint, FusedBlueprint, Port
from esper.kasmina.geometry import Geometry
from esper.kasmina.ops.graft import Seats
from esper.kasmina.recompute import Recipe, recomputed

Tensors = dict[str, Tensor]


@dataclass
class Moments:
    """Optimizer state of a bank: first and second moments by parameter name, real steps taken by each slot."""

    first: Tensors = field(default_factory=dict[str, Tensor])
    second: Tensors = field(default_factory=dict[str, Tensor])
    steps: Tensor = field(default_factory=lambda: torch.zeros(0))


class Bank:
    """S stacked branches of one blueprint and size.

    Parameters
    ----------
    blueprint:
        Registered name.
    columns:
        ``(S, K)`` int64 on the CPU: the site's feature columns each slot adds to. ``None``: one slot, all columns.
    units, reads:
        Hidden units (or rank) a slot, and features it reads.
    scale:
        Factor on the random weights (not biases) by which units read.
    lr_scale:
        Factor on the learning rate that the host's rule gives; 1 once it is permanent.

    Attributes
    ----------
    params, buffers:
        fp32 leaves ``(S, ...)``; a bank learns only while ``learning`` is True, otherwise its parameters are frozen
        (no gradient is computed for them, while gradients still flow through the branch to the host).
    alpha:
        ``(S,)`` fp32 on the device, rewritten in place.
    """

    def __init__(
        self,
        blueprint: str,
        geometry: Geometry,
        *,
        units: int,
        reads: int,
        columns: Tensor | None,
        generator: torch.Generator,
        device: torch.device,
        scale: float = 1.0,
        lr_scale: float = 1.0,
    ) -> None:
        self.blueprint = blueprint
        self.geometry = geometry
        self.units = units
        self._reads = reads
        self.device = device
        self.set_columns(columns)
        params, buffers = self.plan.init(
            geometry, num_slots=self.num_slots, units=units, columns=self.width, reads=reads, generator=generator
        )
        if scale != 1.0:
            for name in self.plan.input_names():
                if name in params and params[name].dim() > 2:  # biases and norms are (S, U)
                    params[name].mul_(scale)
        self.lr_scale = lr_scale
        self.params = {name: value.to(device) for name, value in params.items()}
        self.buffers = {name: value.to(device) for name, value in buffers.items()}
        self.alpha = torch.zeros(self.num_slots, device=device)
        self.moments = Moments(steps=torch.zeros(self.num_slots, device=device))
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.learning = False
        self.norm_momentum: float | None = None

    @property
    def plan(self) -> Blueprint:
        return BLUEPRINTS[self.blueprint]

    @property
    def reads(self) -> int:
        """Features it reads of the site's input (as it was made, where no parameter tells)."""
        for name, axes in self.plan.axes.items():
            if axes.read is not None:
                return int(self.params[name].shape[axes.read])
        return self._reads

    @property
    def width(self) -> int:
        """Columns a slot adds to."""
        return self.geometry.out_features if self.columns is None else int(self.columns.shape[1])

    @property
    def num_params(self) -> int:
        return sum(value.numel() for value in self.params.values())

    @property
    def flops_per_row(self) -> float:
        cost = self.plan.cost(self.geometry, units=self.units, columns=self.width, reads=self.reads)
        return cost.flops_per_row * self.num_slots

    @property
    def may_repeat(self) -> bool:
        """Whether its hidden units can be computed a second time: dropout's masks would not come again."""
        return self.plan.product_with is not None and self.geometry.dropout == 0

    @property
    def repeated_flops_per_row(self) -> float:
        """FLOPs of its hidden units, where they are computed a second time."""
        return self.flops_per_row - 2.0 * self.num_slots * self.units * self.width if self.may_repeat else 0.0

    @property
    def own_seats(self) -> Seats | None:
        """Where its seeds sit if they are small perceptrons of their own columns, which one kernel can fit."""
        return self._seats if self.plan.is_perceptron else None

    def set_columns(self, columns: Tensor | None) -> None:
        """Seat the slots on ``columns (S, K)`` (on the CPU), or one slot on all columns."""
        self.columns = columns
        self.num_slots = 1 if columns is None else int(columns.shape[0])
        self._flat_columns = None if columns is None else columns.reshape(-1).to(self.device)
        self._seats: Seats | None = None
        if isinstance(self.plan, FusedBlueprint):
            whole = torch.arange(self.geometry.out_features)[None]
            self._seats = Seats.of(whole if columns is None else columns, self.geometry.out_features, self.device)

    def set_learning(self, learning: bool) -> None:
        """Switch gradients of this bank's parameters on or off; stale gradients are dropped."""
        self.learning = learning
        for value in self.params.values():
            value.requires_grad_(learning)
            value.grad = None

    def pick(self, x: Tensor, y: Tensor) -> Tensor:
        """What its branches read of a site's input ``x`` and output ``y``: the argument of :meth:`hidden`."""
        port = self.plan.port
        if port is Port.INPUT:
            return x
        if port is Port.OUTPUT or self._flat_columns is None:
            return y
        return y.index_select(self.geometry.feature_axis, self._flat_columns)

    def hidden(self, x: Tensor, *, training: bool, generator: torch.Generator | None) -> Tensor:
        """Activations of the hidden units, ``S * U`` features: what a downstream span may read."""
        return self.plan.hidden(
            self.params,
            self.buffers,
            x,
            self.geometry,
            training=training,
            generator=generator,
            norm_momentum=self.norm_momentum,
        )

    def project(self, h: Tensor, *, alpha: Tensor | None = None) -> Tensor:
        """``alpha * out(h)`` over the bank's own columns (S * K features on the feature axis)."""
        return self.plan.project(self.params, h, self.geometry, alpha=self.alpha if alpha is None else alpha)

    def branch(
        self,
        x: Tensor,
        *,
        alpha: Tensor | None = None,
        training: bool,
        generator: torch.Generator | None,
        thrifty: bool = False,
    ) -> Tensor:
        """``alpha * branch(x)`` over the bank's own columns; ``thrifty``: no hidden unit is kept for the backward."""
        plan, buffers, geometry = self.plan, self.buffers, self.geometry
        if thrifty and plan.product_with is not None and self.may_repeat:

            def hidden(params: Tensors, x: Tensor) -> Tensor:
                return plan.hidden(params, buffers, x, geometry, training=training, generator=None)

            return recomputed(Recipe(hidden, plan.product_with), self.params, x, self.alpha if alpha is None else alpha)
        return self.project(self.hidden(x, training=training, generator=generator), alpha=alpha)

    def scatter(self, y: Tensor, delta: Tensor) -> Tensor:
        """Add ``delta`` (over the bank's columns) to a new copy of ``y``."""
        delta = delta.to(y.dtype)
        if self._flat_columns is None:
            return y + delta
        return y.index_add(self.geometry.feature_axis, self._flat_columns, delta)

    def graft(self, y: Tensor, *, writable: bool) -> Tensor:
        """``y`` plus the branches of a fused blueprint; ``writable``: the memory of ``y`` may be used for it."""
        assert self._seats is not None, "only banks of a fused blueprint have seats"
        plan = cast("FusedBlueprint", self.plan)
        return plan.graft(self.params, y, self._seats, alpha=self.alpha, writable=writable)

    def scale_output(self, factor: float | Tensor) -> None:
        """Multiply the output weights in place; ``factor`` is a number or one value a slot ``(S,)``."""
        with torch.no_grad():
            for name in set(self.plan.output_names()) & set(self.params):
                value = self.params[name]
                shaped = factor.view(-1, *[1] * (value.dim() - 1)) if isinstance(factor, Tensor) else factor
                value.mul_(shaped)

    def select(self, slots: Tensor) -> None:
        """Keep ``slots`` (int64 indices on the CPU) and free the storage of all others."""
        assert self.columns is not None  # a single seed over all columns has nothing to choose from
        index = slots.to(self.alpha.device)
        learning = self.learning
        for store in (self.params, self.buffers, self.moments.first, self.moments.second):
            for name, value in store.items():
                store[name] = value.detach()[index]
        self.alpha, self.moments.steps = self.alpha[index], self.moments.steps[index]
        self.set_columns(self.columns[slots])
        self.set_learning(learning)

    def widen_reads(self, extra: int) -> None:
        """Let the bank read ``extra`` further features, with weights of zero: its output does not change."""
        if extra <= 0:
            return
        for name, axes in self.plan.axes.items():
            if axes.read is None:
                continue
            for store in (self.params, self.moments.first, self.moments.second):
                if name not in store:
                    continue
                old = store[name].detach()
                shape = list(old.shape)
                shape[axes.read] = extra
                store[name] = torch.cat([old, old.new_zeros(shape)], dim=axes.read)
            self.params[name].requires_grad_(self.learning)

    def state(self) -> dict[str, Any]:
        """Everything of it but gradients, as a state tree; the tensors are its own, not copies."""
        geometry = self.geometry
        return {
            "blueprint": self.blueprint,
            "units": self.units,
            "reads": self._reads,
            "columns": self.columns,
            "stds": [geometry.head_std, geometry.tail_std, None if geometry.gate is None else geometry.gate.std],
            "params": {name: value.detach() for name, value in self.params.items()},
            "buffers": dict(self.buffers),
            "alpha": self.alpha,
            "moments": {"first": self.moments.first, "second": self.moments.second, "steps": self.moments.steps},
            "bad_steps": self.bad_steps,
            "lr_scale": self.lr_scale,
            "learning": self.learning,
            "norm_momentum": self.norm_momentum,
        }

    @classmethod
    def of(cls, state: dict[str, Any], geometry: Geometry, device: torch.device) -> Bank:
        """The bank that :meth:`state` has told of, on a site of this geometry. It takes over the tensors."""
        head_std, tail_std, gate_std = state["stds"]
        gate = None if geometry.gate is None else replace(geometry.gate, std=gate_std)
        bank = object.__new__(cls)
        bank.blueprint, bank.units, bank._reads = state["blueprint"], state["units"], state["reads"]
        bank.geometry = replace(geometry, head_std=head_std, tail_std=tail_std, gate=gate)
        bank.device = device
        bank.set_columns(state["columns"])

        def placed(tensors: Tensors) -> Tensors:
            return {name: value.to(device) for name, value in tensors.items()}

        bank.params, bank.buffers = placed(state["params"]), placed(state["buffers"])
        bank.alpha, bank.bad_steps = state["alpha"].to(device), state["bad_steps"].to(device)
        moments = state["moments"]
        bank.moments = Moments(placed(moments["first"]), placed(moments["second"]), moments["steps"].to(device))
        bank.norm_momentum = state["norm_momentum"]
        bank.lr_scale = state.get("lr_scale", 1.0)
        bank.set_learning(state["learning"])
        bank.plan  # noqa: B018  (an unknown blueprint raises here, with the known ones)
        return bank

    def learning_copy(self) -> Bank:
        """A copy that goes on as this bank does: optimizer state included, without gradients."""
        twin = self.frozen_copy()
        twin.moments = copy.deepcopy(self.moments)
        twin.set_learning(self.learning)
        return twin

    def frozen_copy(self) -> Bank:
        """A detached copy without optimizer state or gradients (an EMA host's branches)."""
        twin = object.__new__(Bank)
        twin.__dict__.update(self.__dict__)
        twin.params = {name: value.detach().clone() for name, value in self.params.items()}
        twin.buffers = {name: value.detach().clone() for name, value in self.buffers.items()}
        twin.alpha = self.alpha.detach().clone()
        twin.moments = Moments()
        twin.bad_steps = self.bad_steps.clone()
        twin.learning = False
        return twin
