"""A small run to read back."""

from __future__ import annotations

from pathlib import Path

from esper.observe.event_log import EventLog
from esper.protocol import (
    AnyEvent,
    ArmFinished,
    Attached,
    Germinated,
    HeldOut,
    Lifecycle,
    RunFinished,
    RunStarted,
    SiteInfo,
    SiteKind,
    Stopped,
    Transitioned,
)

SITE = SiteInfo(
    name="0-2",
    kind=SiteKind.LINEAR_SPAN,
    in_features=64,
    out_features=10,
    hidden_features=8,
    num_chunks=10,
    weights=610,
)


def run_events(run: str = "digits-01", *, finish: bool = True) -> list[AnyEvent]:
    """A small run: one cohort kept, one control."""
    events: list[AnyEvent] = [
        RunStarted(step=0, run=run, preset="digits", config={}, environment={}),
        Attached(step=0, sites=(SITE,), skipped=(), host_params=610, covered_params=610, total_steps=100),
        HeldOut(step=10, loss=0.5, params=610, flops=1e6),
        Germinated(
            step=20, cohort=0, seeds=(0,), sites=("0-2",), blueprints=("bottleneck",), starts=("random_zero",),
            widths=(8,), added_params=592, reason="pressure",
        ),
        Transitioned(
            step=60, cohort=0, seeds=(0,), source=Lifecycle.FINE_TUNING, target=Lifecycle.FOSSILIZED, alpha=1.0,
            reason="gain held",
        ),
        HeldOut(step=90, loss=0.4, params=1202, flops=2e6),
        Stopped(step=95, reason="gain per cost below threshold"),
    ]  # fmt: skip
    for arm, score in (("grown", 0.9), ("static_small", 0.8)):
        events.append(
            ArmFinished(
                step=100, arm=arm, score=score, score_name="accuracy", loss=1 - score, params=1202, flops=2e6,
                seconds=3.0, lr=1e-3, widths={"0-2": 16},
            )
        )  # fmt: skip
    return [*events, RunFinished(step=100, summary={"stopped_because": "gain per cost"})] if finish else events


def write_run(folder: Path, *, finish: bool = True) -> Path:
    with EventLog(folder / "events.jsonl") as log:
        for event in run_events(folder.name, finish=finish):
            log.append(event)
    return folder
