"""Every kernel compiles for an A100 (sm_80) and an H100 (sm_90), whether or not a GPU is here."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'esper-morph[triton]'")

from tests.kasmina.ops.ahead_of_time import Launch, recorded, stack_bytes

from esper.bench.ops import slot_adam as optimizer_problems
from esper.bench.ops.telemetry import SAMPLED
from esper.kasmina.ops.fit import triton as fit_kernels
from esper.kasmina.ops.graft import Seats
from esper.kasmina.ops.graft import triton as graft_kernels
from esper.kasmina.ops.slot_adam import Rates
from esper.kasmina.ops.slot_adam import triton as optimizer_kernels
from esper.kasmina.ops.telemetry import triton as telemetry_kernels

pytestmark = pytest.mark.component

CPU = torch.device("cpu")
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Shared memory a program may have."""


def _telemetry(rows: int, features: int, chunks: int, read: int, dtype: torch.dtype) -> Callable[[], list[Launch]]:
    def launches() -> list[Launch]:
        out, y = torch.empty(2, chunks), torch.empty(rows, features, dtype=dtype)
        with recorded(telemetry_kernels) as found:
            telemetry_kernels.chunk_statistics_into(out, y, -1, read)
        return found

    return launches


def _images() -> list[Launch]:
    with recorded(telemetry_kernels) as found:
        telemetry_kernels.chunk_statistics_into(torch.empty(2, 8), torch.empty(4, 24, 6, 6), 1, 50)
    return found


def _chunks(*, rising: bool = False) -> list[Launch]:
    """64 of 1,024 chunks of four columns, anywhere; ``rising``: in order, what lies between is copied."""
    chosen = torch.randperm(1024)[:64, None]
    columns = (chosen.sort(0).values if rising else chosen) * 4 + torch.arange(4)
    seats = Seats.of(columns, 4096, CPU)
    assert seats.rising == rising
    y, weights = torch.empty(8192, 4096, dtype=torch.bfloat16), (torch.empty(64, 8, 4), torch.empty(64, 8))
    values = (*weights, torch.empty(64, 4, 8), torch.empty(64), seats.columns)
    with recorded(graft_kernels) as found:
        graft_kernels.forward(y, y, None, *values, runs=seats.runs, copy=rising)
        if rising:
            graft_kernels.backward(
                y, y[:, :256], y, *values, seats.own, runs=seats.runs, read_runs=seats.own_runs, weights=True, copy=True
            )
    return found


def _graft(
    rows: int, features: int, seeds: int, width: int, units: int, near: bool, dtype: torch.dtype
) -> Callable[[], list[Launch]]:
    def launches() -> list[Launch]:
        columns = torch.arange(seeds * width) if near else torch.randperm(features)[: seeds * width]
        seats = Seats.of(columns.view(seeds, width), features, CPU)
        y, kept = torch.empty(rows, features, dtype=dtype), torch.empty(rows, seeds * width, dtype=dtype)
        weights = [torch.empty(seeds, units, width), torch.empty(seeds, units), torch.empty(seeds, width, units)]
        alpha = torch.empty(seeds)
        with recorded(graft_kernels) as found:
            graft_kernels.forward(y, y, kept, *weights, alpha, seats.columns, runs=seats.runs)
            graft_kernels.backward(
                y, kept, y, *weights, alpha, seats.columns, seats.own,
                runs=seats.runs, read_runs=seats.own_runs, weights=True,
            )  # fmt: skip
        return found

    return launches


def _optimizer(slots: int, rule: str) -> Callable[[], list[Launch]]:
    def launches() -> list[Launch]:
        bank = optimizer_problems.stacks(slots, 4, 8, CPU, rule=rule)
        learning = torch.ones(slots, dtype=torch.bool) if rule == "adam" else None
        with recorded(optimizer_kernels) as found:
            optimizer_kernels.step(bank, Rates(rule, 0.01, 0.1, nesterov=True), learning, 1.0)
        return found

    return launches


def _fit(
    seeds: int, width: int, units: int, blocks: int | None, dtype: torch.dtype, near: bool = False
) -> Callable[[], list[Launch]]:
    """Sixty steps of 8,192 rows; ``blocks``: programs a group."""

    def launches() -> list[Launch]:
        columns = torch.arange(seeds * width) if near else torch.randperm(4096)[: seeds * width]
        seats = Seats.of(columns.view(seeds, width), 4096, CPU)
        weights = [torch.empty(seeds, units, width), torch.empty(seeds, units), torch.empty(seeds, width, units)]
        y, target, draws = torch.empty(8, 4096, dtype=dtype), torch.empty(8, 4096), torch.zeros(60, 8192)
        with recorded(fit_kernels) as found:
            fit_kernels.fit(*weights, seats.columns, y, target, draws, 0.01, 1e-8, runs=seats.runs, blocks=blocks)
        return found

    return launches


