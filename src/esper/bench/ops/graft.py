"""Graft: many seeds on one layer's output, forward and backward, against the floor and against vectorised PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper.bench import parity
from esper.bench.clock import Clock, row
from esper.bench.record import Line
from esper.kasmina.ops import dispatch
from esper.kasmina.ops.graft import LARGEST, Seats, graft, reference

CASES = (
    # rows, features, seeds, columns, hidden units, where the columns are
    (50, 64, 6, 4, 8, "chunks"),
    (41, 600, 7, 4, 8, "rising chunks"),
    (40, 64, 3, 8, 8, "rising chunks"),
    (40, 64, 48, 1, 9, "side by side"),
    (40, 64, 8, 4, 20, "side by side"),
    (40, 64, 8, 2, 64, "side by side"),
    (5, 123, 7, 3, 5, "anywhere"),
    (70, 64, 16, 4, 8, "side by side"),
    (40, 96, 20, 1, 8, "anywhere"),
    (40, 64, 8, 4, 8, "side by side"),
    (70, 70, 1, 40, 20, "anywhere"),
    (33, 64, 1, 64, 64, "side by side"),
    (9, 33, 11, 3, 64, "anywhere"),
    (33, 128, 8, 16, 16, "side by side"),
    (1, 5, 1, 1, 1, "anywhere"),
)
SIZES = (
    # rows, features, seeds, columns, hidden units, bar in microseconds for the forward pass
    (8192, 4096, 64, 4, 8, 15.0),
    (8192, 4096, 1024, 4, 8, 100.0),
    (256, 4096, 64, 4, 8, None),
    (32768, 4096, 64, 4, 8, None),
    (8192, 4096, 8, 4, 8, None),
    (8192, 4096, 256, 4, 8, None),
    (8192, 4096, 64, 64, 64, None),
)
WIDTHS = (4, 8, 16, 32, 64, 128, 256, 512)
"""Columns and hidden units a seed, seeds over the whole layer: where do dense matrix products win?"""
TINY = ((20, 32, 4, 4, 8, 15.0),)
TINY_WIDTHS = (16, 256)
_SPEEDUP = 5.0
"""Forward and backward must be this much faster than vectorised PyTorch."""


@dataclass(frozen=True)
class Problem:
    """y, a gradient at the result, parameters of unit scale, and where the seeds sit."""

    y: Tensor
    g: Tensor
    params: dict[str, Tensor]
    seats: Seats

    @classmethod
    def scattered(
        cls, rows: int, features: int, seeds: int, width: int, units: int, where: str, device: torch.device,
        dtype: torch.dtype,
    ) -> Problem:  # fmt: skip
        """Seeds side by side, on features anywhere, or on chunks anywhere, in their order or not."""
        torch.manual_seed(0)
        if where.endswith("chunks"):
            chosen = torch.randperm(features // width)[:seeds]
            chosen = chosen.sort().values if where.startswith("rising") else chosen
            columns = chosen[:, None] * width + torch.arange(width)
        elif where == "side by side":
            columns = torch.arange(seeds * width)
        else:
            columns = torch.randperm(features)[: seeds * width]
        return cls._on(rows, features, columns.view(seeds, width), units, device, dtype)

    @classmethod
    def on_chunks(cls, rows: int, features: int, seeds: int, width: int, units: int, device: torch.device) -> Problem:
        """In bf16, each seed on one of the layer's chunks of ``width`` columns, chosen at random."""
        torch.manual_seed(0)
        chosen = torch.randperm(features // width)[:seeds].sort().values
        columns = chosen[:, None] * width + torch.arange(width)
        problem = cls._on(rows, features, columns, units, device, torch.bfloat16)
        problem.params["alpha"].fill_(1e-3)  # it is added in place again and again
        return problem

    @classmethod
    def _on(
        cls, rows: int, features: int, columns: Tensor, units: int, device: torch.device, dtype: torch.dtype
    ) -> Problem:
        """The gradient follows what the seeds add, so that no derivative is a small difference of large sums."""
        seeds, width = columns.shape
        y, noise = (torch.randn(rows, features, device=device).to(dtype) for _ in range(2))
        params = {
            "w1": torch.randn(seeds, units, width, device=device) / width**0.5,
            "b1": torch.randn(seeds, units, device=device),
            "w2": torch.randn(seeds, width, units, device=device) / units**0.5,
            "alpha": torch.rand(seeds, device=device),
        }
        seats = Seats.of(columns, features, device)
        added = reference.graft(y.float(), *_values(params), seats.flat) - y.float()
        return cls(y, (noise + added).to(dtype), params, seats)

    def run(self, *, writable: bool = True) -> Tensor:
        return graft(self.y, *_values(self.params), self.seats, writable=writable)

    def run_vectorised(self) -> Tensor:
        return vectorised(self.y, *_values(self.params), self.seats.flat)


def _values(params: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return params["w1"], params["b1"], params["w2"], params["alpha"]


def _gradients(y: Tensor, g: Tensor, params: dict[str, Tensor], seats: Seats, *, mode: str) -> dict[str, Tensor]:
    """Value and all gradients, through autograd."""
    leaf = y.detach().clone().requires_grad_()
    weights = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    here = leaf.clone() if mode == "in place" else leaf  # a leaf's own memory is not for writing
    if mode == "exact":
        out = reference.graft(here, *_values(weights), seats.flat)
    else:
        out = graft(here, *_values(weights), seats, writable=mode == "in place")
    found = torch.autograd.grad(out, [leaf, *weights.values()], g)
    return {"value": out.detach()} | dict(zip(["y", *weights], found, strict=True))


def check(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Line]:
    """Value and every gradient in a new tensor and in place; on a GPU twice, for the same bits."""
    for dtype in dtypes:
        if dispatch.runs_triton("graft", torch.empty(0, device=device)):
            yield _several_tiles(device, dtype)
        for rows, features, seeds, width, units, where in CASES:
            case = (rows * parity.scale_of(device), features, seeds, width, units, where)
            problem = Problem.scattered(*case, device, dtype)
            exactly = {name: value.double() for name, value in problem.params.items()}
            wanted = _gradients(problem.y.double(), problem.g.double(), exactly, problem.seats, mode="exact")
            for mode in ("new tensor", "in place"):
                got = _gradients(problem.y, problem.g, problem.params, problem.seats, mode=mode)
                again = got
                if device.type == "cuda":
                    again = _gradients(problem.y, problem.g, problem.params, problem.seats, mode=mode)
                line = parity.compare(f"{case}, {mode}", dtype, {name: (got[name], wanted[name]) for name in wanted})
                yield line | {"equal": line["equal"] and all(torch.equal(got[n], again[n]) for n in got)}


def _several_tiles(device: torch.device, dtype: torch.dtype) -> Line:
    """Three tiles a program, as on large outputs, against one."""
    from esper.kasmina.ops.graft import triton as kernels

    problem = Problem.scattered(70 * parity.scale_of(device), 40, 6, 4, 8, "anywhere", device, dtype)
    y, seats = problem.y, problem.seats
    results: list[dict[str, Tensor]] = []
    for tiles in (1, 3):
        out, gy, read = y.clone(), problem.g.clone(), y.new_empty(y.shape[0], seats.flat.numel())
        values = (*_values(problem.params), seats.columns)
        kernels.forward(y, out, read, *values, runs=seats.runs, tiles=tiles)
        found = kernels.backward(
            problem.g, read, gy, *values, seats.own, runs=seats.runs, read_runs=seats.own_runs, weights=True,
            tiles=tiles,
        )  # fmt: skip
        results.append(dict(zip(("value", "read", "y", "weights"), (out, read, gy, found), strict=True)))
    one, several = results
    return parity.compare("three tiles a program", dtype, {name: (several[name], one[name]) for name in one})


def vectorised(y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, flat: Tensor) -> Tensor:
    """Gather, two batched products with their biases, scatter: the fast way in plain PyTorch."""
    seeds, _, width = w1.shape
    x = y.index_select(-1, flat).view(y.shape[0], seeds, width).transpose(0, 1)
    z = torch.baddbmm(b1[:, None].to(y.dtype), x, w1.transpose(1, 2).to(y.dtype))
    delta = torch.bmm(torch.nn.functional.silu(z), (w2 * alpha[:, None, None]).transpose(1, 2).to(y.dtype))
    return y.index_add(-1, flat, delta.transpose(0, 1).reshape(y.shape[0], -1))


def time_rows(clock: Clock, *, tiny: bool = False) -> Iterator[Line]:
    """Two lines a size, the bars first; then wider and wider seeds over a whole layer."""
    for rows, features, seeds, width, units, bar in TINY if tiny else SIZES:
        problem = Problem.on_chunks(rows, features, seeds, width, units, clock.device)
        facts = {"rows": rows, "features": features, "seeds": seeds, "columns": width, "hidden": units}
        yield _forward(clock, problem, bar, facts)
        yield _both_ways(clock, problem, facts)
    rows, features = (16, 256) if tiny else (8192, 4096)
    for width in TINY_WIDTHS if tiny else WIDTHS:
        problem = Problem.on_chunks(rows, features, features // width, width, width, clock.device)
        yield _against_dense(clock, problem, {"rows": rows, "features": features, "columns": width, "hidden": width})


def _work(problem: Problem) -> tuple[float, float]:
    """Bytes that the columns of all seeds have, read and written, and FLOPs of their branches."""
    seeds, units, width = problem.params["w1"].shape
    rows, size = problem.y.shape[0], problem.y.element_size()
    return 2.0 * rows * seeds * width * size, 4.0 * rows * seeds * width * units


@torch.no_grad()
def _forward(clock: Clock, problem: Problem, bar: float | None, facts: dict[str, Any]) -> Line:
    num_bytes, flops = _work(problem)
    ours, theirs = clock.gpu_us(problem.run), clock.gpu_us(problem.run_vectorised)
    more: dict[str, Any] = {"eager_gpu_us": theirs, "over_eager": theirs / ours}
    more["dirty_gpu_us"] = clock.gpu_us(problem.run, dirty=True)
    if dispatch.runs_triton("graft", problem.y):
        from esper.bench.ops import touch

        more["touch_us"] = min(clock.gpu_us(call) for call in touch.calls(problem.y, problem.seats.flat))
    return row(
        "forward", clock, ours=ours, num_bytes=num_bytes, flops=flops, bar=bar, wall_us=clock.wall_us(problem.run),
        **more, **facts,
    )  # fmt: skip


def _both_ways(clock: Clock, problem: Problem, facts: dict[str, Any]) -> Line:
    y = problem.y.detach().requires_grad_()
    params = {n: v.detach().requires_grad_(n != "alpha") for n, v in problem.params.items()}
    leaves = [y, *(value for name, value in params.items() if name != "alpha")]

    def ours() -> object:
        return torch.autograd.grad(graft(y, *_values(params), problem.seats, writable=True), leaves, problem.g)

    def theirs() -> object:
        return torch.autograd.grad(vectorised(y, *_values(params), problem.seats.flat), leaves, problem.g)

    share = problem.seats.flat.numel() / y.shape[1]
    size = y.numel() * y.element_size()
    # forward: read, write and (unless all are covered) keep the columns; backward: read and write all of the gradient
    num_bytes = size * (2 * share + (0 if problem.seats.whole else share)) + size * (2 + share)
    mine, other = clock.gpu_us(ours), clock.gpu_us(theirs)
    return row(
        "forward + backward", clock, ours=mine, num_bytes=num_bytes, flops=3 * _work(problem)[1],
        bar=other / _SPEEDUP, wall_us=clock.wall_us(ours), eager_gpu_us=other, over_eager=other / mine, **facts,
    )  # fmt: skip


@torch.no_grad()
def _against_dense(clock: Clock, problem: Problem, facts: dict[str, Any]) -> Line:
    """What the code takes for seeds of this width, batched dense products, and the kernels where they are not taken."""
    num_bytes, flops = _work(problem)
    width, largest = problem.params["w1"].shape[2], LARGEST[problem.y.dtype]
    dense = clock.gpu_us(problem.run_vectorised)
    more: dict[str, Any] = {"path": "kernel" if width <= largest else "dense products", "dense_gpu_us": dense}
    # one step beyond is enough to see why: programs of still wider seeds take minutes to compile and do not fit either
    if largest < width <= 2 * largest and dispatch.runs_triton("graft", problem.y):
        more["kernel_gpu_us"] = _kernel_us(clock, problem)
    return row("width", clock, ours=clock.gpu_us(problem.run), num_bytes=num_bytes, flops=flops, **more, **facts)


def _kernel_us(clock: Clock, problem: Problem) -> float | str:
    from triton import TritonError

    from esper.kasmina.ops.graft import triton as kernels

    values = (*_values(problem.params), problem.seats.columns)
    try:
        return clock.gpu_us(partial(kernels.forward, problem.y, problem.y, None, *values, runs=problem.seats.runs))
    except (TritonError, RuntimeError) as error:
        return f"does not build ({type(error).__name__})"
