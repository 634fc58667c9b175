"""Launching a kernel again without asking again what it is: what Triton finds out at each launch is kept.

An ordinary launch binds the arguments, works out a specialisation of each, and looks the kernel up by it, which takes
longer than handing it to the driver. Triton specialises on the type of a tensor and on whether it is aligned to 16
bytes, on the value of an integer, and on nothing of a float. Who launches the same kernel in every step says by a *key*
that all of these are as before, and the compiled kernel is called as it is (``kernel[grid](*args)``, as in Triton's own
tutorials).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOWHERE = nullcontext()

_MOST = 1024
"""Launches kept: shapes that vary without end must not fill the memory."""


_kept = [True]


def keep_none() -> None:
    """From now on every launch is an ordinary one: with this version of Triton, what was kept does something else."""
    _kept[0] = False


class Launches:
    """Kernels that were launched before, by key."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Callable[..., object]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def launch(self, key: Hashable, kernel: Any, grid: tuple[int, ...], *args: Any, **options: int) -> None:
        """As ``kernel[grid](*args, **options)``.

        Parameters
        ----------
        key:
            Equal only where kernel, grid, device and options, and of the arguments types, alignment and the values of
            integers and constants are equal.
        args:
            Every argument of the kernel in order, constants included.
        """
        with on_device_of(args):
            self._launch(key, kernel, grid, args, options)

    def _launch(
        self, key: Hashable, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, int]
    ) -> None:
        known = self._known.get(key)
        if known is not None and _kept[0]:
            known(*args)
            return
        compiled = kernel[grid](*args, **options)
        if compiled is not None and len(self._known) < _MOST:  # the interpreter compiles nothing
            self._known[key] = compiled[(*grid, 1, 1)[:3]]


def on_device_of(args: Iterable[Any]) -> AbstractContextManager[Any]:
    """The GPU of the first tensor is the current one inside: Triton launches on that, wherever its arguments lie."""
    device = next((arg.device for arg in args if isinstance(arg, Tensor)), None)
    if device is None or device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOWHERE
    return torch.cuda.device(device)


def alignment(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Where each tensor begins, modulo 16 bytes: a part of a key."""
    return tuple([tensor.data_ptr() & 15 for tensor in tensors])
