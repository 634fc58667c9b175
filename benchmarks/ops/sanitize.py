"""Every kernel under NVIDIA's compute-sanitizer: memcheck and racecheck, or the tools named by ``--tools``.

Run from the repository root, on a machine with a GPU and compute-sanitizer::

    PYTHONPATH=src python benchmarks/ops/sanitize.py --out benchmarks/results/ops_sanitizer.json

One process a tool runs every variant of every kernel once (``--walk``), on the shapes of the parity checks; it compares
nothing, for under a tool PyTorch's own kernels would take most of the time. A walk without a tool comes first: it
compiles the kernels, so that no compiler runs under a tool. Exits with 1 if a tool reports an error or takes too long.
Results are on file after each of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.bench.ops import fit as fits
from esper.bench.ops import graft as grafts
from esper.bench.ops import slot_adam as steps
from esper.bench.ops import telemetry as statistics
from esper.kasmina.ops import dispatch
from esper.kasmina.ops.fit import triton as fit_kernels
from esper.kasmina.ops.graft import graft
from esper.kasmina.ops.graft import triton as graft_kernels
from esper.kasmina.ops.slot_adam import Rates, step

TOOLS = ("memcheck", "racecheck")
DTYPES = (torch.float32, torch.bfloat16)
"""fp16 takes the paths of bf16: what is read and written lies where bf16's does."""
LIMIT = 300
"""Seconds after which a tool is ended."""
CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------------------------------------
# What is run: inputs are made on the CPU, so that hardly a kernel of PyTorch's runs


def walk(operation: str, device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES) -> int:
    """Launch every variant of an operation's kernels; returns the number of calls."""
    torch.manual_seed(0)
    return sum(1 for _ in WALKS[operation](device, dtypes))


