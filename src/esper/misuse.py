"""A grower used in ways that cannot work: sites that do not report, steps at the wrong place."""

from __future__ import annotations

from esper.errors import SilentSiteError
from esper.journal import Journal
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock


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
