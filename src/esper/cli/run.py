"""``esper run``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from esper.cli.command import Context, Outcome, unknown_name
from esper.cli.parsing import Count, JsonPath, OptionalCount, OptionalNumber, OptionalPath, OptionalText, Rates
from esper.runs.options import PRESET_NAMES, RunOptions

_PRESETS = ", ".join(PRESET_NAMES)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train a preset, let it grow, and compare it with controls.

    Writes runs/PRESET-NN with events.jsonl, config.json, report.html and the grown model. Without options: digits,
    offline, about a minute on two cores.
    """

    preset: Annotated[Positional[str], arg(metavar="[PRESET]", help=f"One of {_PRESETS}.")] = "digits"
    seeds: Annotated[OptionalCount, arg(help="Paired seeds an arm.", help_behavior_hint="(default: the preset's)")] = (
        None
    )
    steps: Annotated[
        OptionalCount, arg(help="Optimizer steps a training.", help_behavior_hint="(default: the preset's)")
    ] = None
    lr: Annotated[
        Rates,
        arg(help="Learning rates to choose from, on held-out loss.", help_behavior_hint="(default: the preset's grid)"),
    ] = ()
    controls: Annotated[bool, arg(help="Train the control arms too.", help_behavior_hint="(default: yes)")] = True
    device: Annotated[str, arg(metavar="{auto,cpu,cuda}", help="Where to train.")] = "auto"
    size: Annotated[Literal["auto", "cpu", "gpu"], arg(help="Size of the job; auto goes by the device.")] = "auto"
    data: Annotated[
        OptionalPath,
        arg(metavar="PATH", help="An .npz with x_train, y_train, x_test, y_test (vision).", help_behavior_hint=""),
    ] = None
    run_dir: Annotated[
        OptionalPath,
        arg(metavar="DIR", help="Where to write.", help_behavior_hint="(default: the next free runs/PRESET-NN)"),
    ] = None
    temper: Annotated[
        OptionalText,
        arg(
            metavar="NAME",
            help="conservative, balanced, aggressive or exploratory.",
            help_behavior_hint="(default: the preset's)",
        ),
    ] = None
    controller: Annotated[
        OptionalText, arg(metavar="NAME", help="Which controller decides.", help_behavior_hint="(default: heuristic)")
    ] = None
    start: Annotated[
        OptionalText,
        arg(
            metavar="NAME",
            help="How a branch's first weights are made.",
            help_behavior_hint="(default: by site and optimizer)",
        ),
    ] = None
    growth: Annotated[
        OptionalNumber,
        arg(
            help="Units a cohort adds, as a multiple of the host's inner width.",
            help_behavior_hint="(default: the preset's)",
        ),
    ] = None
    budget_params: Annotated[
        OptionalCount,
        arg(help="Most parameters the grown model may have.", help_behavior_hint="(default: no ceiling)"),
    ] = None
    seed: Annotated[Count, arg(help="First seed.")] = 0
    jobs: Annotated[Count, arg(help="Trainings at a time, each in a process of its own.")] = 1
    json: JsonPath = None

    def options(self) -> RunOptions:
        """The same as the library takes it.

        Raises
        ------
        UsageError, ConfigError
            For an unknown preset or a value out of range.
        """
        if self.preset not in PRESET_NAMES:
            raise unknown_name("preset", self.preset, PRESET_NAMES)
        return RunOptions(**{field.name: getattr(self, field.name) for field in fields(RunOptions)})

    def execute(self, context: Context) -> Outcome:
        """Run the job: progress on standard error, the result in the outcome."""
        options = self.options()
        from esper.cli.progress import run_visibly

        return run_visibly(options, context)
