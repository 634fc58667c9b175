"""The same trials for a peer: gromo's documented loop on the hosts that are MLPs, audited by the same criterion.

A round of growth takes the place of a cohort: every inner layer grows by twice the host's width (as far as the method
can), at the steps at which Esper's controller may germinate. Nothing is rejected: the package keeps what it adds.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from esper.runs.interrupt import obey
from esper.runs.peers import gromo
from esper.runs.trials.records import CohortRecord, TrialRecord
from esper.runs.trials.tasks import MLP_TASKS, Rows, task_name
from esper.runs.trials.training import STEPS, Contrast, Setup, audit_losses, take_step
from esper.runs.trials.trial import UNKNOWN, found, is_finite, known

PEERS = {"gromo": "gromo_tiny", "gromo-gradmax": "gromo_gradmax"}
"""Name on the command line to the method."""
ROUNDS = (40, 150, 260)
"""Steps at which it grows."""
TWIN_STEPS = 90
STATISTICS_BATCHES = 16
GROWTH = 2


@dataclass
class _Round:
    """One round of growth, and what is needed to audit it."""

    number: int
    since: int
    before: list[float]
    after: list[float]
    twin: Any
    optimizer: Optimizer
    host_losses: list[float] | None = None
    twin_losses: list[float] | None = None


def applies(number: int) -> bool:
    """Whether trial ``number`` has a host that the peer can grow."""
    return task_name(number) in MLP_TASKS


def peer_trial(number: int, peer: str) -> TrialRecord:
    """Train and grow host ``number``, which must be one that :func:`applies` names, by the peer's loop; and alone."""
    started = time.perf_counter()
    setup = Setup.of(number)
    with gromo.quiet():
        alone = audit_losses(setup.task, _train(setup, _host(setup), ())[0])
        model, rounds = _train(setup, _host(setup), ROUNDS, PEERS[peer])
    cohorts = tuple(
        CohortRecord(
            cohort=item.number, end="KEPT", passed=True,
            on_off=found(Contrast.between(item.before, item.after)),
            twin=found(Contrast.between(item.twin_losses, item.host_losses))
            if item.twin_losses is not None and item.host_losses is not None else None,
        )
        for item in rounds
    )  # fmt: skip
    effect = found(Contrast.between(alone, audit_losses(setup.task, model)))
    return TrialRecord(
        number=number, kind=peer, **setup.described(), headroom=UNKNOWN, alone=known(sum(alone) / len(alone)),
        effect=effect, seeds=0, seeds_ended=0, seeds_cut=0, rolled_back=0, finite=is_finite(model), cohorts=cohorts,
        seconds=round(time.perf_counter() - started, 2),
    )  # fmt: skip


def _host(setup: Setup) -> Any:
    """The peer's own MLP of the trial's widths."""
    plain = setup.host()
    layers = [module for module in plain if isinstance(module, torch.nn.Linear)]  # type: ignore[reportGeneralTypeIssues]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.number)
        return gromo.growing_mlp(
            layers[0].in_features, setup.task.width, len(layers) - 1, layers[-1].out_features, torch.device("cpu")
        )


def _train(setup: Setup, model: Any, rounds: tuple[int, ...], method: str = "") -> tuple[Any, list[_Round]]:
    choose = setup.batches.clone_state()
    statistics = torch.Generator().manual_seed(setup.number + 1)
    optimizer = setup.recipe.build(model)
    done: list[_Round] = []
    for step in range(STEPS):
        obey()
        if step in rounds:
            done.append(_grow(setup, model, optimizer, statistics, method, step, len(done) + 1))
            optimizer = setup.recipe.build(model)
        batch = setup.task.batch(choose)
        take_step(setup, model, optimizer, batch, step)
        for item in done:
            _follow(setup, model, item, batch, step)
    return model, done


def _grow(
    setup: Setup, model: Any, optimizer: Optimizer, statistics: torch.Generator, method: str, step: int, number: int
) -> _Round:
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    before = audit_losses(setup.task, model)
    batches = [setup.task.batch(statistics) for _ in range(STATISTICS_BATCHES)]
    for index in range(len(gromo.widths(model))):
        gromo.grow_layer(model, index, GROWTH * setup.task.width, batches, setup.task.loss, method)
    return _Round(number, step, before, audit_losses(setup.task, model), twin, twin_optimizer)


def _follow(setup: Setup, model: Any, item: _Round, batch: Rows, step: int) -> None:
    """The twin takes the host's step; after its time both are scored."""
    if item.twin_losses is not None:
        return
    take_step(setup, item.twin, item.optimizer, batch, step)
    if step - item.since >= TWIN_STEPS - 1 or step == STEPS - 1:
        item.host_losses = audit_losses(setup.task, model)
        item.twin_losses = audit_losses(setup.task, item.twin)
        item.twin = None
