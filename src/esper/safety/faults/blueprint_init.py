"""A user's blueprint that fails while its branch is made."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from esper.safety.faults.fault import FAULTS, Expectation, Fault, InjectedError, Moment, Strikes, Subject
from esper.safety.faults.replaced import last_of_cohort, replaced_in_blueprints


@FAULTS.register("blueprint_init")
class BlueprintInit(Fault):
    """The germination is refused, all or nothing: no site keeps a bank of it, no chunk an owner."""

    does = "a blueprint raises while it makes the parameters of a cohort's last site"
    moment, expects = Moment.GERMINATION, Expectation.REFUSED
    patience = 60

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()
        is_last = last_of_cohort(subject)

        def failing(original: Any, *args: Any, **kwargs: Any) -> Any:
            if is_last():
                strikes.num += 1
                raise InjectedError("a user's blueprint failed to make its parameters")
            return original(*args, **kwargs)

        with replaced_in_blueprints("init", failing):
            yield strikes
