"""Under what a forward pass runs: a compiler's trace, a backward pass, function transforms."""

from __future__ import annotations

import torch
from torch import Tensor


def edits(x: Tensor) -> int:
    """How often ``x`` was edited in place; constant where nobody counts (inference mode, a compiler's trace).

    An edit inside a compiled graph shows in the held-out evaluations, which run the model uncompiled.
    """
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


def in_backward() -> bool:
    """True while autograd runs: a forward here is a recomputation (activation checkpointing).

    A compiled graph is traced outside of it and cannot ask again.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # type: ignore[reportPrivateUsage]


def in_transform(tensor: Tensor) -> bool:
    """Whether a function transform (``torch.func``) runs; a compiler traces ordinary calls only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[reportPrivateUsage]


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap is among the function transforms around ``tensor`` (also below ``torch.func.grad``)."""
    functorch = torch._C._functorch  # type: ignore[reportPrivateUsage]
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
