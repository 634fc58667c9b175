"""The same host twice: as one of a stack, and as a plain model under a real grower."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.greenhouse.family import HELD_OUT_BATCHES, HostSpec, batch_order, data_of, family_named
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.isolated import Units
from esper.protocol import Command, Observation
from esper.runs.hosts import MLP

Script = Callable[[Observation], Sequence[Command]]
Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y) if y.is_floating_point() else F.cross_entropy(model(x), y)


@dataclass
class Scripted:
    """A controller that plays a script, and keeps what it saw."""

    script: Script
    seen: list[Observation] = field(default_factory=list[Observation])

    def decide(self, observation: Observation) -> Sequence[Command]:
        self.seen.append(observation)
        return self.script(observation)

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class Real:
    """One host of a stack as a plain model under a grower, with the same first weights, batches and learning rates."""

    spec: HostSpec
    config: esper.Config
    script: Script
    dtype: torch.dtype = torch.float32
    losses: list[float] = field(default_factory=list[float])
    planted: dict[tuple[int, int, int], Units] = field(default_factory=dict[tuple[int, int, int], Units])

    def __post_init__(self) -> None:
        family = family_named(self.spec.family)
        hosts = Hosts([self.spec], self.config, dtype=self.dtype)
        widths = hosts.lives[0].widths
        self.steps = hosts.total_steps
        self.model = MLP(family.inputs, widths, family.outputs).to(self.dtype)
        linears = [layer for layer in self.model if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer, (weight, bias) in zip(linears, hosts.network.weights, strict=True):
                layer.weight.copy_(weight[0, : layer.out_features, : layer.in_features])
                layer.bias.copy_(bias[0, : layer.out_features])
        data = data_of(family, self.spec.task)

        def rows(part: Batch) -> Batch:
            return part[0].to(self.dtype), part[1].to(self.dtype) if part[1].is_floating_point() else part[1]

        self.train, self.test = rows(data.train), rows(data.test)
        x, y = rows(data.held_out)
        held_out = list(zip(x.chunk(HELD_OUT_BATCHES), y.chunk(HELD_OUT_BATCHES), strict=True))
        self.order = batch_order(self.spec, family, self.steps)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.spec.lr, weight_decay=family.weight_decay)
        self.controller = Scripted(self.script)
        self.grower = esper.Grower(
            self.model, self.optimizer, loss=loss_fn, evaluate=held_out, config=self.config,
            controller=self.controller,
        )  # fmt: skip

    def run(self) -> Real:
        for step in range(self.steps):
            share = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.spec.lr * share
            index = self.order[step]
            loss = loss_fn(self.model, (self.train[0][index], self.train[1][index]))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.grower.step(loss)
            self.losses.append(float(loss.detach()))
            self._note_units()
        self.grower.finish()
        return self

    def _note_units(self) -> None:
        """First weights of every seed, as soon as they are there (before they learn)."""
        names = list(self.grower.kasmina.sites)
        for cohort in self.grower.kasmina.cohorts.values():
            for name in cohort.sites:
                key = (0, cohort.number, names.index(name))
                if key not in self.planted:
                    bank = self.grower.kasmina.sites[name].banks[cohort.number]
                    w1, b1, w2 = (bank.params[part].detach()[0].clone() for part in ("w1", "b1", "w2"))
                    self.planted[key] = Units(w1, b1, w2)

    @property
    def test_loss(self) -> float:
        with torch.no_grad():
            return float(loss_fn(self.model, self.test))


def plain(config: esper.Config) -> esper.Config:
    """Settings without what stacks leave out: copies for a rollback."""
    return replace(config, safety=esper.SafetyConfig(snapshots=False))
