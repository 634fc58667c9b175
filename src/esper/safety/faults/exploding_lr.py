"""A learning rate that explodes for a few steps."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.optim import Optimizer

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject

FACTOR = 1e5


@FAULTS.register("exploding_lr")
class ExplodingRate(Fault):
    """Finite numbers at first: only the size of the loss tells."""

    does = f"the learning rate is {FACTOR:g} times itself for three steps while a branch is in the forward pass"
    moment, expects = Moment.GRAFTED, Expectation.RESTORED
    lasts = 3

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()
        rates: dict[int, list[float]] = {}

        def raise_rates(optimizer: Optimizer, *_: Any) -> None:
            rates[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * FACTOR
            strikes.num += 1

        def put_back(optimizer: Optimizer, *_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, rates[id(optimizer)], strict=True):
                group["lr"] = rate

        with ExitStack() as undo:
            for optimizer in subject.optimizers:
                undo.callback(optimizer.register_step_pre_hook(raise_rates).remove)
                undo.callback(optimizer.register_step_post_hook(put_back).remove)
            yield strikes
