"""``esper report``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from esper.cli.command import Context, Outcome, existing_run
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import columns, labelled

if TYPE_CHECKING:
    from esper.observe.history import RunHistory


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's report again and print its summary.

    Works while the run goes on and after it was killed.
    """

    run_dir: Annotated[
        Path,
        Option(
            is_positional=True, metavar="RUN_DIR", help="A directory that `esper run` wrote.", completes="directory"
        ),
    ]
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Fold the event log, write ``report.html``, sum up."""
        run_dir = existing_run(self.run_dir)
        from esper.cli.summary import arms_result, cohort_line, next_line, score_table
        from esper.observe.event_log import read_events
        from esper.observe.history import fold
        from esper.observe.progress import done_line
        from esper.observe.report import write_report

        history = fold(read_events(run_dir / "events.jsonl"))
        page = write_report(run_dir, history)
        lines = [
            labelled("run", f"{run_dir} | preset {history.preset} | {_state(history)}"),
            cohort_line(history),
            done_line(history),
            *score_table(history, width=columns(sys.stdout)),
            labelled("report", str(page)),
            *([next_line(run_dir, has_report=True)] if (run_dir / "structure.json").is_file() else []),
        ]
        result = {
            "arms": arms_result(history),
            **(history.summary or {}),
            "run_dir": str(run_dir),
            "report": str(page),
            "finished": history.is_finished,
        }
        return Outcome(result=result, lines=lines)


def _state(history: RunHistory) -> str:
    if history.is_finished:
        return "finished"
    last = max(history.seed_runs, key=lambda run: (run.seed, run.last_step), default=None)
    where = "" if last is None else f", last event of {last.arm} seed {last.seed} at step {last.last_step}"
    return f"not finished{where}"
