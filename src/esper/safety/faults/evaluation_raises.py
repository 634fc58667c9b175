"""A held-out evaluation that raises."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from esper.safety.faults.fault import FAULTS, Expectation, Fault, InjectedError, Moment, Strikes, Subject


@FAULTS.register("evaluation_raises")
class EvaluationRaises(Fault):
    """What cannot be measured cannot pass a gate; training goes on."""

    does = "every evaluation of the model raises while a cohort is about to be judged"
    moment, expects = Moment.JUDGEMENT, Expectation.SURVIVES
    patience = 60

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()

        def fail(module: nn.Module, args: Any) -> None:
            if not module.training:
                strikes.num += 1
                raise InjectedError("the user's evaluation failed")

        handle = subject.model.register_forward_pre_hook(fail)
        try:
            yield strikes
        finally:
            handle.remove()
