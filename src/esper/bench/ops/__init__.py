"""The operations: parity of each, and its times on a GPU. One file an operation, named as in ``esper.kasmina.ops``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, cast

import torch

from esper.bench import parity
from esper.bench.clock import Clock
from esper.bench.record import Line, Record
from esper.kasmina.ops import dispatch

TIMED_ON_GPU = "times of operations: kernels are timed on a GPU only, and PyTorch sees none here"


class Operation(Protocol):
    """What a module here offers."""

    check: Callable[[torch.device, tuple[torch.dtype, ...]], Iterable[Line]]

    def time_rows(self, clock: Clock, *, tiny: bool = False) -> Iterator[Line]: ...


def operation(name: str) -> Operation:
    """The module that checks and times an operation."""
    return cast(Operation, importlib.import_module(f"{__name__}.{name}"))


def check_operation(record: Record, name: str) -> None:
    """Compare an operation, as this device runs it, with float64.

    Raises
    ------
    ParityError
        It differs.
    """
    kernels = dispatch.runs_triton(name, torch.empty(0, device=record.device))
    with parity.poisoned_memory(), parity.exact_products():
        table = parity.refuse_unless_equal(name, operation(name).check(record.device, parity.DTYPES))
    implementation = "triton" if kernels else "reference"
    record.begin(f"ops_{name}", implementation=implementation, parity=table)
    record.tell(f"{name}: {len(table)} parity checks passed ({implementation} against float64)")


def time_operation(record: Record, name: str, clock: Clock, *, tiny: bool = False) -> None:
    """Time an operation that was checked, and note the rate of a copy and the time of a launch beside it."""
    one = torch.zeros(1, device=record.device)
    facts = {"copy_tb_per_s": round(clock.copy_bytes_per_us / 1e6, 3), "launch_us": round(clock.gpu_us(one.zero_), 2)}
    record.files[f"ops_{name}"] |= facts
    for line in operation(name).time_rows(clock, tiny=tiny):
        record.add(f"ops_{name}", line)