def _telemetry(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[None]:
    for dtype in dtypes:
        for rows, features, chunks, max_rows, _ in statistics.CASES:
            statistics.Problem(torch.randn(rows, features).to(device, dtype), chunks, max_rows)()
            yield
        statistics.Problem(torch.randn(6, 24, 7, 5).to(device, dtype), 8, 50, axis=1)()
        yield


def _graft(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[None]:
    for dtype in dtypes:
        for case in grafts.CASES:
            problem = _moved(grafts.Problem.scattered(*case, CPU, dtype), device)
            values = tuple(problem.params.values())
            with torch.no_grad():
                graft(problem.y, *values, problem.seats)
            for frozen in (True, False):
                leaves = [value.requires_grad_(not frozen) for value in values]
                y = problem.y.clone().requires_grad_()
                # without a graft the memory of a leaf is not for writing
                graft(y.view_as(y) if frozen else y.clone(), *leaves, problem.seats, writable=not frozen).backward(
                    problem.g
                )
                yield
        _several_tiles(_moved(grafts.Problem.scattered(150, 40, 6, 4, 8, "anywhere", CPU, dtype), device))
        yield


def _several_tiles(problem: grafts.Problem) -> None:
    """Three tiles a program, as on large outputs."""
    y, seats = problem.y, problem.seats
    values = (*problem.params.values(), seats.columns)
    out, gy, read = y.clone(), problem.g.clone(), y.new_empty(y.shape[0], seats.flat.numel())
    graft_kernels.forward(y, out, read, *values, runs=seats.runs, tiles=3)
    graft_kernels.backward(
        problem.g, read, gy, *values, seats.own, runs=seats.runs, read_runs=seats.own_runs, weights=True, tiles=3
    )


def _slot_adam(device: torch.device, _: tuple[torch.dtype, ...]) -> Iterator[None]:
    for slots, width, units in steps.CASES:
        for rule in steps.RULES:
            stacks = _moved(steps.stacks(slots, width, units, CPU, rule=rule), device)
            for learning in (None, torch.arange(slots).remainder(3).ne(1).to(device)):
                rates = Rates(rule, 0.02, 0.1, momentum=0.9, nesterov=learning is None, warmup_steps=7)
                step(stacks, rates, learning=learning, inverse_scale=0.5)
                yield


def _fit(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> Iterator[None]:
    """Groups with one program and groups with several, which wait for each other."""
    for dtype in dtypes:
        for case in fits.CASES:
            problem = _moved(fits.Problem.scattered(*case, CPU, dtype), device)
            for blocks in (1, 3):
                fit_kernels.fit(
                    *problem.params, problem.seats.columns, problem.y, problem.target, problem.draws, problem.lr, 1e-8,
                    runs=problem.seats.runs, blocks=blocks,
                )  # fmt: skip
                yield


WALKS = {"telemetry": _telemetry, "graft": _graft, "slot_adam": _slot_adam, "fit": _fit}


def _moved(made: Any, device: torch.device) -> Any:
    """A dataclass with its tensors, however deep, on ``device``."""
    if isinstance(made, Tensor):
        return made.to(device)
    if isinstance(made, list | tuple):
        return [_moved(item, device) for item in made]
    if isinstance(made, dict):
        return {key: _moved(value, device) for key, value in made.items()}
    if dataclasses.is_dataclass(made):
        names = [field.name for field in dataclasses.fields(made)]
        return type(made)(**{name: _moved(getattr(made, name), device) for name in names})  # type: ignore[operator]
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Under which tool


def sanitize(tool: str | None, operations: list[str]) -> dict[str, object]:
    """A walk under one tool, or under none; its summary line, exit status and seconds."""
    prefix = [] if tool is None else ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
    command = [*prefix, sys.executable, __file__, "--walk", "--operations", *operations]
    # the caching allocator would hide reads past the end of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
        status, lines = done.returncode, (done.stdout + done.stderr).splitlines()
    except subprocess.TimeoutExpired:
        status, lines = 124, [f"SUMMARY: not done within {LIMIT} s"]
    if status != 0:
        print("\n".join(lines[-40:]), file=sys.stderr)
    wanted = "SUMMARY" if tool is not None else "calls"
    summary = next((line for line in reversed(lines) if wanted in line), "no summary")
    return {
        "tool": tool or "none", "operations": operations, "status": status, "summary": summary.strip("= "),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--tools", nargs="+", default=TOOLS, help="tools of compute-sanitizer to run")
    parser.add_argument("--operations", nargs="+", default=list(dispatch.OPERATIONS), choices=dispatch.OPERATIONS)
    parser.add_argument("--walk", action="store_true", help="run the kernels in this process, under no tool")
    options = parser.parse_args()
    if options.walk:
        _walk_all(options.operations)
        return
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer was not found; it comes with the CUDA toolkit")
    _compile_ahead(options.operations)
    results: list[dict[str, object]] = []
    for tool in (None, *options.tools):
        results.append(sanitize(tool, options.operations))
        print(json.dumps(results[-1]), flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if any(line["status"] != 0 for line in results):
        sys.exit(1)


def _compile_ahead(operations: list[str]) -> None:
    """Fill Triton's cache from all cores: one process needs minutes for some hundred kernels."""
    jobs = [(operation, dtype) for operation in operations for dtype in DTYPES]
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(_walk_one, *job) for job in jobs]):
            job.exception()  # what fails here fails in the walk below, and is told there


def _walk_one(operation: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda:0")
    dispatch._verdicts[operation, device] = True
    walk(operation, device, (dtype,))


def _walk_all(operations: list[str]) -> None:
    device = torch.device("cpu" if dispatch.INTERPRETED else "cuda:0")
    for operation in operations:
        # taken for granted: the check that comes before the first use would run many kernels that are not ours
        dispatch._verdicts[operation, device] = True
        calls = walk(operation, device, DTYPES[:1] if dispatch.INTERPRETED else DTYPES)
        print(f"{operation}: {calls} calls", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
