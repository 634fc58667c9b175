"""The report of a run: one HTML file that opens from disk and asks nothing of the network."""

from __future__ import annotations

from pathlib import Path

from esper.errors import EsperError
from esper.files import replace_text
from esper.observe.event_log import read_events
from esper.observe.history import RunHistory, fold
from esper.observe.report.page import render

__all__ = ["render", "write_report"]


def write_report(run_dir: str | Path, history: RunHistory | None = None) -> Path:
    """Write ``report.html`` beside ``events.jsonl`` and return its path; a reader never sees half a page.

    Parameters
    ----------
    run_dir:
        The run directory.
    history:
        The folded log, when the caller has it already; else the log is read.

    Raises
    ------
    EsperError
        The log is missing or damaged, or the directory cannot be written.
    """
    folder = Path(run_dir)
    page = render(fold(read_events(folder / "events.jsonl")) if history is None else history)
    target = folder / "report.html"
    try:
        replace_text(target, page)
    except OSError as error:
        raise EsperError(
            f"the report goes into the run directory, but {target} cannot be written ({error}); "
            "make the directory writable"
        ) from error
    return target
