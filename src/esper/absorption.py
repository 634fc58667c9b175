"""Move what was grown into the host's own layers in the middle of a run, and go on growing from there."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from esper import export as exporting
from esper.accounts import Accounts
from esper.config import Config
from esper.errors import AbsorbError
from esper.evidence.judge import Judge
from esper.export.absorb import absorb, refusal
from esper.journal import Journal
from esper.kasmina.discovery import Discovery, discover
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.kasmina.isolation import undisturbed
from esper.kasmina.ledger import forward_flops
from esper.protocol import Absorbed
from esper.stages import Stages
from esper.trials import Trials


class Run(Protocol):
    """What an absorption reads and changes: a grower, seen from here."""

    model: nn.Module
    config: Config
    discovery: Discovery
    kasmina: Kasmina
    accounts: Accounts
    judge: Judge
    clock: HostClock
    journal: Journal
    stages: Stages
    trials: Trials

    def export(self, *, tolerance: float | None = None) -> nn.Module: ...


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
        _rediscover(run)
    finally:
        run.clock.follow(run.kasmina.plans.values())
    absorbed = Absorbed(step=step, layers=layers, params=run.kasmina.host_params - before)
    run.journal.emit(absorbed)
    return absorbed


def _rediscover(run: Run) -> None:
    """Find the sites anew after the model's own layers have changed. Every chunk is dormant; counts go on."""
    old, evaluator = run.kasmina, run.judge.evaluator
    old.detach()
    with undisturbed(run.model):
        run.discovery = discover(run.model, evaluator.run_one, run.config.sites)
        probe_flops = forward_flops(run.model, evaluator.run_one)
    run.kasmina = Kasmina(run.model, run.discovery, run.config, adaptive=run.clock.adaptive)
    run.kasmina.go_on_from(old)
    run.accounts = Accounts(
        run.model, evaluator, run.discovery, run.kasmina, probe_flops=probe_flops, budget=run.accounts.budget
    )
    run.judge.sites, run.stages.kasmina, run.trials.kasmina = run.kasmina.sites, run.kasmina, run.kasmina
    run.kasmina.watch(True)
