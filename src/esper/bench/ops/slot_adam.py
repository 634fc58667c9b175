"""Slot optimizer: one step over all slots of a bank, against the floor, its reference and PyTorch's fused AdamW.

PyTorch's optimizer has one step count a tensor and no mask, so it cannot do the same; it shows what a step costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from esper.bench import parity
from esper.bench.clock import Clock, row
from esper.bench.record import Line
from esper.kasmina.ops.slot_adam import Rates, Stacks, reference, step

CASES = (
    # slots, columns, hidden units
    (1, 1, 1),
    (3, 2, 5),
    (70, 3, 8),
    (2, 24, 33),
)
RULES = ("adamw", "adam", "sgd")
SIZES = ((1, 4, 8), (64, 4, 8), (1024, 4, 8), (8192, 4, 8), (64, 64, 64), (1, 768, 3072))
"""Slots, columns, hidden units; the last is a whole span's branch, as an isolated fit trains it."""
TINY = ((3, 2, 5),)
_FLOPS_AN_ELEMENT = 15.0


def stacks(slots: int, width: int, units: int, device: torch.device, *, rule: str) -> Stacks:
    """A bank's tensors at random, its slots at different ages."""
    shapes = ((slots, units, width), (slots, units), (slots, width, units))

    def draw() -> list[Tensor]:
        return [torch.randn(shape, device=device) for shape in shapes]

    return Stacks(
        values=draw(),
        gradients=draw(),
        firsts=draw(),
        seconds=[] if rule == "sgd" else [value.square() for value in draw()],
        steps=torch.arange(slots, device=device).remainder(60).float(),
        bad_steps=torch.zeros((), dtype=torch.int64, device=device),
    )


def _copy(original: Stacks, dtype: torch.dtype) -> Stacks:
    def copied(values: Sequence[Tensor]) -> list[Tensor]:
        return [value.to(dtype, copy=True) for value in values]

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


def check(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Line]:
    """Three steps of every rule with a mask; then a gradient that is not finite, which must change nothing.

    Banks are fp32 whatever the host computes in, so ``dtypes`` does not matter here.
    """
    for slots, *sizes in CASES:
        case = (slots * parity.scale_of(device), *sizes)
        for rule in RULES:
            start = stacks(case[0], case[1], case[2], device, rule=rule)
            learning = torch.arange(case[0], device=device) % 3 != 1
            rates = Rates(rule, 0.02, 0.1, momentum=0.9, nesterov=True, warmup_steps=7)
            got, wanted = _copy(start, torch.float32), _copy(start, torch.float64)
            for _ in range(3):
                step(got, rates, learning=learning, inverse_scale=0.5)
                reference.step(wanted, rates, learning, 0.5)
            yield parity.compare(f"{case}, {rule}", torch.float32, _pairs(got, wanted))
            before = _copy(got, torch.float32)
            got.gradients[0].view(-1)[-1] = float("nan")
            step(got, rates)
            same = all(torch.equal(*pair) for pair in _pairs(got, before).values()) and int(got.bad_steps) == 1
            line = parity.compare(f"{case}, {rule}, a NaN", torch.float32, _pairs(got, before))
            yield line | {"equal": line["equal"] and same}


def time_rows(clock: Clock, *, tiny: bool = False) -> Iterator[Line]:
    """One line a size of bank."""
    for slots, width, units in TINY if tiny else SIZES:
        bank = stacks(slots, width, units, clock.device, rule="adamw")
        rates = Rates("adamw", 1e-4, 0.1, warmup_steps=50)
        params = [value.clone().requires_grad_() for value in bank.values]
        for parameter, gradient in zip(params, bank.gradients, strict=True):
            parameter.grad = gradient
        call = partial(step, bank, rates)
        numbers = sum(value.numel() for value in bank.values)
        ours, theirs = clock.gpu_us(call), clock.gpu_us(partial(reference.step, bank, rates, None, 1.0))
        fused = torch.optim.AdamW(params, 1e-4, fused=True)
        yield row(
            # the gradient is read twice, parameter and moments are read and written
            "step", clock, ours=ours, num_bytes=4.0 * 8 * numbers, flops=_FLOPS_AN_ELEMENT * numbers, slots=slots,
            columns=width, hidden=units, wall_us=clock.wall_us(call), eager_gpu_us=theirs, over_eager=theirs / ours,
            fused_adamw_gpu_us=clock.gpu_us(fused.step),
        )  # fmt: skip
