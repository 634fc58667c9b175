"""A small problem on which the optimizer kernels must agree with their reference before they are used on a device."""

from __future__ import annotations

import torch

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.slot_adam import Rates, Stacks, reference, triton


def _stacks(device: torch.device, *, adaptive: bool) -> Stacks:
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(device)

    shapes = ((3, 2, 4), (3, 2))
    return Stacks(
        values=[draw(*shape) for shape in shapes],
        gradients=[draw(*shape) for shape in shapes],
        firsts=[draw(*shape) for shape in shapes],
        seconds=[draw(*shape).square() for shape in shapes] if adaptive else [],
        steps=torch.tensor([0.0, 5.0, 100.0], device=device),
        bad_steps=torch.zeros((), dtype=torch.int64, device=device),
    )


def check(device: torch.device) -> None:
    """One step of every rule, one slot standing still.

    Raises
    ------
    DisagreementError
        The results differ.
    """
    learning = torch.tensor([True, False, True], device=device)
    for rule in ("adamw", "adam", "sgd"):
        rates = Rates(rule, 0.02, 0.1, momentum=0.9, nesterov=True, warmup_steps=4)
        got, wanted = (_stacks(device, adaptive=rule != "sgd") for _ in range(2))
        triton.step(got, rates, learning, 0.5)
        reference.step(wanted, rates, learning, 0.5)
        pairs = [
            *zip(got.values, wanted.values, strict=True),
            *zip(got.firsts, wanted.firsts, strict=True),
            *zip(got.seconds, wanted.seconds, strict=True),
            (got.steps, wanted.steps),
        ]
        dispatch.agree("slot_adam", pairs, 1e-5)
