"""What a process holds: memory, handles, threads, temporary files."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

MB = 1e6
_PROC = Path("/proc/self")
_MALLINFO2 = (
    "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
)  # fmt: skip
"""Fields of glibc's ``struct mallinfo2``, all of them ``size_t``."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """``None``: this system does not tell. Memory in MB (1e6 bytes)."""

    memory_mb: float | None
    """Resident set: what the system has given."""
    in_use_mb: float | None
    """Of that, what the C library has handed out. Where it stands still while the resident set rises, nothing is kept:
    freed pieces lie between used ones."""
    gpu_memory_mb: float | None
    handles: int | None
    """Open file descriptors."""
    threads: int
    temporary_files: int
    """In the folder that this process makes its temporary files in."""

    @classmethod
    def now(cls, temporary: Path) -> Resources:
        """Of this process; ``temporary`` must be a folder of its own."""
        return cls(
            memory_mb=_memory_mb(),
            in_use_mb=_in_use_mb(),
            gpu_memory_mb=torch.cuda.memory_allocated() / MB if torch.cuda.is_available() else None,
            handles=_handles(),
            threads=_threads(),
            temporary_files=sum(1 for _ in temporary.iterdir()),
        )


def _memory_mb() -> float | None:
    """Resident set, read from the kernel's own count of pages."""
    try:
        pages = int((_PROC / "statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / MB


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO2)


def _in_use_mb() -> float | None:
    """Bytes handed out in all arenas and as mappings of their own; ``None`` without glibc 2.33 or newer."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None
    ask.restype = _Mallinfo2
    found = ask()
    return (found.uordblks + found.hblkhd) / MB


def _handles() -> int | None:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder)) - 1  # the listing holds one open itself
    return None


def _threads() -> int:
    """Of the operating system where it tells, else Python's own."""
    if sys.platform == "linux":
        return len(os.listdir(_PROC / "task"))
    return threading.active_count()