CASES = {
    "telemetry-sampled": _telemetry(8192, 4096, 1024, SAMPLED, torch.bfloat16),
    "telemetry-all-rows": _telemetry(8192, 4096, 1024, 8192, torch.bfloat16),
    "telemetry-uneven": _telemetry(8192, 2304, 1024, SAMPLED, torch.float16),
    "telemetry-large-chunks": _telemetry(8192, 4096, 8, 8192, torch.float32),
    "telemetry-many-rounds": _telemetry(300_000, 64, 8, 300_000, torch.bfloat16),
    "telemetry-smallest": _telemetry(1, 1, 1, 1, torch.float32),
    "telemetry-images": _images,
    "graft-64-scattered": _graft(8192, 4096, 64, 4, 8, False, torch.bfloat16),
    "graft-64-chunks": _chunks,
    "graft-64-rising": partial(_chunks, rising=True),
    "graft-1024-of-1024": _graft(8192, 4096, 1024, 4, 8, True, torch.bfloat16),
    "graft-large": _graft(8192, 4096, 64, 64, 64, True, torch.float16),
    "graft-largest": _graft(8192, 4096, 32, 128, 128, True, torch.bfloat16),
    "graft-fp32": _graft(8192, 4096, 64, 4, 8, False, torch.float32),
    "graft-smallest": _graft(1, 1, 1, 1, 1, False, torch.bfloat16),
    "optimizer-adamw": _optimizer(1024, "adamw"),
    "optimizer-one-slot": _optimizer(1, "adam"),
    "optimizer-sgd": _optimizer(64, "sgd"),
    "fit-64": _fit(64, 4, 8, 8, torch.float32),
    "fit-1024": _fit(1024, 4, 8, 1, torch.bfloat16, near=True),
    "fit-large": _fit(64, 64, 64, 2, torch.float32, near=True),
    "fit-smallest": _fit(1, 1, 1, None, torch.float16),
}
WIDE = ("telemetry-all-rows", "telemetry-uneven", "graft-1024-of-1024")


OLDER = (
    "telemetry-sampled",
    "telemetry-all-rows",
    "graft-64-scattered",
    "graft-large",
    "optimizer-adamw",
    "fit-64",
    "fit-large",
)
"""Every kernel once for sm_80 too."""


@pytest.mark.parametrize(("capability", "case"), [(90, case) for case in CASES] + [(80, case) for case in OLDER])
def test_compiles(case: str, capability: int) -> None:
    for launch in CASES[case]():
        compiled = launch.compile(capability)
        assert compiled.asm["cubin"] and f".target sm_{capability}" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_BYTES[capability]


@pytest.mark.parametrize("case", WIDE)
def test_reads_sixteen_bytes_at_a_time(case: str) -> None:
    """Rows of a site are read in the widest loads there are: the kernels are as fast as their bytes."""
    ptx = CASES[case]()[0].compile(90).asm["ptx"]
    assert "ld.global.v4.b32" in ptx or "cp.async.cg.shared.global" in ptx
    assert "ld.global.b16" not in ptx


def test_a_sample_is_read_in_whole_sectors() -> None:
    """A row of 16 columns is a sector of 32 bytes, read by four threads: more threads have loads under way so."""
    ptx = CASES["telemetry-sampled"]()[0].compile(90).asm["ptx"]
    assert "ld.global.v2.b32" in ptx or "ld.global.b64" in ptx
    assert "ld.global.b16" not in ptx


def test_scattered_chunks_of_four_are_read_and_written_eight_bytes_at_a_time() -> None:
    ptx = _chunks()[0].compile(90).asm["ptx"]
    assert "ld.global.v2.b32" in ptx or "ld.global.b64" in ptx or "cp.async.ca.shared.global [" in ptx
    assert "st.global.v2.b32" in ptx or "st.global.b64" in ptx
    assert "ld.global.b16" not in ptx and "st.global.b16" not in ptx


def test_what_lies_between_chunks_is_copied_in_their_runs() -> None:
    for launch in _chunks(rising=True):
        ptx = launch.compile(90).asm["ptx"]
        assert "ld.global.b16" not in ptx and "st.global.b16" not in ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", ["fit-64", "fit-1024", "fit-large"])
def test_a_fit_keeps_its_weights_in_registers_and_has_room_beside_its_like(case: str, capability: int) -> None:
    """Programs that wait for each other are all at work: eight warps and half the shared memory are always there.

    On the stack are no more than some addresses that are used before the first step and after the last.
    """
    (launch,) = CASES[case]()
    compiled = launch.compile(capability)
    assert stack_bytes(compiled.asm["cubin"]) <= 32
    resident = 8 // launch.options["num_warps"]
    assert resident >= 1 and resident * compiled.metadata.shared <= SHARED_BYTES[capability]


def test_programs_of_a_fit_wait_with_acquire_and_release() -> None:
    ptx = CASES["fit-64"]()[0].compile(90).asm["ptx"]
    assert "atom.global.gpu.acq_rel.add" in ptx and "ld.global.cg" in ptx
    assert re.search(r"(ld\.global\.gpu\.acquire|atom\.global\.gpu\.acquire)", ptx) is not None
    alone = CASES["fit-1024"]()[0].compile(90).asm["ptx"]
    assert re.search(r"\b(atom|red)\.", alone) is None, "one program a group waits for nobody"


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("telemetry")])
def test_statistics_use_no_atomics(case: str) -> None:
    for launch in CASES[case]():
        ptx = launch.compile(90).asm["ptx"]
        assert re.search(r"\b(atom|red)\.", ptx) is None


def test_every_kernel_is_compiled_for_both() -> None:
    modules = (telemetry_kernels, graft_kernels, optimizer_kernels, fit_kernels)
    every = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    for cases in (CASES, OLDER):
        compiled = {launch.kernel.__name__ for case in cases for launch in CASES[case]()}
        assert compiled == every and len(every) >= 7
