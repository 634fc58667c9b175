"""A device that has no memory left when a cohort germinates."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject
from esper.safety.faults.replaced import last_of_cohort, replaced_in_blueprints


@FAULTS.register("out_of_memory")
class OutOfMemory(Fault):
    """The germination is refused, and what the cohort's first sites had been given is free again."""

    does = "the allocation for a cohort's last site raises torch.OutOfMemoryError"
    moment, expects = Moment.GERMINATION, Expectation.REFUSED
    patience = 60

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()
        is_last = last_of_cohort(subject)

        def allocating(original: Any, *args: Any, **kwargs: Any) -> Any:
            if is_last():
                strikes.num += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
            return original(*args, **kwargs)

        with replaced_in_blueprints("init", allocating):
            yield strikes
