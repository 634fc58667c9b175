"""What is watched beside the cohorts' own gates: numbers that are not finite, and sites that do not report."""

from __future__ import annotations

from collections import deque

import torch

from esper.errors import SilentSiteError
from esper.journal import Journal
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.kasmina.lifecycle import in_slot
from esper.stages import Stages


def expel_damage(kasmina: Kasmina, stages: Stages, losses: deque[torch.Tensor], journal: Journal, step: int) -> None:
    """Non-finite losses or gradients: what is on trial leaves at once, the newest first."""
    damaged = kasmina.damaged()
    kinds = {value.dtype for value in losses}
    recent = torch.stack(list(losses) if len(kinds) == 1 else [value.float() for value in losses])
    suspects = [c for c in kasmina.cohorts.values() if bool(in_slot(int(c.state), c.alpha))]
    if not bool(torch.isfinite(recent).all()):
        losses.clear()  # one incident has one culprit: the window must not accuse the next cohort
        damaged = damaged or sorted(suspects, key=lambda cohort: -cohort.born)[:1]
        if not damaged:
            journal.warn(
                "loss", "the training loss is not finite and nothing of Esper is on trial: it is the host's", step
            )
    for cohort in damaged:
        stages.expel(cohort, step, "guard: a non-finite loss, gradient or parameter")


def check_reports(kasmina: Kasmina, clock: HostClock) -> None:
    """A site whose weight got a gradient but whose hook never ran is an error, not a healthy silence.

    Raises
    ------
    SilentSiteError
        Some site is silent.
    """
    silent = [
        name
        for name, site in kasmina.sites.items()
        if site.refused is None
        and kasmina.rows_per_step[name] == 0
        and clock.gradients_live(name)
        and site.telemetry is not None
        and not site.telemetry.reported
    ]
    if silent:
        raise SilentSiteError(
            f"every site must report in a step in which its weights get gradients, {len(silent)} of "
            f"{len(kasmina.sites)} are silent ({', '.join(silent[:3])}); the model was probably compiled "
            "before the Grower was attached: build the Grower first and call torch.compile(model) afterwards "
            "(torch._dynamo.reset() clears an earlier compilation)"
        )


def warn_if_misplaced(clock: HostClock, journal: Journal, step: int) -> None:
    """Say once that the grower is stepped between a backward pass and the optimizer's step."""
    if clock.backwards_since_step > 0:
        journal.warn(
            "misplaced",
            "grower.step(loss) was called between backward() and optimizer.step(); call it after optimizer.step(), "
            "so that grown units learn from the same gradients as the host",
            step,
        )


def warn_if_stuck(calls: int, journal: Journal, step: int) -> None:
    """Say once that the optimizer is never stepped."""
    if calls == 1000:
        journal.warn(
            "no step",
            "grower.step was called 1000 times without an optimizer step; call it after optimizer.step(), and pass "
            "the optimizer that is stepped",
            step,
        )
