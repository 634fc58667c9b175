"""What everything costs, in FLOPs (2 a multiply-add; a backward pass counts as two forwards)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

PARTS = ("host", "branches", "fit", "evidence")
"""Where FLOPs go: the host's own training, grown branches in training, isolated fits, held-out evaluations."""


class Ledger:
    """Counts FLOPs by part. All values are floats: a run soon exceeds what an int32 holds on other people's tools."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def add(self, part: str, flops: float) -> None:
        self.spent[part] += flops

    def state(self) -> dict[str, float]:
        """What was spent, by part."""
        return dict(self.spent)

    def restore(self, state: dict[str, float]) -> None:
        """Go on from what :meth:`state` has told."""
        self.spent.update(state)

    @property
    def total(self) -> float:
        return sum(self.spent.values())


def forward_flops(model: nn.Module, run: Callable[[], object]) -> float:
    """FLOPs of the matrix products and convolutions in one call of ``run``."""
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton where there is one: not at import time

    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return float(counter.get_total_flops())
