"""A run in a few lines of text, from its history."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from esper.cli.terminal import labelled, table
from esper.observe.history import RunHistory
from esper.observe.progress import controls_line, done_line
from esper.observe.quantities import decimal, duration, magnitude
from esper.observe.scores import ArmScore, arm_scores
from esper.protocol import Lifecycle

_ENDS = {
    Lifecycle.FOSSILIZED: "kept",
    Lifecycle.CULLED: "rejected",
    Lifecycle.CANCELLED: "cancelled",
    Lifecycle.ROLLED_BACK: "rolled back",
}


def result_lines(history: RunHistory) -> list[str]:
    """How it ended, and the controls beside it."""
    return [line for line in (done_line(history), controls_line(history)) if line]


def next_line(run_dir: Path, *, has_report: bool) -> str:
    """The commands that make sense after a run."""
    name = shlex.quote(str(run_dir))
    commands = [] if has_report else [f"esper report {name}"]
    return labelled("next", " | ".join([*commands, f"esper export {name} -o model/"]))


def cohort_line(history: RunHistory) -> str:
    """``cohorts    5 germinated: 2 kept, 3 rejected``, over all seeds of the main arm."""
    runs = list(history.arms[history.main_arm].values()) if history.main_arm is not None else []
    cohorts = [cohort for run in runs for cohort in run.cohorts.values()]
    counts = [(sum(cohort.state is state for cohort in cohorts), word) for state, word in _ENDS.items()]
    alive = sum(cohort.is_alive for cohort in cohorts)
    parts = [f"{count} {word}" for count, word in [*counts, (alive, "in progress")] if count]
    tail = f": {', '.join(parts)}" if parts else ""
    return labelled("cohorts", f"{len(cohorts)} germinated{tail}")


def score_table(history: RunHistory, *, width: int | None) -> list[str]:
    """One row an arm: the score with its 95% interval over seeds, loss, size and cost."""
    scores = arm_scores(history)
    if not scores:
        return []
    head = ["arm", scores[0].score_name, "+/-", "loss", "params", "FLOPs", "time"]
    return table(head, [_row(score) for score in scores], width=width, numbers=range(1, len(head)))


def arms_result(history: RunHistory) -> dict[str, Any]:
    """Scores of the finished arms, as a run's own summary names them."""
    return {
        score.arm: {
            "score": score.score.mean,
            "loss": score.loss.mean,
            "params": score.params.mean,
            "flops": score.flops.mean,
            "seconds": score.seconds.mean,
            "scores": list(score.per_seed.values()),
        }
        for score in arm_scores(history)
    }


def _row(score: ArmScore) -> list[str]:
    half = decimal(score.score.half_width) if score.score.has_bounds else "-"
    return [
        score.label,
        decimal(score.score.mean),
        half,
        decimal(score.loss.mean),
        magnitude(score.params.mean),
        magnitude(score.flops.mean),
        duration(score.seconds.mean),
    ]
