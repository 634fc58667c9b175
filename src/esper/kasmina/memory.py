"""How much memory is free, what is made smaller where that is little (chunks at attach, captures at germination), and
what is kept in the CPU's memory instead of a GPU's.

Nothing here frees or reserves anything. Callers ask :func:`free_bytes` through this module, so that a test, or a
machine with other means, can put its own reading there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from esper.config import CaptureConfig

if TYPE_CHECKING:
    from esper.kasmina.discovery import SitePlan

TELEMETRY_SHARE = 0.01
"""Most of the free memory that telemetry of all sites may take."""
CAPTURE_SHARE = 0.25
"""Most of the free memory that captures may take, under the ceiling of ``capture.max_bytes``."""
TRAINING_SHARE = 0.05
"""Most that captures may take by default of what the training itself takes at its peak, where a GPU tells that; ..."""
LEAST_CAPTURES = 64 << 20
"""... but so much in any case."""
SUMS_SHARE = 0.25
"""Most of the free memory that a regression's sums over several sites may take at once."""
BYTES_A_CHUNK = 16
"""Mean, variance, gradient energy and size, fp32."""
BYTES_A_FEATURE = 8
"""The chunk of each feature, int64."""
_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on ``device`` at the worst moment of a step so far; ``None`` where nobody can tell.

    On a GPU what PyTorch's allocator holds in reserve counts as free, up to the largest use there has been.
    """
    if device.type == "cuda":
        unclaimed, _ = torch.cuda.mem_get_info(device)
        return unclaimed + max(0, torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device))
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory; from a GPU into pinned memory, behind what its stream has yet to do.

    Nothing is held on the GPU for it, and nobody waits: an event behind it tells when it is complete.
    """
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True)
    pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return pinned.copy_(tensor.detach(), non_blocking=True)


class Parked:
    """Copies of tensors in the CPU's memory, begun at once; nobody waits before they are read."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        given = list(tensors)
        self.copies = [to_host(tensor) for tensor in given]
        self._copied = marks(tensor.device for tensor in given)

    def wait(self) -> None:
        """Until the copies are complete."""
        for event in self._copied:
            event.synchronize()
        self._copied = []


def is_scarce(device: torch.device) -> bool:
    """Whether what nobody computes with should lie elsewhere."""
    return device.type == "cuda"


def marks(devices: Iterable[torch.device]) -> list[Any]:
    """Events behind all that was asked of these devices' present streams; one a GPU."""
    events: list[Any] = []
    for device in dict.fromkeys(device for device in devices if device.type == "cuda"):
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return events


def fit_chunks(plans: Sequence[SitePlan], fixed: Collection[str]) -> tuple[list[SitePlan], tuple[str, ...]]:
    """Sites with no more chunks than their telemetry has room for, and what was changed, in words.

    Parameters
    ----------
    fixed:
        Sites whose chunks the layer itself demands; they stay as they are.
    """
    found = list(plans)
    notes: list[str] = []
    for device in dict.fromkeys(plan.weight.device for plan in plans):
        free = free_bytes(device)
        here = [number for number, plan in enumerate(plans) if plan.weight.device == device]
        needed = sum(telemetry_bytes(plans[number]) for number in here)
        if free is None or needed <= TELEMETRY_SHARE * free:
            continue
        room = TELEMETRY_SHARE * free - sum(BYTES_A_FEATURE * plans[n].info.out_features for n in here)
        share = max(0.0, room / sum(BYTES_A_CHUNK * plans[n].info.num_chunks for n in here))
        asked = chosen = 0
        for number in here:
            info = plans[number].info
            chunks = info.num_chunks if info.name in fixed else max(1, int(info.num_chunks * share))
            asked, chosen = asked + info.num_chunks, chosen + chunks
            found[number] = replace(plans[number], info=msgspec.structs.replace(info, num_chunks=chunks))
        if chosen < asked:
            notes.append(
                f"{chosen:,} chunks instead of {asked:,} on {len(here)} sites: {in_mib(free)} are free on {device} and "
                f"telemetry takes at most {TELEMETRY_SHARE:.0%} of that"
            )
    return found, tuple(notes)


def telemetry_bytes(plan: SitePlan) -> int:
    """What watching a site takes on its device."""
    return BYTES_A_FEATURE * plan.info.out_features + BYTES_A_CHUNK * plan.info.num_chunks


def used_bytes(device: torch.device) -> int | None:
    """Bytes that the training has needed at its worst moment so far; ``None`` where nobody can tell.

    What PyTorch's allocator holds in reserve counts: its own record of the largest use may have been reset.
    """
    if device.type != "cuda":
        return None
    return max(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device))


def capture_budget(asked: int, device: torch.device, held: int, used: int | None = None) -> tuple[int, str | None]:
    """Bytes that captures may take on ``device``, and why they are fewer than ``asked``, if so.

    Parameters
    ----------
    held:
        What captures hold there already: it is not free any more, but theirs.
    used:
        What the training takes at its worst moment, if known: beside it captures stay small where ``asked`` is the
        default.
    """
    allowed, why = asked, ""
    if used is not None and asked == CaptureConfig.max_bytes:
        small = max(LEAST_CAPTURES, int(TRAINING_SHARE * used))
        if small < allowed:
            allowed = small
            why = (
                f"the training takes {in_mib(used)} on {device}, and by default they take {TRAINING_SHARE:.0%} of that "
                f"or {in_mib(LEAST_CAPTURES)}"
            )
    free = free_bytes(device)
    if free is not None and int(CAPTURE_SHARE * (free + held)) < allowed:
        allowed = int(CAPTURE_SHARE * (free + held))
        why = f"{in_mib(free)} are free on {device} and they may take {CAPTURE_SHARE:.0%} of that"
    return allowed, f"captures take at most {in_mib(allowed)} instead of {in_mib(asked)}: {why}" if why else None


def in_mib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:,.1f} GiB"


def device_bytes(device: torch.device) -> tuple[int, int] | None:
    """Free and total memory of a GPU, what torch holds and does not use counted as free; ``None`` on the CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
