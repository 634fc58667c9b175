"""Graft: many seeds on one layer's output, forward and backward, against the floor and against vectorised PyTorch.

Run from the repository root, on a machine with a GPU (some twenty seconds)::

    PYTHONPATH=src:. python benchmarks/ops/graft.py --out benchmarks/results/ops_graft.json
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.ops import measure
from torch import Tensor

from esper.kasmina.ops.graft import Seats, graft, reference
from esper.kasmina.ops.graft import triton as kernels

CASES = (
    # rows, features, seeds, columns, hidden units, whether the columns are neighbours
    (5, 123, 7, 3, 5, False),
    (70, 64, 16, 4, 8, True),
    (40, 96, 20, 1, 8, False),
    (40, 64, 8, 4, 8, True),
    (70, 70, 1, 40, 20, False),
    (33, 64, 1, 64, 64, True),
    (9, 33, 11, 3, 64, False),
    (33, 128, 8, 16, 16, True),
    (1, 5, 1, 1, 1, False),
)


def _problem(
    rows: int, features: int, seeds: int, width: int, units: int, near: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor], Seats]:
    """y, a gradient at the result, parameters of unit scale, and where the seeds sit: side by side or anywhere.

    The gradient follows what the seeds add, so that no derivative is a small difference of large sums.
    """
    torch.manual_seed(0)
    columns = torch.arange(seeds * width) if near else torch.randperm(features)[: seeds * width]
    return _filled(rows, features, columns.view(seeds, width), units, device, dtype)


def _chunks(rows: int, features: int, seeds: int, width: int, units: int) -> tuple[Tensor, Tensor, Any, Seats]:
    """The same on the card in bf16, each seed on one of the layer's chunks of ``width`` columns, chosen at random."""
    torch.manual_seed(0)
    chosen = torch.randperm(features // width)[:seeds].sort().values
    columns = chosen[:, None] * width + torch.arange(width)
    return _filled(rows, features, columns, units, torch.device("cuda"), torch.bfloat16)


def _filled(
    rows: int, features: int, columns: Tensor, units: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor], Seats]:
    seeds, width = columns.shape
    y, noise = (torch.randn(rows, features, device=device).to(dtype) for _ in range(2))
    params = {
        "w1": torch.randn(seeds, units, width, device=device) / width**0.5,
        "b1": torch.randn(seeds, units, device=device),
        "w2": torch.randn(seeds, width, units, device=device) / units**0.5,
        "alpha": torch.rand(seeds, device=device),
    }
    seats = Seats.of(columns, features, device)
    added = reference.graft(y.float(), *params.values(), seats.flat) - y.float()
    return y, (noise + added).to(dtype), params, seats


def _gradients(y: Tensor, g: Tensor, params: dict[str, Tensor], seats: Seats, *, mode: str) -> dict[str, Tensor]:
    """Value and all gradients, through autograd."""
    leaf = y.detach().clone().requires_grad_()
    weights = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    if mode == "exact":
        out = reference.graft(leaf, *weights.values(), seats.flat)
    else:
        out = graft(leaf, *weights.values(), seats, writable=mode == "in place")
    found = torch.autograd.grad(out, [leaf, *weights.values()], g)
    return {"value": out.detach()} | dict(zip(["y", *weights], found, strict=True))


