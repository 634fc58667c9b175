"""A host of a stack as an ordinary model under a real grower: what is reported of a controller is measured here.

Same data, first weights, batches and learning rates as in a stack, so a run here and one there can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.config import Config
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.episodes import Outcome
from esper.greenhouse.family import (
    HELD_OUT_BATCHES,
    HostSpec,
    batch_order,
    data_of,
    family_named,
    weights_stream,
)
from esper.greenhouse.frontier import frontier_of
from esper.grower import Grower
from esper.protocol import AnyEvent
from esper.tamiyo import Controller

Batch = tuple[Tensor, Tensor]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of int64 labels, over rows or over tokens, else mean squared error."""
    x, y = batch
    output = model(x)
    return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output.flatten(0, -2), y.flatten())


def make_model(spec: HostSpec, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The host with the first weights that it has in a stack."""
    family = family_named(spec.family)
    widths = spec.widths or data_of(family, spec.task).widths
    return body_of(spec.family).module(widths, weights_stream(spec), dtype)


class RealHost:
    """One host under a grower.

    Parameters
    ----------
    controller:
        What decides; it belongs to this run.
    config:
        ``None``: the family's.
    on_event:
        Gets every event of the grower.
    """

    def __init__(
        self,
        spec: HostSpec,
        controller: Controller,
        config: Config | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        on_event: Callable[[AnyEvent], None] | None = None,
    ) -> None:
        self.spec, self.family = spec, family_named(spec.family)
        self.steps = spec.steps or self.family.steps
        if config is None:
            config = replace(self.family.config, total_steps=self.steps)
        self.model = make_model(spec, dtype)
        data = data_of(self.family, spec.task)
        self._train, self._test = _typed(data.train, dtype), _typed(data.test, dtype)
        self._order = batch_order(spec, self.family, self.steps)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=spec.lr, weight_decay=self.family.weight_decay)
        x, y = _typed(data.held_out, dtype)
        held_out = list(zip(x.chunk(HELD_OUT_BATCHES), y.chunk(HELD_OUT_BATCHES), strict=True))
        self.grower = Grower(
            self.model, self.optimizer, loss=mean_loss, evaluate=held_out, config=config, controller=controller,
            on_event=on_event,
        )  # fmt: skip
        self.losses: list[float] = []
        """Training losses so far."""

    def step(self) -> None:
        """One training step, at the learning rate that it has in a stack."""
        done = len(self.losses)
        share = 0.5 + 0.5 * math.cos(math.pi * done / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.lr * share
        index = self._order[done]
        loss = mean_loss(self.model, (self._train[0][index], self._train[1][index]))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.grower.step(loss)
        self.losses.append(float(loss.detach()))

    def run(self) -> Outcome:
        """Train to the end, and say how it came out."""
        while len(self.losses) < self.steps:
            self.step()
        self.grower.finish()
        return self.outcome()

    def test_loss(self) -> float:
        """Loss on the test rows, as the network is now."""
        self.model.eval()
        with torch.no_grad():
            value = float(mean_loss(self.model, self._test))
        self.model.train()
        return value

    def outcome(self) -> Outcome:
        """Reward and what it is made of, everything that the grower has booked counted."""
        frontier, ledger, loss = frontier_of(self.spec.family, self.spec.task), self.grower.ledger, self.test_loss()
        return Outcome(
            loss=loss, flops=ledger.total, frontier_loss=frontier.loss_at(ledger.total),
            deviation=frontier.deviation, reward=frontier.reward(loss, ledger.total),
            params=self.grower.kasmina.params, parts=ledger.state(),
        )  # fmt: skip


def evaluate(specs: Sequence[HostSpec], controllers: Sequence[Controller]) -> list[Outcome]:
    """Every host under a grower of its own, one after the other."""
    return [RealHost(spec, controller).run() for spec, controller in zip(specs, controllers, strict=True)]


def _typed(rows: Batch, dtype: torch.dtype) -> Batch:
    x, y = rows
    return x.to(dtype) if x.is_floating_point() else x, y.to(dtype) if y.is_floating_point() else y
