"""A job while it runs: what goes to standard error, and what is left to say at its end."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from esper.cli.command import Context, Outcome
from esper.cli.summary import next_line, result_lines
from esper.cli.terminal import write_lines
from esper.observe.console import Console
from esper.observe.history import RunHistory
from esper.protocol import SCHEMA_VERSION, AnyEvent, Record, RunFinished, RunStarted
from esper.runs.options import RunOptions


def run_visibly(options: RunOptions, context: Context) -> Outcome:
    """Run a job with progress lines on standard error; ``context`` learns the run directory as soon as there is one.

    Raises
    ------
    EsperError
        Whatever the job raises; the last progress line is ended first.
    """
    history = RunHistory()
    console = Console(sys.stderr)

    def remember(event: AnyEvent) -> None:
        history.apply(Record(v=SCHEMA_VERSION, seq=history.num_events, time=0.0, event=event))
        if isinstance(event, RunStarted):
            context.run_dir = _run_dir(options, event)

    def on_past(event: AnyEvent) -> None:
        remember(event)
        console.on_past(event)

    def on_event(event: AnyEvent) -> None:
        remember(event)
        if isinstance(event, RunStarted):
            write_lines([_first_line(_run_dir(options, event))], sys.stderr)
        elif not isinstance(event, RunFinished):  # the outcome says it, on standard output
            console.on_event(event)

    from esper.runs import execute  # imports torch

    try:
        with warnings.catch_warnings():
            # Each of Esper's own warnings is an event too, and the console has shown it.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"esper\.")
            summary = execute(options, on_event, console.on_note, on_past)
    finally:
        console.close()
    lines = [*result_lines(history), next_line(Path(summary["run_dir"]), has_report=False)]
    return Outcome(result=summary, lines=lines)


def _run_dir(options: RunOptions, event: RunStarted) -> Path:
    return options.run_dir if options.run_dir is not None else Path("runs") / event.run


def _first_line(run_dir: Path) -> str:
    return f"run {run_dir} | report {run_dir / 'report.html'} (updates while it runs)"