def check(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[dict[str, Any]]:
    """Value and every gradient in a new tensor and in place; on a GPU twice, for the same bits."""
    for dtype in dtypes:
        yield _several_tiles(device, dtype)
        for rows, *sizes in CASES:
            case = (rows * measure.growth(device), *sizes)
            y, g, params, seats = _problem(*case, device, dtype)
            exactly = {name: value.double() for name, value in params.items()}
            wanted = _gradients(y.double(), g.double(), exactly, seats, mode="exact")
            for mode in ("new tensor", "in place"):
                got = _gradients(y, g, params, seats, mode=mode)
                again = _gradients(y, g, params, seats, mode=mode) if device.type == "cuda" else got
                line = measure.compare(f"{case}, {mode}", dtype, {name: (got[name], wanted[name]) for name in wanted})
                yield line | {"equal": line["equal"] and all(torch.equal(got[n], again[n]) for n in got)}


def _several_tiles(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Three tiles a program, as on large outputs, against one."""
    y, g, params, seats = _problem(70 * measure.growth(device), 40, 6, 4, 8, False, device, dtype)
    results: list[dict[str, Tensor]] = []
    for tiles in (1, 3):
        out, gy, read = y.clone(), g.clone(), y.new_empty(y.shape[0], seats.flat.numel())
        values = [*params.values(), seats.columns]
        kernels.forward(y, out, read, *values, runs=seats.runs, tiles=tiles)
        found = kernels.backward(
            g, read, gy, *values, seats.own, runs=seats.runs, read_runs=seats.own_runs, weights=True, tiles=tiles
        )
        results.append(dict(zip(("value", "read", "y", "w1", "b1", "w2"), (out, read, gy, *found), strict=True)))
    one, several = results
    return measure.compare("three tiles a program", dtype, {name: (several[name], one[name]) for name in one})


def vectorised(y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, flat: Tensor) -> Tensor:
    """Gather, two batched products with their biases, scatter: the fast way in plain PyTorch."""
    seeds, _, width = w1.shape
    x = y.index_select(-1, flat).view(y.shape[0], seeds, width).transpose(0, 1)
    z = torch.baddbmm(b1[:, None].to(y.dtype), x, w1.transpose(1, 2).to(y.dtype))
    delta = torch.bmm(torch.nn.functional.silu(z), (w2 * alpha[:, None, None]).transpose(1, 2).to(y.dtype))
    return y.index_add(-1, flat, delta.transpose(0, 1).reshape(y.shape[0], -1))


ROWS = (
    # rows, seeds, columns, hidden units, bar in microseconds for the forward pass
    (256, 64, 4, 8, None),
    (8192, 64, 4, 8, 15.0),
    (32768, 64, 4, 8, None),
    (8192, 256, 4, 8, None),
    (8192, 1024, 4, 8, 100.0),
    (8192, 64, 64, 64, None),
)


def time_rows(clock: measure.Clock, sweep: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for rows, seeds, width, units, bar in ROWS:
        y, g, params, seats = _chunks(rows, 4096, seeds, width, units)
        params["alpha"].fill_(1e-3)  # it is added in place again and again
        facts = {"rows": rows, "features": 4096, "seeds": seeds, "columns": width, "hidden": units}
        lines.append(_forward(clock, y, params, seats, bar, facts))
        lines.append(_both_ways(clock, y, g, params, seats, facts))
        if sweep:
            lines += _sweep(clock, y, params, seats, facts)
    return lines


@torch.no_grad()
def _forward(
    clock: measure.Clock, y: Tensor, params: dict[str, Tensor], seats: Seats, bar: float | None, facts: dict[str, Any]
) -> dict[str, Any]:
    call = partial(graft, y, *params.values(), seats, writable=True)
    ours, theirs = clock.gpu_us(call), clock.gpu_us(partial(vectorised, y, *params.values(), seats.flat))
    floor = clock.floor_us(2 * y.shape[0] * seats.flat.numel() * y.element_size())
    more = {"wall_us": clock.wall_us(call), "eager_gpu_us": theirs, "over_eager": theirs / ours}
    return measure.row("forward", ours=ours, floor=floor, bar=bar, **more, **facts)


def _both_ways(
    clock: measure.Clock, y: Tensor, g: Tensor, params: dict[str, Tensor], seats: Seats, facts: dict[str, Any]
) -> dict[str, Any]:
    leaves = [y.requires_grad_(), *(value.requires_grad_() for name, value in params.items() if name != "alpha")]

    def ours() -> object:
        return torch.autograd.grad(graft(y, *params.values(), seats, writable=True), leaves, g)

    def theirs() -> object:
        return torch.autograd.grad(vectorised(y, *params.values(), seats.flat), leaves, g)

    share = seats.flat.numel() / y.shape[1]
    size = y.numel() * 2
    # forward: read, write and (unless all are covered) keep the columns; backward: read and write all of the gradient
    floor = clock.floor_us(size * (2 * share + (0 if seats.whole else share)) + size * (2 + share))
    mine, other = clock.gpu_us(ours, repeats=30), clock.gpu_us(theirs, repeats=30)
    more = {"wall_us": clock.wall_us(ours), "eager_gpu_us": other, "over_eager": other / mine}
    return measure.row("forward + backward", ours=mine, floor=floor, bar=other / 5, **more, **facts)


def _sweep(
    clock: measure.Clock, y: Tensor, params: dict[str, Tensor], seats: Seats, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Other tile heights, tiles a program, warps and stages, forward."""
    lines: list[dict[str, Any]] = []
    plan = kernels.grouping(facts["columns"], facts["hidden"], y.dtype)
    floor = clock.floor_us(2 * y.shape[0] * seats.flat.numel() * 2)
    data, values = y.detach(), [value.detach() for value in params.values()]
    for height in (64, 128, 256):
        for tiles in (1, 2, 4, 8):
            for warps, stages in ((4, 1), (4, 2), (4, 3), (8, 2)):
                other = kernels.Grouping(plan.seeds, plan.columns, plan.units, height, warps, stages)

                shape = {"tile_rows": height, "tiles": tiles, "warps": warps, "stages": stages}
                call = partial(
                    kernels.forward, data, data, None, *values, seats.columns, runs=seats.runs, plan=other, tiles=tiles
                )
                ours = clock.gpu_us(call, repeats=15)
                lines.append(measure.row("sweep", ours=ours, floor=floor, **shape, **facts))
    return lines


if __name__ == "__main__":
    measure.run(__doc__ or "", check, time_rows)
