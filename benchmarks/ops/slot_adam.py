"""Slot optimizer: one step over all slots of a bank, against the floor, its reference and PyTorch's fused AdamW.

Run from the repository root, on a machine with a GPU (some ten seconds)::

    PYTHONPATH=src:. python benchmarks/ops/slot_adam.py --out benchmarks/results/ops_slot_adam.json

PyTorch's optimizer has one step count a tensor and no mask, so it cannot do the same; it shows what a step costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.ops import measure
from torch import Tensor

from esper.kasmina.ops.slot_adam import Rates, Stacks, reference
from esper.kasmina.ops.slot_adam import triton as kernels

CASES = (
    # slots, columns, hidden units
    (1, 1, 1),
    (3, 2, 5),
    (70, 3, 8),
    (2, 24, 33),
)
RULES = ("adamw", "adam", "sgd")


def stacks(slots: int, width: int, units: int, device: torch.device, *, rule: str) -> Stacks:
    """A bank's tensors at random, its slots at different ages."""
    shapes = ((slots, units, width), (slots, units), (slots, width, units))
    draw = lambda: [torch.randn(shape, device=device) for shape in shapes]  # noqa: E731
    return Stacks(
        values=draw(),
        gradients=draw(),
        firsts=draw(),
        seconds=[] if rule == "sgd" else [value.square() for value in draw()],
        steps=torch.arange(slots, device=device).remainder(60).float(),
        bad_steps=torch.zeros((), dtype=torch.int64, device=device),
    )


def _copy(original: Stacks, dtype: torch.dtype) -> Stacks:
    copied = lambda values: [value.to(dtype, copy=True) for value in values]  # noqa: E731
    return Stacks(
        copied(original.values), copied(original.gradients), copied(original.firsts), copied(original.seconds),
        original.steps.to(dtype, copy=True), original.bad_steps.clone(),
    )  # fmt: skip


def _pairs(got: Stacks, wanted: Stacks) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {"steps": (got.steps, wanted.steps)}
    for name in ("values", "firsts", "seconds"):
        lists = zip(getattr(got, name), getattr(wanted, name), strict=True)
        pairs |= {f"{name}{number}": pair for number, pair in enumerate(lists)}
    return pairs


def check(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[dict[str, Any]]:
    """Three steps of every rule with a mask; then a gradient that is not finite, which must change nothing.

    Banks are fp32 whatever the host computes in, so ``dtypes`` does not matter here.
    """
    for slots, *sizes in CASES:
        case = (slots * measure.growth(device), *sizes)
        for rule in RULES:
            start = stacks(*case, device, rule=rule)
            learning = torch.arange(case[0], device=device) % 3 != 1
            rates = Rates(rule, 0.02, 0.1, momentum=0.9, nesterov=True, warmup_steps=7)
            got, wanted = _copy(start, torch.float32), _copy(start, torch.float64)
            for _ in range(3):
                kernels.step(got, rates, learning, 0.5)
                reference.step(wanted, rates, learning, 0.5)
            yield measure.compare(f"{case}, {rule}", torch.float32, _pairs(got, wanted))
            before = _copy(got, torch.float32)
            got.gradients[0].view(-1)[-1] = float("nan")
            kernels.step(got, rates, None, 1.0)
            same = all(torch.equal(*pair) for pair in _pairs(got, before).values()) and int(got.bad_steps) == 1
            line = measure.compare(f"{case}, {rule}, a NaN", torch.float32, _pairs(got, before))
            yield line | {"equal": line["equal"] and same}


def time_rows(clock: measure.Clock, sweep: bool) -> list[dict[str, Any]]:
    sizes = ((1, 4, 8), (64, 4, 8), (1024, 4, 8), (8192, 4, 8), (64, 64, 64))
    return [_time(clock, *size) for size in sizes]


def _time(clock: measure.Clock, slots: int, width: int, units: int) -> dict[str, Any]:
    bank = stacks(slots, width, units, torch.device("cuda"), rule="adamw")
    rates = Rates("adamw", 1e-4, 0.1, warmup_steps=50)
    params = [value.clone().requires_grad_() for value in bank.values]
    for parameter, gradient in zip(params, bank.gradients, strict=True):
        parameter.grad = gradient
    call = partial(kernels.step, bank, rates, None, 1.0)
    # the gradient is read twice, parameter and moments are read and written
    floor = clock.floor_us(sum(value.nbytes for value in bank.values) * 8)
    ours, theirs = clock.gpu_us(call), clock.gpu_us(partial(reference.step, bank, rates, None, 1.0))
    more: dict[str, Any] = {
        "wall_us": clock.wall_us(call),
        "eager_gpu_us": theirs,
        "over_eager": theirs / ours,
        "fused_adamw_gpu_us": clock.gpu_us(torch.optim.AdamW(params, 1e-4, fused=True).step),
    }
    return measure.row("step", ours=ours, floor=floor, slots=slots, columns=width, hidden=units, **more)


if __name__ == "__main__":
    measure.run(__doc__ or "", check, time_rows)
