"""A user's blueprint that fails in the forward pass."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from esper.safety.faults.fault import FAULTS, Expectation, Fault, InjectedError, Moment, Strikes, Subject
from esper.safety.faults.replaced import replaced_in_blueprints


@FAULTS.register("blueprint_forward")
class BlueprintForward(Fault):
    """The branch leaves, the host's own forward pass goes on without it."""

    does = "a blueprint raises in a training forward for a branch that is on trial in it"
    moment, expects = Moment.GRAFTED, Expectation.SURVIVES

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        strikes = Strikes()

        def failing(original: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            kept = [bank.params for site in subject.sites.values() for bank in site.permanent]
            if not kwargs.get("training", True) or any(params is those for those in kept):
                return original(params, *args, **kwargs)
            strikes.num += 1
            raise InjectedError("a user's blueprint failed in the forward pass")

        with replaced_in_blueprints("hidden", failing):
            yield strikes
