"""Is it right? Asked before anything is timed: a wrong kernel never gets a speed-up."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from esper.bench.record import Line
from esper.errors import EsperError

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative difference (norm over norm) from float64, by the type that is computed in."""
DTYPES = tuple(TOLERANCES)


class ParityError(EsperError, ArithmeticError):
    """An operation computes other numbers than float64 does; nothing of it is timed."""


@contextmanager
def poisoned_memory() -> Generator[None, None, None]:
    """Fresh memory holds NaN: what a kernel forgets to write shows."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    was = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        settings.fill_uninitialized_memory = was[1]


@contextmanager
def exact_products() -> Generator[None, None, None]:
    """Matrix products of fp32 are made in fp32: TF32, which timings may use, keeps eleven bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def scale_of(device: torch.device) -> int:
    """Factor on the sizes of parity cases: on a GPU they fill several tiles, in the interpreter minutes count."""
    return 7 if device.type == "cuda" else 1


def difference(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; infinite for NaN."""
    value = float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def compare(name: str, dtype: torch.dtype, pairs: dict[str, tuple[Tensor, Tensor]]) -> Line:
    """One line of a parity table; ``equal`` says whether every pair (got, wanted) is within the type's tolerance."""
    found = {key: difference(got, wanted) for key, (got, wanted) in pairs.items()}
    equal = all(value <= TOLERANCES[dtype] for value in found.values())
    return {"case": name, "dtype": str(dtype).removeprefix("torch."), "equal": equal, "differences": found}


def refuse_unless_equal(operation: str, checks: Iterable[Line]) -> list[Line]:
    """All lines of the parity table.

    Raises
    ------
    ParityError
        One of them differs.
    """
    table = list(checks)
    wrong = [line for line in table if not line["equal"]]
    if wrong:
        raise ParityError(
            f"{operation} must compute what float64 does, {len(wrong)} of {len(table)} checks differ, the first: "
            f"{json.dumps(wrong[0])}; nothing of it is timed, ESPER_OPS=reference takes the plain path meanwhile"
        )
    return table
