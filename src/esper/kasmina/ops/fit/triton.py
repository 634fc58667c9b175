# Kernel arguments have no types that Python knows, and a launch takes options that the kernel does not name.
# How seeds are put together is the graft kernels' own matter, which these share.
# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false
# pyright: reportPrivateUsage=false, reportGeneralTypeIssues=false
"""A whole isolated fit in one launch: gather rows, forward, error, gradients and Adam, step after step.

A program belongs to one *group* of seeds (a block-diagonal matrix, as in the graft kernels) and keeps their weights in
its registers from the first step to the last, and their moments in memory of its own. Where there are fewer groups than
the GPU has room for, several programs share the rows of a group's step: each writes its partial gradients, waits for
the others of its group, and then does the same update from the same sums in the same order, so that all of them go on
with the same bits. No sum depends on who came first.

Shapes: N rows, F features, S seeds, K columns and H hidden units a seed; T steps of B rows; a group has G seeds,
GK >= G * K columns and GH >= G * H hidden units. Weights, gradients and moments of all seeds lie flat,
``w1 (S, H, K)``, ``w2 (S, K, H)`` and ``b1 (S, H)`` behind each other: ``total`` numbers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.graft.triton import Grouping, _first_weights, _group_columns, _group_units, _second_weights
from esper.kasmina.ops.launches import on_device_of
from esper.kasmina.ops.sizes import power_above

_WHOLE_RUNS = 16
"""Run length from which whole groups are runs (``WHOLE_RUNS`` of the graft operation)."""
_SIDE = 16
"""Columns and hidden units of a group of several seeds, at most: the smallest tile of the matrix units."""
_WARPS = 8
"""Warps that are sure to have room on a multiprocessor whatever registers they use (255 a thread at most)."""
_LEAST_TILES = 4
"""Tiles of a program in a step, at least: waiting for each other costs as much as some tiles."""
_BETAS = (0.9, 0.999)


@triton.jit
def _gradients(
    y, target, draws, column, real, first, second, bias, block, blocks, batch, tiles, features, target_features,
    GK: tl.constexpr, GH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over a program's share of one step's rows, of the gradients at half the squared error."""
    sum1 = tl.zeros([GK, GH], tl.float32)
    sum2 = tl.zeros([GH, GK], tl.float32)
    sum_bias = tl.zeros([GH], tl.float32)
    for tile in range(tiles):
        number = (tile * blocks + block) * ROWS + tl.arange(0, ROWS)
        row = tl.load(draws + number, mask=number < batch, other=0).to(tl.int64)
        mask = (number < batch)[:, None] & real[None, :]
        value = tl.load(y + row[:, None] * features + column[None, :], mask=mask, other=0.0).to(tl.float32)
        aim = tl.load(target + row[:, None] * target_features + column[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.dot(value, first, input_precision=PRECISION) + bias[None, :]
        gate = tl.sigmoid(z)
        h = z * gate
        out = tl.dot(h, second, input_precision=PRECISION)
        error = tl.where(mask, out - aim, 0.0)  # rows behind the last have none
        dh = tl.dot(error, tl.trans(second), input_precision=PRECISION)
        dz = dh * (gate + h * (1.0 - gate))
        sum1 += tl.dot(tl.trans(value), dz, input_precision=PRECISION)
        sum2 += tl.dot(tl.trans(h), error, input_precision=PRECISION)
        sum_bias += tl.sum(dz, 0)
    return sum1, sum2, sum_bias


@triton.jit
def _meet(count, arrivals):
    """Wait until the programs of a group have arrived so many times, with what each has written before."""
    tl.debug_barrier()
    tl.atomic_add(count, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(count, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()


@triton.jit
def _adam(value, first, second, gradient, moves, rate, correction, share1, share2, eps):
    """One step of Adam: weights and moments. With ``moves`` zero nothing changes. ``share``: of the gradient in a
    moment, 1 - beta."""
    gradient = tl.where(moves > 0, gradient, 0.0)
    first += (gradient - first) * (share1 * moves)
    second += (gradient * gradient - second) * (share2 * moves)
    return value - rate * moves * first / (tl.sqrt(second / correction) + eps), first, second


@triton.jit
def _adam_in(moments, value, place, mask, total, gradient, moves, rate, correction, share1, share2, eps,
             FEW: tl.constexpr):  # fmt: skip
    """The same with moments in memory.

    Of a tensor of fewer numbers than a program has threads (``FEW``) several threads hold the same one: all of them
    must have read a moment before one of them moves it on.
    """
    first = tl.load(moments + place, mask=mask, other=0.0)
    second = tl.load(moments + total + place, mask=mask, other=0.0)
    if FEW:
        tl.debug_barrier()
    value, first, second = _adam(value, first, second, gradient, moves, rate, correction, share1, share2, eps)
    tl.store(moments + place, first, mask=mask)
    tl.store(moments + total + place, second, mask=mask)
    return value


@triton.jit
def _not_finite(gradient):
    """How many numbers are not finite: a scalar."""
    return tl.sum((tl.abs(gradient) <= 3.4028234e38).to(tl.int32) ^ 1)


@triton.jit
def _sum_parts(parts, blocks, place1, mask1, place2, mask2, unit, has_unit, total, GK: tl.constexpr,
               GH: tl.constexpr):  # fmt: skip
    """What all programs of a group have found, in their order."""
    sum1 = tl.zeros([GK, GH], tl.float32)
    sum2 = tl.zeros([GH, GK], tl.float32)
    sum_bias = tl.zeros([GH], tl.float32)
    for other in range(blocks):
        # past the first-level cache, which may hold what lay here two steps ago
        part = parts + other * total
        sum1 += tl.load(part + place1, mask=mask1, other=0.0, cache_modifier=".cg")
        sum2 += tl.load(part + place2, mask=mask2, other=0.0, cache_modifier=".cg")
        sum_bias += tl.load(part + unit, mask=has_unit, other=0.0, cache_modifier=".cg")
    return sum1, sum2, sum_bias


@triton.jit
def _store(target, place1, mask1, place2, mask2, unit, has_unit, first, second, bias):
    tl.store(target + place1, first, mask=mask1)
    tl.store(target + place2, second, mask=mask2)
    tl.store(target + unit, bias, mask=has_unit)


@triton.jit
def fit_kernel(
    y, target, draws, columns, weights, state, taken, parts, counts,
    begin, end, batch, tiles, features, target_features, seeds, groups, blocks, total,
    scale, lr, share1, share2, log_beta1, log_beta2, eps,
    K: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GK: tl.constexpr, GH: tl.constexpr, ROWS: tl.constexpr,
    SHARED: tl.constexpr, DENSE: tl.constexpr, RUN: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
    UPDATES: tl.constexpr,
):  # fmt: skip
    """Steps ``begin`` to ``end`` of a fit.

    ``state (blocks, 3, total)``: each of a group's ``blocks`` programs has moments of its own, the first also the
    ``weights (total,)``, which lie in it; ``taken (groups,)`` counts the steps that were not refused. With several
    programs (``SHARED``), ``parts (2, blocks, total)`` holds what they find in a step and in the next, and
    ``counts (groups,)`` how often they have met. ``SUMS`` and ``UPDATES``: the halves of a step that are done; one
    without the other only where programs run one after the other and cannot wait.
    """
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    column, real = _group_columns(columns, group, seeds, K, G, GK, DENSE, RUN)
    place1, mask1 = _first_weights(weights, group, seeds, K, H, G, GK, GH)
    place2, mask2 = _second_weights(weights, group, seeds, K, H, G, GK, GH)
    unit, has_unit = _group_units(weights, group, seeds, H, G, GH)
    place2 += seeds * (H * K)
    unit += seeds * (2 * H * K)
    first = tl.load(weights + place1, mask=mask1, other=0.0)
    second = tl.load(weights + place2, mask=mask2, other=0.0)
    bias = tl.load(weights + unit, mask=has_unit, other=0.0)
    own = state + block * (3 * total)
    counted = tl.load(taken + group)
    for step in range(begin, end):
        half = parts + (step % 2) * blocks * total
        if SUMS:
            sum1, sum2, sum_bias = _gradients(
                y, target, draws + tl.cast(step, tl.int64) * batch, column, real, first, second, bias, block, blocks,
                batch, tiles, features, target_features, GK, GH, ROWS, PRECISION,
            )  # fmt: skip
            if SHARED:
                _store(half + block * total, place1, mask1, place2, mask2, unit, has_unit, sum1, sum2, sum_bias)
                if UPDATES:
                    _meet(counts + group, (step - begin + 1) * blocks)
        if UPDATES:
            if SHARED:
                sum1, sum2, sum_bias = _sum_parts(
                    half, blocks, place1, mask1, place2, mask2, unit, has_unit, total, GK, GH
                )
            # between two seeds of a group there is no weight, and no gradient
            sum1 = tl.where(mask1, sum1 * scale, 0.0)
            sum2 = tl.where(mask2, sum2 * scale, 0.0)
            sum_bias = tl.where(has_unit, sum_bias * scale, 0.0)
            moves = tl.where(_not_finite(sum1) + _not_finite(sum2) + _not_finite(sum_bias) == 0, 1.0, 0.0)
            counted += moves
            # in double precision: 1 - 0.999 keeps four digits of a float
            exponent = tl.maximum(counted, 1.0).to(tl.float64)
            rate = lr / (1.0 - tl.exp(exponent * log_beta1)).to(tl.float32)
            root = (1.0 - tl.exp(exponent * log_beta2)).to(tl.float32)
            first = _adam_in(own, first, place1, mask1, total, sum1, moves, rate, root, share1, share2, eps, False)
            second = _adam_in(own, second, place2, mask2, total, sum2, moves, rate, root, share1, share2, eps, False)
            bias = _adam_in(own, bias, unit, has_unit, total, sum_bias, moves, rate, root, share1, share2, eps, True)
            tl.debug_barrier()  # moments are read by other threads in the next step
    if UPDATES:  # noqa: SIM102  (one is known when it is compiled)
        if block == 0:
            # the others read them before they first met, or are none
            _store(own + 2 * total, place1, mask1, place2, mask2, unit, has_unit, first, second, bias)
            tl.store(taken + group, counted)


@functools.lru_cache(maxsize=256)
def grouping(columns: int, units: int) -> Grouping:
    """How seeds of ``columns`` columns and ``units`` hidden units are put together, and the tile they read at a time.

    ``tests`` compile it and look for spills: weights and sums of a group stay in registers.
    """
    together = max(1, min(_SIDE // columns, _SIDE // units))
    wide, high = max(_SIDE, power_above(together * columns)), max(_SIDE, power_above(together * units))
    large = max(wide, high)
    rows, warps = (64, 4) if large <= _SIDE else (32, 8) if large <= 32 else (16, 8)
    return Grouping(together, wide, high, rows, warps)


def precision_for(plan: Grouping) -> str:
    """How products are made: ``tf32x3``, three on the matrix units, as good as fp32, or ``ieee``, fp32 without them.

    Operands of large groups would not stay in registers when they are split for the former.
    """
    return "tf32x3" if max(plan.columns, plan.units) <= _SIDE else "ieee"


def blocks_for(groups: int, batch: int, plan: Grouping, multiprocessors: int) -> int:
    """Programs a group: all of them must be at work at once, because they wait for each other."""
    room = multiprocessors * max(1, _WARPS // plan.warps)
    return max(1, min(room // groups, batch // (plan.rows * _LEAST_TILES)))


def fit(
    w1: Tensor, b1: Tensor, w2: Tensor, columns: Tensor, y_NF: Tensor, target_NF: Tensor, draws_TB: Tensor, lr: float,
    eps: float, *, runs: int, plan: Grouping | None = None, blocks: int | None = None, precision: str | None = None,
) -> None:  # fmt: skip
    """Run all steps; arguments as of :func:`esper.kasmina.ops.fit.fit`, ``columns (S, K)`` int32.

    ``runs`` as of :class:`esper.kasmina.ops.graft.Seats`; ``blocks``: programs a group; ``precision`` as of
    :func:`precision_for`.
    """
    steps, batch = draws_TB.shape
    if steps == 0 or batch == 0:
        return
    device, (seeds, units, width) = w1.device, w1.shape
    y_NF, target_NF = y_NF.contiguous(), target_NF.contiguous()
    plan = grouping(width, units) if plan is None else plan
    groups = -(-seeds // plan.seeds)
    blocks = blocks_for(groups, batch, plan, multiprocessors(device)) if blocks is None else blocks
    state = torch.zeros(blocks, 3, w1.numel() + w2.numel() + b1.numel(), device=device)
    weights, total = state[0, 2], state.shape[2]
    own = weights.split([w1.numel(), w2.numel(), b1.numel()])
    for value, part in zip((w1, w2, b1), own, strict=True):
        part.view(value.shape).copy_(value)
    counts = torch.zeros(2, groups, device=device)  # zeros are zeros in any type
    parts = torch.empty(2 * blocks * total if blocks > 1 else 0, device=device)
    launch: Any = functools.partial(
        fit_kernel[(groups * blocks,)],
        y_NF, target_NF, _beside(draws_TB, device), columns, weights, state, counts[0], parts,
        counts[1].view(torch.int32), **_sizes(plan, width, units, runs), PRECISION=precision or precision_for(plan),
        SHARED=blocks > 1, batch=batch, tiles=-(-batch // (plan.rows * blocks)), features=y_NF.shape[1],
        target_features=target_NF.shape[1], seeds=seeds, groups=groups, blocks=blocks, total=total,
        scale=2.0 / (batch * seeds * width), lr=lr, share1=1.0 - _BETAS[0], share2=1.0 - _BETAS[1],
        log_beta1=math.log(_BETAS[0]), log_beta2=math.log(_BETAS[1]), eps=eps, launch_cooperative_grid=blocks > 1,
    )  # fmt: skip
    if dispatch.INTERPRETED and blocks > 1:
        # programs run one after the other here: none could wait for another
        for step in range(steps):
            launch(begin=step, end=step + 1, SUMS=True, UPDATES=False)
            launch(begin=step, end=step + 1, SUMS=False, UPDATES=True)
    else:
        with on_device_of((y_NF,)):
            launch(begin=0, end=steps, SUMS=True, UPDATES=True)
    for value, part in zip((w1, w2, b1), own, strict=True):
        value.copy_(part.view(value.shape))


def _sizes(plan: Grouping, width: int, units: int, runs: int) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "K": width, "H": units, "G": plan.seeds, "GK": plan.columns, "GH": plan.units, "ROWS": plan.rows,
        "DENSE": runs >= _WHOLE_RUNS and plan.is_full(width), "RUN": math.gcd(min(runs, 8), plan.seeds * width),
        "num_warps": plan.warps, "num_stages": plan.stages,
    }  # fmt: skip


def _beside(draws: Tensor, device: torch.device) -> Tensor:
    """Row numbers in int32 on ``device``, uploaded without waiting for it."""
    draws = draws.to(torch.int32).contiguous()
    if device.type == "cuda" and not draws.is_cuda:
        return draws.pin_memory().to(device, non_blocking=True)
    return draws.to(device)


@functools.lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; one elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
