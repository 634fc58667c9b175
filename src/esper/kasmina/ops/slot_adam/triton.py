# Kernel arguments have no types that Python knows, and a launch takes options that the kernel does not name.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false
"""One optimizer step over all slots and all parameters of a bank, in three launches however many there are.

The rule is that of :class:`esper.kasmina.optim.SlotAdamW`; for slot s with t_s steps of its own and the host's lr:

    m = b1 m + (1 - b1) g     v = b2 v + (1 - b2) g^2     w -= lr_s / (1 - b1^t_s) * m / (sqrt(v / (1 - b2^t_s)) + eps)

``check_kernel`` looks for a value that is not finite, ``slot_kernel`` counts steps and prepares each slot's numbers,
``update_kernel`` changes parameters and moments. Nothing waits for the device.

Shapes: S slots, T parameters of one bank, each ``(S, ...)`` fp32 and contiguous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.kasmina.ops.launches import Launches, alignment
from esper.kasmina.ops.sizes import power_above

if TYPE_CHECKING:
    from esper.kasmina.ops.slot_adam import Rates, Stacks

_BLOCK = 1024


@triton.jit
def check_kernel(gradients, sizes, starts, flags, BLOCK: tl.constexpr):
    """``flags (blocks,)`` int32: how many values of a block are not finite."""
    pid = tl.program_id(0)
    bad = tl.zeros([BLOCK], tl.int32)
    for number in tl.static_range(len(gradients)):  # pyright: ignore[reportGeneralTypeIssues]
        offset = (pid - starts[number]) * BLOCK + tl.arange(0, BLOCK)
        mask = (offset >= 0) & (offset < sizes[number])
        gradient = tl.load(gradients[number] + offset, mask=mask, other=0.0).to(tl.float32)
        bad += (tl.abs(gradient) <= 3.4028234e38).to(tl.int32) ^ 1
    tl.store(flags + pid, tl.sum(bad, 0))


@triton.jit
def slot_kernel(
    flags, learning, steps, bad_steps, table, num_flags, slots, lr, warmup, log_beta1, log_beta2,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Count the step; ``table (4, S)``: whether a slot moves, its learning rate, its two bias corrections."""
    bad = 0
    for round_ in range(ROUNDS):
        place = round_ * BLOCK + tl.arange(0, BLOCK)
        bad += tl.sum(tl.load(flags + place, mask=place < num_flags, other=0), 0)
    finite = tl.where(bad == 0, 1.0, 0.0)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = slot < slots
    moves = tl.zeros([BLOCK], tl.float32) + finite
    if MASKED:
        moves = moves * tl.load(learning + slot, mask=real, other=0.0)
    taken = tl.load(steps + slot, mask=real, other=0.0) + moves
    tl.store(steps + slot, taken, mask=real)
    if tl.program_id(0) == 0:
        tl.store(bad_steps, tl.load(bad_steps) + (1 - finite).to(tl.int64))
    # in double precision: 1 - 0.999 keeps four digits of a float
    counted = tl.maximum(taken, 1.0).to(tl.float64)
    tl.store(table + slot, moves, mask=real)
    tl.store(table + slots + slot, lr * tl.minimum(taken / warmup, 1.0) * moves, mask=real)
    tl.store(table + 2 * slots + slot, (1.0 - tl.exp(counted * log_beta1)).to(tl.float32), mask=real)
    tl.store(table + 3 * slots + slot, (1.0 - tl.exp(counted * log_beta2)).to(tl.float32), mask=real)


