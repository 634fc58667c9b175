"""How many bytes of tensors are alive, and how many there have been at most: a GPU's own counters, or a count here."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]  # torch has no public name for it
)
from torch.utils._pytree import tree_leaves


class Meter(Protocol):
    """Counts bytes of tensors."""

    @property
    def now(self) -> int:
        """Bytes alive."""
        ...

    @property
    def peak(self) -> int:
        """Most bytes alive at once since the last :meth:`reset`."""
        ...

    def reset(self) -> None:
        """Let the peak begin anew from what is alive."""
        ...


class Counters:
    """The allocator's own counters of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class Tally(TorchDispatchMode):
    """Counts the storage of every tensor that an operation returns while the mode is on, until it is freed.

    It stands in for a GPU's counters where there is none: sizes and lifetimes are those of the tensors, while memory
    that an operation needs only inside itself is not seen. Gradients and what autograd keeps are counted.

    Parameters
    ----------
    device:
        Type of the device whose tensors are counted.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self._device = device
        self._alive: dict[weakref.ref[Any], int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0

    def reset(self) -> None:
        self.peak = self.now

    def add(self, values: Iterable[Any]) -> None:
        """Count tensors that were there before the mode (those counted already stay counted once)."""
        for value in tree_leaves(list(values)):
            if isinstance(value, Tensor) and value.device.type == self._device:
                self._note(value)

    def uncounted(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``function`` without the mode: its result counts as lying elsewhere."""

        def elsewhere(tensor: Tensor) -> Tensor:
            with _disable_current_modes():
                return function(tensor)

        return elsewhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add([result])
        return result

    def _note(self, tensor: Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a tensor without memory of its own
            return
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]  # what tells storages apart
        if key in self._known:
            return
        num_bytes = storage.nbytes()

        def gone(ref: weakref.ref[Any]) -> None:
            self.now -= self._alive.pop(ref)
            if self._known.get(key) is ref:
                del self._known[key]

        ref = weakref.ref(storage, gone)
        self._alive[ref], self._known[key] = num_bytes, ref
        self.now += num_bytes
        self.peak = max(self.peak, self.now)


def collected(meter: Meter) -> int:
    """Bytes alive once what nobody can reach any more is freed."""
    for _ in range(3):  # what one pass frees may have been all that held something else
        gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return meter.now
