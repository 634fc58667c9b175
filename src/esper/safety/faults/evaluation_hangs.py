"""A held-out evaluation that does not return."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject

HANGS_S = 60.0
"""How long it would hang if nobody broke it off."""


@FAULTS.register("evaluation_hangs")
class EvaluationHangs(Fault):
    """The harness breaks it off; flags, buffers and random streams are then as before, and training goes on."""

    does = "an evaluation of the model hangs while a cohort is about to be judged, until the harness breaks it off"
    moment, expects = Moment.JUDGEMENT, Expectation.SURVIVES
    patience = 60
    time_limit_s = 0.3

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()

        def hang(module: nn.Module, args: Any) -> None:
            if module.training or strikes.num:
                return
            strikes.num += 1
            until = time.monotonic() + HANGS_S
            while time.monotonic() < until:
                time.sleep(0.01)

        handle = subject.model.register_forward_pre_hook(hang)
        try:
            yield strikes
        finally:
            handle.remove()
