"""``esper trials``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from esper.cli.command import Context, Outcome
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import columns, labelled, table, write_lines
from esper.runs.trials.options import PEER_NAMES, TrialOptions

if TYPE_CHECKING:
    from esper.runs.trials.records import AnyRecord

_HEARTBEAT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Grow many small hosts and count what growth does to them.

    Each host is trained, grown and scored on data that nothing has read before. Finished trials are kept, and the same
    command goes on from there. It fails when a bar is missed.
    """

    n: Annotated[int, Option(metavar="N", help="Trials.")] = 1000
    faults: Annotated[
        tuple[str, ...],
        Option(metavar="NAME", help="Inject these faults, one a trial in turn; all is every one.", default=""),
    ] = ()
    null: Annotated[bool, Option(help="Cohorts that can add nothing: none may be kept.", default="no")] = False
    peer: Annotated[
        str | None,
        Option(
            metavar="NAME", help=f"The same hosts by another library: {' or '.join(PEER_NAMES)}.", default="",
            completes=PEER_NAMES,
        ),
    ] = None  # fmt: skip
    held_out_rows: Annotated[
        int | None,
        Option(metavar="N", help="Rows of each held-out batch: how much there is to judge by.", default="4, 8 or 16"),
    ] = None
    jobs: Annotated[int, Option(metavar="N", help="Trials at a time, each in a process of its own.")] = 1
    seed: Annotated[int, Option(metavar="N", help="Number of the first trial.")] = 0
    run_dir: Annotated[Path, Option(metavar="DIR", help="Where finished trials are kept.", completes="directory")] = (
        Path("runs/trials")
    )
    fresh: Annotated[bool, Option(help="Forget the finished trials of this kind.", default="no")] = False
    json: JsonPath = None

    def options(self) -> TrialOptions:
        """The same as the library takes it.

        Raises
        ------
        ConfigError
            For a value out of range, or two kinds at once.
        """
        return TrialOptions(
            num=self.n, faults=self.faults, null=self.null, peer=self.peer, jobs=self.jobs, seed=self.seed,
            run_dir=self.run_dir, fresh=self.fresh, held_out_rows=self.held_out_rows,
        )  # fmt: skip

    def execute(self, context: Context) -> Outcome:
        """Run what is missing: progress on standard error, the rates in the outcome."""
        options = self.options()
        from esper.runs.interrupt import remembered
        from esper.runs.trials.job import execute  # imports torch

        with remembered():
            summary = execute(options, _Progress().on_record)
        lines = summary_lines(summary, columns(sys.stdout))
        lines.append(labelled("kept in", str(options.run_dir)))
        result = {"command": options.command} | summary | {"run_dir": str(options.run_dir)}
        return Outcome(result=result, lines=lines, ok=not summary["missed"])


class _Progress:
    """One line at the start, then at most one a minute (and at each trial of a terminal)."""

    def __init__(self) -> None:
        self._begun = self._said = time.monotonic()
        self._first = 0

    def on_record(self, done: int, total: int, record: AnyRecord | None) -> None:
        if record is None:
            self._first = done
            where = f"going on after {done} finished trials" if done else "starting"
            write_lines([f"{total} trials, {where}"], sys.stderr)
            return
        now = time.monotonic()
        if now - self._said >= _HEARTBEAT_S or done == total:
            self._said = now
            rate = (done - self._first) / max(now - self._begun, 1e-9)
            write_lines([f"{done} of {total} trials, {60 * rate:.1f} a minute"], sys.stderr)


def summary_lines(summary: dict[str, Any], width: int | None) -> list[str]:
    """Rates, counts by fault, kind or task, and the bars."""
    rows = [(name, *_rate_cells(rate)) for name, rate in summary["rates"].items()]
    lines = table(("what", "of", "share", "95% bounds"), rows, width=width, numbers=(1, 2, 3))
    for name, shown in (("by_fault", _fault_rows), ("by_kind", _kind_rows), ("by_task", _task_rows)):
        if summary.get(name):
            head, body = shown(summary[name])
            lines += ["", *table(head, body, width=width, numbers=range(1, len(head)))]
    for name, entry in summary.get("by_fault", {}).items():
        if entry["first_problem"]:
            lines.append(f"{name}: {entry['first_problem']}")
    lines += [""] if summary["bars"] else []
    lines += [_bar_line(bar) for bar in summary["bars"]]
    return lines


def _rate_cells(rate: dict[str, Any]) -> tuple[str, str, str]:
    share = "-" if rate["share"] is None else f"{rate['share']:.1%}"
    return f"{rate['events']} of {rate['trials']}", share, f"{rate['low']:.1%} to {rate['high']:.1%}"


def _bar_line(bar: dict[str, Any]) -> str:
    share = "no trials" if bar["share"] is None else f"{bar['share']:.1%} ({bar['low']:.1%} to {bar['high']:.1%})"
    return labelled(bar["verdict"], f"{bar['name']}: {bar['need']}, got {share}")


def _fault_rows(faults: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [(name, str(e["expects"]), str(e["struck"]), str(e["held"])) for name, e in faults.items()]
    return ("fault", "must be", "struck", "held"), rows


def _kind_rows(kinds: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return ("kind", "kept", "share", "95% bounds"), [(name, *_rate_cells(rate)) for name, rate in kinds.items()]


def _task_rows(tasks: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = ("trials", "cohorts", "kept", "improve", "harmful", "headroom", "headroom_kept")
    rows = [(task, *(str(counts[name]) for name in names)) for task, counts in tasks.items()]
    return ("task", *(name.replace("_", " ") for name in names)), rows
