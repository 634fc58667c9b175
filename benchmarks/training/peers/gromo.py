"""``gromo_tiny`` and ``gromo_gradmax``: TINY (Verbockhaven et al., 2024) and GradMax (Evci et al., 2022) as the package
``gromo`` implements them (:mod:`esper.runs.peers.gromo`), on the tasks whose host is an MLP of equal inner widths.

The package leaves open when to grow, by how much, and when to stop. Here it grows to the final widths of the grown
training of the same seed, in :data:`ROUNDS` rounds spread evenly over the first :data:`GROWING` of training, one layer
after the other. Neither method can add more units at a time than the rank of its statistics (the layer's outputs among
others), so they may end narrower: by one unit a round before a single output. The optimizer is made anew after every
growth, as its old one holds tensors that are no longer the model's.

``gromo_tiny_equal_flops`` and ``gromo_gradmax_equal_flops`` grow to as many units as make the whole training cost what
the grown one of the same seed did (estimated by growing an untrained network).

Counted as FLOPs: training (three forwards a step, as for every arm), and in growth whatever PyTorch's counter sees.
The decompositions of small matrices are not.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence

import torch
from benchmarks.training.protocol.arms import Arm, Given, Result, final_shape, register_arm
from benchmarks.training.protocol.cells import Cell, Outcome
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.ledger import forward_flops
from esper.runs.peers import gromo
from esper.runs.preset import Preset

ROUNDS, GROWING = 16, 0.4
STATISTICS_BATCHES = 16
TRIES = 5
"""Widths that are tried to meet a cost."""


class Peer:
    """One training; ``flops`` and the model's optimizer are kept current as it grows."""

    def __init__(self, preset: Preset, cell: Cell, target: Sequence[int], method: str) -> None:
        spec = preset.spec(preset.small_widths)
        self.preset, self.cell, self.target, self.method = preset, cell, tuple(target), method
        torch.manual_seed(cell.seed)
        self.model = gromo.growing_mlp(
            spec["in_features"], preset.small_widths[0], len(preset.small_widths), spec["num_classes"], preset.device
        )
        self.parts = {"host": 0.0, "growth": 0.0}
        self.renew()

    @property
    def widths(self) -> tuple[int, ...]:
        return gromo.widths(self.model)

    def renew(self) -> None:
        """A new optimizer, and the cost of a step at the present size."""
        self.optimizer = self.preset.optimizer(self.model, self.cell.lr)
        batch = self.preset.train_batch(self.cell.seed, 0)
        with torch.no_grad():
            self.step_flops = 3.0 * forward_flops(self.model, lambda: self.preset.loss(self.model, batch))

    def step(self, number: int) -> bool:
        """One optimizer step; ``False`` once the loss is no longer finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.cell.lr * self.preset.schedule(number / self.cell.steps)
        loss = self.preset.loss(self.model, self.preset.train_batch(self.cell.seed, number))
        loss.backward()
        self.preset.clip(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parts["host"] += self.step_flops
        return math.isfinite(float(loss.detach()))

    def grow(self, round_number: int) -> None:
        """Grow each inner layer by its share of what is missing."""
        for index, wanted in enumerate(self.target):
            missing = wanted - self.widths[index]
            units = math.ceil(missing / (ROUNDS - round_number))
            if units <= 0:
                continue
            with FlopCounterMode(display=False) as counter:
                self._grow_layer(index, units, round_number)
            self.parts["growth"] += float(counter.get_total_flops())
        self.renew()

    def _grow_layer(self, index: int, units: int, round_number: int) -> None:
        first = self.cell.steps + round_number * STATISTICS_BATCHES  # batches that no step is made with
        batches = [self.preset.train_batch(self.cell.seed, first + number) for number in range(STATISTICS_BATCHES)]
        gromo.grow_layer(self.model, index, units, batches, self.preset.loss, self.method)

    def result(self, seconds: float, *, diverged: bool) -> Result:
        preset, model = self.preset, self.model.eval()
        held, score, loss = math.inf, math.nan, math.nan
        if not diverged:
            with torch.no_grad():
                batches = preset.held_out()
                held = sum(float(preset.loss(model, batch)) for batch in batches) / len(batches)
                if math.isfinite(held):
                    score, loss = preset.test(model)
        outcome = Outcome(
            held_out=held, flops=sum(self.parts.values()), params=sum(p.numel() for p in model.parameters()),
            seconds=seconds, widths=self.widths, flops_parts=dict(self.parts),
        )  # fmt: skip
        return Result(outcome=outcome, score=score, loss=loss)


def train(preset: Preset, cell: Cell, given: Given, *, method: str) -> Result:
    started = time.perf_counter()
    with gromo.quiet():
        peer = Peer(preset, cell, given["widths"], method)
        finite = _train(peer)
        return peer.result(time.perf_counter() - started, diverged=not finite)


def _moments(steps: int) -> dict[int, int]:
    """The steps before which it grows, and the number of each round."""
    return {round((number + 1) * GROWING * steps / ROUNDS): number for number in range(ROUNDS)}


def _train(peer: Peer) -> bool:
    """All steps, growing on the way; ``False`` when it diverges."""
    moments = _moments(peer.cell.steps)
    for step in range(peer.cell.steps):
        if step in moments:
            peer.grow(moments[step])
        if not peer.step(step):
            return False
    return True


def cost(preset: Preset, method: str, target: Sequence[int], steps: int) -> float:
    """FLOPs of a whole training that grows to ``target``, without its training."""
    cell = Cell(task=preset.name, arm=method, lr=0.0, seed=0, steps=steps, size="", code="")
    with gromo.quiet():
        peer, total, last = Peer(preset, cell, target, method), 0.0, 0
        for step, number in sorted(_moments(steps).items()):
            total, last = total + (step - last) * peer.step_flops, step
            peer.grow(number)
    return total + (steps - last) * peer.step_flops + peer.parts["growth"]


def equal_flops(preset: Preset, twin: Outcome, steps: int, *, method: str) -> Given:
    """Widths on the straight line through small and final whose training costs what the twin did."""
    small = preset.small_widths

    def between(share: float) -> list[int]:
        return [max(a, round(a + share * (b - a))) for a, b in zip(small, twin.widths, strict=True)]

    low, high = 0.0, 4.0
    share = 1.0
    for _ in range(TRIES):
        low, high = (share, high) if cost(preset, method, between(share), steps) < twin.flops else (low, share)
        share = (low + high) / 2
    return {"widths": between(share)}


def applies(preset: Preset) -> bool:
    return preset.spec(preset.small_widths).get("kind") == "mlp" and len(set(preset.small_widths)) == 1


for _name, _title in (("gromo_tiny", "gromo 0.1.0, TINY"), ("gromo_gradmax", "gromo 0.1.0, GradMax")):
    for _suffix, _said, _derive in (
        ("", "", final_shape),
        ("_equal_flops", ", same FLOPs", functools.partial(equal_flops, method=_name)),
    ):
        register_arm(
            Arm(
                name=_name + _suffix,
                title=_title + _said,
                train=functools.partial(train, method=_name),
                follows_grown=True,
                derive=_derive,
                applies=applies,
                requires="gromo",
                priority=6,
            )
        )
