"""Leave no trace: run something with the host without changing flags, buffers, gradients or random streams."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

RandomState = tuple[torch.Tensor, list[torch.Tensor]]


def random_state() -> RandomState:
    """The state of torch's CPU generator and of every CUDA generator, if CUDA runs."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def in_backward() -> bool:
    """True while autograd runs: a forward here is a recomputation (activation checkpointing).

    A compiled graph is traced outside of it and cannot ask again.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # type: ignore[reportPrivateUsage]


def in_transform(tensor: torch.Tensor) -> bool:
    """Whether a function transform (``torch.func``) runs; a compiler traces ordinary calls only."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[reportPrivateUsage]


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether vmap is among the function transforms around ``tensor`` (also below ``torch.func.grad``)."""
    functorch = torch._C._functorch  # type: ignore[reportPrivateUsage]
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


@contextmanager
def replayed_rng(state: RandomState) -> Generator[None, None, None]:
    """Let torch's generators begin at ``state``; every global stream is as before on exit."""
    with preserved_rng():
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])
        yield


@contextmanager
def preserved_rng() -> Generator[None, None, None]:
    """Restore the Python, NumPy, torch CPU and every initialised CUDA generator on exit.

    Iterating even an unshuffled ``DataLoader`` advances the global torch stream.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def preserved_modes(model: nn.Module) -> Generator[None, None, None]:
    """Restore each module's own training flag on exit (a model may mix trained and frozen parts)."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def preserved_buffers(model: nn.Module) -> Generator[None, None, None]:
    """Restore every buffer that was written in place or replaced inside the block."""
    saved: list[tuple[nn.Module, str, torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            saved.append((module, name, buffer, buffer.detach().clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, copy in saved:
                buffer.copy_(copy)
                module._buffers[name] = buffer  # pyright: ignore[reportPrivateUsage]  # keeps its place even if deleted


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode without gradients; flags, buffers and random streams are as before on exit."""
    with preserved_rng(), preserved_modes(model), preserved_buffers(model), torch.no_grad():
        model.eval()
        yield
