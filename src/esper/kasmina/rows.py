"""How many output rows each site sees in one call: the unit in which branches cost FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from esper.kasmina.discovery import SitePlan
from esper.kasmina.layer_kinds import first_output


def count_rows(plans: Iterable[SitePlan], run: Callable[[], object]) -> tuple[dict[str, int], set[torch.dtype]]:
    """Run once and count, for each site, positions of its tail's output; and the types the outputs had."""
    counted: dict[str, int] = {}
    dtypes: set[torch.dtype] = set()

    def counter(name: str, axis: int) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _args: object, outputs: object) -> None:
            y = first_output(outputs)
            dtypes.add(y.dtype)
            counted[name] = counted.get(name, 0) + y.numel() // y.shape[axis]

        return hook

    handles = [plan.tail.register_forward_hook(counter(plan.info.name, plan.geometry.feature_axis)) for plan in plans]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counted, dtypes