@triton.jit
def update_kernel(
    values, gradients, firsts, seconds, sizes, widths, starts, table, slots,
    inverse_scale, beta1, beta2, eps, weight_decay, momentum,
    ADAPTIVE: tl.constexpr, DECOUPLED: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Change ``values``, ``firsts`` and ``seconds`` in place; ``widths``: elements a slot of each parameter."""
    pid = tl.program_id(0)
    for number in tl.static_range(len(values)):  # pyright: ignore[reportGeneralTypeIssues]
        offset = (pid - starts[number]) * BLOCK + tl.arange(0, BLOCK)
        mask = (offset >= 0) & (offset < sizes[number])
        slot = offset // widths[number]
        moves = tl.load(table + slot, mask=mask, other=0.0)
        lr = tl.load(table + slots + slot, mask=mask, other=0.0)
        value = tl.load(values[number] + offset, mask=mask, other=0.0)
        first = tl.load(firsts[number] + offset, mask=mask, other=0.0)
        gradient = tl.load(gradients[number] + offset, mask=mask, other=0.0).to(tl.float32) * inverse_scale
        gradient = tl.where(moves > 0, gradient, 0.0)
        if DECOUPLED:
            value = value * (1.0 - lr * weight_decay)
        else:
            gradient = gradient + weight_decay * value
        if ADAPTIVE:
            second = tl.load(seconds[number] + offset, mask=mask, other=0.0)
            first += (gradient - first) * ((1.0 - beta1) * moves)
            second += (gradient * gradient - second) * ((1.0 - beta2) * moves)
            correction1 = tl.load(table + 2 * slots + slot, mask=mask, other=1.0)
            correction2 = tl.load(table + 3 * slots + slot, mask=mask, other=1.0)
            value -= lr / correction1 * first / (tl.sqrt(second / correction2) + eps)
            tl.store(seconds[number] + offset, second, mask=mask)
        else:
            first = tl.where(moves > 0, momentum * first + gradient, first)
            direction = first
            if NESTEROV:
                direction = gradient + momentum * first
            value -= lr * direction
        tl.store(firsts[number] + offset, first, mask=mask)
        tl.store(values[number] + offset, value, mask=mask)


_launches = Launches()


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e4


@dataclass(frozen=True)
class Layout:
    """How parameters of these sizes are cut into blocks: first block and elements a slot of each, and all blocks."""

    starts: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: int


@lru_cache(maxsize=1024)
def layout(sizes: tuple[int, ...], slots: int) -> Layout:
    """Of parameters with ``sizes`` elements over ``slots``."""
    starts, total = [0], 0
    for size in sizes:
        total += -(-size // _BLOCK)
        starts.append(total)
    return Layout(tuple(starts[:-1]), tuple([size // slots for size in sizes]), total)


def step(stacks: Stacks, rates: Rates, learning: Tensor | None, inverse_scale: float) -> None:
    """Run the three kernels; arguments as of :func:`esper.kasmina.ops.slot_adam.step`."""
    values, firsts = tuple(stacks.values), tuple(stacks.firsts)
    seconds = tuple(stacks.seconds) or firsts
    gradients = tuple([gradient.contiguous() for gradient in stacks.gradients])
    steps, bad_steps = stacks.steps, stacks.bad_steps
    sizes, slots, device = tuple([value.numel() for value in values]), steps.numel(), steps.device
    plan = layout(sizes, slots)
    blocks = plan.blocks
    flags = torch.empty(blocks, dtype=torch.int32, device=device)
    table = torch.empty(4, slots, device=device)
    mask = table if learning is None else learning.to(torch.float32)
    key = (
        sizes, slots, device, rates.rule, rates.nesterov, learning is None, tuple([g.dtype for g in gradients]),
        alignment((*values, *gradients, *firsts, *seconds, steps, bad_steps, mask)),
    )  # fmt: skip
    launch = _launches.launch
    launch(("check", key), check_kernel, (blocks,), gradients, sizes, plan.starts, flags, _BLOCK, num_warps=4)
    launch(
        ("slot", key), slot_kernel, (-(-slots // _BLOCK),),
        flags, mask, steps, bad_steps, table, blocks, slots, float(rates.lr), float(max(1, rates.warmup_steps)),
        _log(rates.betas[0]), _log(rates.betas[1]), learning is not None, _BLOCK, power_above(-(-blocks // _BLOCK)),
        num_warps=4,
    )  # fmt: skip
    launch(
        ("update", key), update_kernel, (blocks,),
        values, gradients, firsts, seconds, sizes, plan.widths, plan.starts, table, slots,
        float(inverse_scale), float(rates.betas[0]), float(rates.betas[1]), float(rates.eps),
        float(rates.weight_decay), float(rates.momentum),
        rates.rule != "sgd", rates.rule == "adamw", rates.nesterov, _BLOCK, num_warps=4,
    )  # fmt: skip
