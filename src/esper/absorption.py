"""Move what was grown into the host's own layers in the middle of a run, and go on growing from there."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from esper import export as exporting
from esper.errors import AbsorbError
from esper.export.absorb import absorb, refusal
from esper.journal import Journal
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.protocol import Absorbed
from esper.trials import Trials


class Run(Protocol):
    """What an absorption reads and changes: a grower, seen from here."""

    model: nn.Module
    kasmina: Kasmina
    clock: HostClock
    journal: Journal
    trials: Trials

    def export(self, *, tolerance: float | None = None) -> nn.Module: ...

    def rediscover(self) -> None: ...


def absorb_growth(run: Run, *, tolerance: float | None = None) -> Absorbed:
    """See :meth:`esper.Grower.absorb`."""
    step, before = run.clock.steps, run.kasmina.host_params
    if not exporting.grown_sites(run.kasmina):
        return Absorbed(step=step, layers=(), params=0)
    run.clock.let_go()
    try:
        reason = refusal(run.model, run.kasmina, run.clock.optimizers)
        if run.trials.twins:
            reason = f"a twin of cohort {min(run.trials.twins)} still trains beside the host; wait for its score"
        if reason is not None:
            raise AbsorbError(f"growth moves into the host's own tensors only when nothing else holds them: {reason}")
        plain = run.export(tolerance=tolerance)  # refuses before anything is changed
        layers = absorb(run.model, plain, run.kasmina, run.clock.optimizers)
        run.rediscover()
    finally:
        run.clock.follow(run.kasmina.plans.values())
    absorbed = Absorbed(step=step, layers=layers, params=run.kasmina.host_params - before)
    run.journal.emit(absorbed)
    return absorbed
