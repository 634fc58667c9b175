"""``esper soak``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from esper.cli.command import Context, Outcome
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import labelled, write_lines
from esper.runs.soak.options import SoakOptions

if TYPE_CHECKING:
    from esper.runs.soak.summary import Sample

_HEARTBEAT_HOURS = 1 / 60


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Train and grow small hosts without a rest and watch for what leaks.

    Cohorts germinate all the time; some are kept, others are culled, cancelled and rolled back on purpose, and faults
    strike now and then. The same command goes on from its samples. It fails when a bar is missed.
    """

    hours: Annotated[float | None, Option(metavar="H", help="Hours of this sitting.", default="no end")] = None
    steps: Annotated[
        int | None, Option(metavar="N", help="Host steps, of all sittings together.", default="no end")
    ] = None
    run_dir: Annotated[Path, Option(metavar="DIR", help="Where samples are kept.", completes="directory")] = Path(
        "runs/soak"
    )
    faults: Annotated[bool, Option(help="Inject a fault now and then.", default="yes")] = True
    seed: Annotated[int, Option(metavar="N", help="Number of the first host.")] = 0
    device: Annotated[
        str, Option(metavar="{auto,cpu,cuda}", help="Where to train.", completes=("auto", "cpu", "cuda"))
    ] = "auto"
    fresh: Annotated[bool, Option(help="Forget earlier sittings.", default="no")] = False
    json: JsonPath = None

    def options(self) -> SoakOptions:
        """The same as the library takes it.

        Raises
        ------
        ConfigError
            Without an end, or for a value out of range.
        """
        return SoakOptions(
            hours=self.hours, steps=self.steps, run_dir=self.run_dir, seed=self.seed, faults=self.faults,
            device=self.device, fresh=self.fresh,
        )  # fmt: skip

    def execute(self, context: Context) -> Outcome:
        """Soak: progress on standard error, what was found in the outcome."""
        options = self.options()
        from esper.runs.interrupt import remembered
        from esper.runs.soak.job import execute  # imports torch

        with remembered():
            summary = execute(options, _Progress().on_sample)
        lines = summary_lines(summary)
        lines.append(labelled("kept in", str(options.run_dir)))
        result = {"command": options.command} | summary | {"run_dir": str(options.run_dir)}
        return Outcome(result=result, lines=lines, ok=summary["met"])


class _Progress:
    """At most one line a minute."""

    def __init__(self) -> None:
        self._said = 0.0

    def on_sample(self, sample: Sample) -> None:
        if sample.hours - self._said < _HEARTBEAT_HOURS:
            return
        self._said = sample.hours
        memory = "" if sample.memory_mb is None else f", {sample.memory_mb:.1f} MB"
        steps, moves = sum(sample.steps.values()), sum(sample.transitions.values())
        write_lines([f"{60 * sample.hours:.0f} min: {steps:,} steps, {moves:,} transitions{memory}"], sys.stderr)


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Counts, rates, the slope and the bars."""
    families = ", ".join(f"{name} {num:,}" for name, num in summary["steps_by_family"].items())
    memory = summary["memory"]
    lines = [
        labelled("steps", f"{summary['steps']:,} ({families}), {summary['steps_per_second']:,} a second"),
        labelled("so far", f"{summary['hours']:.2f} h, {summary['sittings']} sittings, {summary['lives']:,} hosts"),
        labelled("10M steps", f"{summary['hours_to_10M_steps']:,} h more at this rate"),
        labelled(
            "changes", f"{summary['transitions']:,} transitions, {summary['rollbacks']:,} rollbacks, "
            f"{summary['germinations']:,} germinations at most {summary['longest_wait_for_a_germination']} steps apart",
        ),
        labelled("faults", _counted(summary["faults"])),
        labelled("lost", _counted(summary["lives_lost"])),
        labelled("memory", _slope_line(memory)),
    ]  # fmt: skip
    if summary["in_use"] is not None:
        lines.append(labelled("in use", f"of it {_slope_line(summary['in_use'])}"))
    lines += [labelled("met" if met else "missed", name) for name, met in summary["bars"].items()]
    return lines


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {num:,}" for name, num in sorted(counts.items())) or "none"


def _slope_line(memory: dict[str, Any]) -> str:
    if memory["mb_per_hour"] is None:
        return "too few samples for a slope"
    long = next(value for name, value in memory.items() if name.startswith("mb_after"))
    return (
        f"{memory['mb_per_hour']:+.2f} MB an hour ({memory['low']:+.2f} to {memory['high']:+.2f}) over "
        f"{memory['hours']:.2f} h; at most {long:+,.0f} MB in 72 h"
    )
