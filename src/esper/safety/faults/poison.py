"""A number that is not finite, put into what a model computes on; shared by the faults of a batch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.safety.faults.fault import Strikes


@contextmanager
def poisoned(model: nn.Module, value: float) -> Generator[Strikes]:
    """Every training forward reads ``value`` in the first element of its first row.

    A model that reads no floating numbers (tokens) gets it in the first element of what it puts out. Evaluations are
    left alone.
    """
    strikes = Strikes()

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not _trains(module):
            return None
        for place, arg in enumerate(args):
            if isinstance(arg, Tensor) and arg.is_floating_point():
                strikes.num += 1
                return (*args[:place], _with(arg, value), *args[place + 1 :])
        return None

    def on_output(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        reads_numbers = any(isinstance(arg, Tensor) and arg.is_floating_point() for arg in args)
        if not _trains(module) or reads_numbers or not isinstance(out, Tensor):
            return None
        strikes.num += 1
        return _with(out, value)

    handles = [model.register_forward_pre_hook(on_input), model.register_forward_hook(on_output)]
    try:
        yield strikes
    finally:
        for handle in handles:
            handle.remove()


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _with(tensor: Tensor, value: float) -> Tensor:
    """A copy with one element spoilt; of a token model's output, the gradient is spoilt with it."""
    spoilt = torch.zeros_like(tensor)
    spoilt.view(-1)[0] = value
    return tensor + spoilt * tensor
