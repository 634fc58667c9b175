"""Isolated fit: many small seeds trained for many steps, in one launch, against a loop of steps through autograd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from esper.bench import parity
from esper.bench.clock import Clock, row
from esper.bench.record import Line
from esper.kasmina.ops import dispatch
from esper.kasmina.ops.fit import LARGEST, fit, loop
from esper.kasmina.ops.graft import Seats

CASES = (
    # captured rows, features, seeds, columns, hidden units, steps, rows of a step, where the columns are
    (90, 40, 7, 3, 5, 3, 71, "anywhere"),
    (70, 64, 3, 4, 8, 3, 64, "anywhere"),
    (40, 32, 6, 4, 8, 2, 33, "side by side"),
    (50, 48, 2, 16, 16, 2, 40, "side by side"),
    (65, 33, 1, 4, 8, 3, 129, "anywhere"),
    (40, 96, 18, 1, 8, 2, 40, "anywhere"),
    (40, 40, 1, 40, 20, 2, 17, "anywhere"),
    (33, 64, 1, 64, 64, 2, 33, "side by side"),
    (9, 33, 4, 3, 64, 2, 12, "anywhere"),
    (1, 5, 1, 1, 1, 2, 1, "anywhere"),
)
SIZES = (
    # captured rows, features, seeds, columns, hidden units, steps, rows of a step
    (131_072, 4096, 64, 4, 8, 60, 8192),
    (131_072, 4096, 1024, 4, 8, 60, 8192),
    (131_072, 4096, 8, 4, 8, 60, 8192),
    (131_072, 4096, 256, 4, 8, 60, 8192),
    (131_072, 4096, 64, 16, 16, 60, 8192),
    (131_072, 4096, 64, 64, 64, 60, 8192),
    (16_384, 768, 64, 4, 8, 200, 1024),
)
TINY = ((60, 32, 4, 4, 8, 3, 16),)
_REPEATS = 5
"""Of a whole fit, which takes milliseconds."""
_LOOPS = 3
"""Of a loop of steps, which takes a good part of a second."""


@dataclass(frozen=True)
class Problem:
    """Captured rows, what they should become, seeds of unit scale, and the rows of each step."""

    y: Tensor
    target: Tensor
    params: tuple[Tensor, Tensor, Tensor]
    seats: Seats
    draws: Tensor
    lr: float = 0.1
    eps: float = 1e-2
    """As large as the gradients: with a tiny one the last bits of next to nothing decide about a whole step."""

    @classmethod
    def scattered(
        cls, rows: int, features: int, seeds: int, width: int, units: int, steps: int, batch: int, where: str,
        device: torch.device, dtype: torch.dtype,
    ) -> Problem:  # fmt: skip
        """Seeds side by side, on features anywhere, or on chunks anywhere; targets that can be learned in part."""
        torch.manual_seed(0)
        if where == "chunks":
            chosen = torch.randperm(features // width)[:seeds].sort().values
            columns = chosen[:, None] * width + torch.arange(width)
        else:
            columns = torch.arange(seeds * width) if where == "side by side" else torch.randperm(features)
        y = torch.randn(rows, features, device=device).to(dtype)
        target = torch.randn(rows, features, device=device).mul_(0.5).add_(y.float().square_().sub_(1.0))
        params = (
            torch.randn(seeds, units, width, device=device) / width**0.5,
            torch.randn(seeds, units, device=device) * 0.1,
            torch.randn(seeds, width, units, device=device) / units**0.5,
        )
        seats = Seats.of(columns.reshape(-1)[: seeds * width].view(seeds, width), features, device)
        return cls(y, target, params, seats, torch.randint(rows, (steps, batch)))

    def run(self, params: tuple[Tensor, Tensor, Tensor]) -> None:
        """As the product does it."""
        fit(*params, self.seats, self.y, self.target, self.draws, self.lr, self.eps)

    def run_loop(self, params: tuple[Tensor, Tensor, Tensor]) -> None:
        """One step after the other, in the type of ``params``."""
        loop(*params, self.seats, self.y, self.target, self.draws, self.lr, self.eps)

    def copied(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        w1, b1, w2 = (value.to(dtype, copy=True) for value in self.params)
        return w1, b1, w2


def _moves(problem: Problem, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """What the fit has added to each parameter: a start that hardly moves would hide an error."""
    pairs = zip(("w1", "b1", "w2"), got, wanted, problem.params, strict=True)
    return {name: (ours.double() - start.double(), exact - start.double()) for name, ours, exact, start in pairs}


def check(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[Line]:
    """End parameters of every case, of rows in every type; twice, for the same bits; then shared among programs.

    Weights, errors and sums are fp32 whatever the rows are, so the tolerance is that of fp32.
    """
    scale = parity.scale_of(device)
    for dtype in dtypes:
        for rows, features, seeds, width, units, steps, batch, where in CASES:
            case = (rows * scale, features, seeds, width, units, steps, batch * scale, where)
            problem = Problem.scattered(*case, device, dtype)
            wanted = problem.copied(torch.float64)
            problem.run_loop(wanted)
            got, again = problem.copied(), problem.copied()
            problem.run(got)
            if device.type == "cuda":
                problem.run(again)
            same = device.type != "cuda" or all(map(torch.equal, got, again))
            yield _told(f"{case}", dtype, problem, got, wanted, same=same)
        if dispatch.runs_triton("fit", torch.empty(0, device=device)):
            yield from _shared(device, dtype)
    yield _not_finite(device)


def _told(
    name: str, dtype: torch.dtype, problem: Problem, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], *, same: bool
) -> Line:
    line = parity.compare(name, torch.float32, _moves(problem, got, wanted))
    return line | {"equal": line["equal"] and same, "dtype": str(dtype).removeprefix("torch.")}


def _shared(device: torch.device, dtype: torch.dtype) -> Iterator[Line]:
    """Several programs a group, who must wait for each other, whatever the device would take."""
    from esper.kasmina.ops.fit import triton as kernels

    scale = parity.scale_of(device)
    for seeds, width, units, blocks in ((4, 3, 5, 2), (3, 4, 8, 3), (1, 20, 17, 2)):
        problem = Problem.scattered(90, 64, seeds, width, units, 2, 150 * scale, "anywhere", device, dtype)
        wanted, got = problem.copied(torch.float64), problem.copied()
        problem.run_loop(wanted)
        kernels.fit(
            *got, problem.seats.columns, problem.y, problem.target, problem.draws, problem.lr,
            problem.eps, runs=problem.seats.runs, blocks=blocks,
        )  # fmt: skip
        yield _told(f"{seeds} seeds of {width}, {blocks} programs a group", dtype, problem, got, wanted, same=True)


def _not_finite(device: torch.device) -> Line:
    """Rows that are not finite in a step: on a GPU that step changes nothing."""
    problem = Problem.scattered(40, 33, 3, 3, 5, 3, 20, "anywhere", device, torch.float32)
    problem.y[3] = float("nan")
    bad = torch.full_like(problem.draws[:1], 3)
    good = problem.draws.masked_fill(problem.draws == 3, 4)
    wanted, got = problem.copied(torch.float64), problem.copied()
    replace(problem, draws=good).run_loop(wanted)
    if dispatch.runs_triton("fit", problem.y):
        good = torch.cat([good[:1], bad, good[1:]])
    replace(problem, draws=good).run(got)
    return _told("a step of NaN", torch.float32, problem, got, wanted, same=True)


def time_rows(clock: Clock, *, tiny: bool = False) -> Iterator[Line]:
    """One line a size: the whole fit. Rows of a step are on the device before; drawing them is the caller's."""
    for rows, features, seeds, width, units, steps, batch in TINY if tiny else SIZES:
        assert max(width, units) <= LARGEST
        problem = Problem.scattered(
            rows, features, seeds, width, units, steps, batch, "chunks", clock.device, torch.bfloat16
        )
        problem = replace(problem, draws=problem.draws.to(clock.device, torch.int32))
        params = problem.copied()
        brief, briefest = clock.limited(_REPEATS), clock.limited(_LOOPS)
        ours, theirs = brief.gpu_us(partial(problem.run, params)), briefest.gpu_us(partial(problem.run_loop, params))
        taken = steps * batch * seeds
        yield row(
            "whole fit", clock, ours=ours,
            # a step reads its rows' columns, of y in their own type and of the target in fp32
            num_bytes=float(taken * width * (problem.y.element_size() + problem.target.element_size())),
            flops=12.0 * taken * width * units, wall_us=brief.wall_us(partial(problem.run, params)),
            eager_gpu_us=theirs, eager_wall_us=briefest.wall_us(partial(problem.run_loop, params)),
            over_eager=theirs / ours, captured=rows, rows=batch, steps=steps, seeds=seeds, columns=width, hidden=units,
        )  # fmt: skip
