"""``esper run``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from esper.cli.command import Context, Outcome, unknown_name
from esper.cli.parsing import JsonPath, Option
from esper.runs.options import PRESET_NAMES, RunOptions

_PRESETS_OWN = "the preset's"


_CONTROLLERS = ("heuristic", "neural", "bandit", "schedule", "random", "never", "remote")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train a preset, let it grow, and compare it with controls.

    Writes runs/PRESET-NN with events.jsonl, config.json, report.html and the grown model. The same command resumes a
    run that was interrupted. Without options: digits, offline, about a minute on two cores.
    """

    preset: Annotated[
        str,
        Option(is_positional=True, metavar="PRESET", help=f"One of {', '.join(PRESET_NAMES)}.", completes=PRESET_NAMES),
    ] = "digits"
    seeds: Annotated[int | None, Option(metavar="N", help="Paired seeds an arm.", default=_PRESETS_OWN)] = None
    steps: Annotated[int | None, Option(metavar="N", help="Optimizer steps a training.", default=_PRESETS_OWN)] = None
    lr: Annotated[
        tuple[float, ...],
        Option(
            metavar="RATE", help="Learning rates to choose from, on held-out loss.", default="the preset's grid"
        ),
    ] = ()  # fmt: skip
    controls: Annotated[bool, Option(help="Train the control arms too.", default="yes")] = True
    device: Annotated[
        str, Option(metavar="{auto,cpu,cuda}", help="Where to train.", completes=("auto", "cpu", "cuda"))
    ] = "auto"
    size: Annotated[Literal["auto", "cpu", "gpu"], Option(help="Size of the job; auto goes by the device.")] = "auto"
    data: Annotated[
        Path | None,
        Option(
            metavar="PATH", help="An .npz with x_train, y_train, x_test, y_test (vision).", default="",
            completes="file",
        ),
    ] = None  # fmt: skip
    run_dir: Annotated[
        Path | None,
        Option(
            metavar="DIR", help="Where to write.", default="the next free runs/PRESET-NN", completes="directory"
        ),
    ] = None  # fmt: skip
    temper: Annotated[
        str | None,
        Option(
            metavar="NAME", help="conservative, balanced, aggressive or exploratory.", default=_PRESETS_OWN,
            completes=("conservative", "balanced", "aggressive", "exploratory"),
        ),
    ] = None  # fmt: skip
    controller: Annotated[
        str | None,
        Option(
            metavar="NAME", help=f"Who decides: {', '.join(_CONTROLLERS)}, or one of your own.", default="heuristic",
            completes=_CONTROLLERS,
        ),
    ] = None  # fmt: skip
    bus: Annotated[
        str | None, Option(metavar="URL", help="A message bus to tell and to obey: redis://HOST.", default="none")
    ] = None
    unsigned_commands: Annotated[
        bool, Option(help="Obey whoever reaches the bus, without ESPER_BUS_KEY.", default="no")
    ] = False
    start: Annotated[
        str | None,
        Option(metavar="NAME", help="How a branch's first weights are made.", default="by site and optimizer"),
    ] = None
    growth: Annotated[
        float | None,
        Option(
            metavar="X", help="Units a cohort adds, as a multiple of the host's inner width.", default=_PRESETS_OWN
        ),
    ] = None  # fmt: skip
    budget_params: Annotated[
        int | None, Option(metavar="N", help="Most parameters the grown model may have.", default="no ceiling")
    ] = None
    settings: Annotated[
        tuple[str, ...],
        Option(
            metavar="NAME=VALUE", name="--set", help="Any setting of docs/configuration.md: graft.lr_boost=1.5.",
            default="",
        ),
    ] = ()  # fmt: skip
    karn: Annotated[
        str | None,
        Option(
            metavar="PATH|URL", help="Let Karn propose what grows, and file what became of it in this database.",
            default="", completes="file",
        ),
    ] = None  # fmt: skip
    karn_strategy: Annotated[
        str | None,
        Option(
            metavar="NAME", help="How Karn selects: performance, efficiency, stability, risk, novelty or hybrid.",
            default="hybrid",
            completes=("performance", "efficiency", "stability", "risk", "novelty", "hybrid"),
        ),
    ] = None  # fmt: skip
    seed: Annotated[int, Option(metavar="N", help="First seed.")] = 0
    jobs: Annotated[int, Option(metavar="N", help="Trainings at a time, each in a process of its own.")] = 1
    checkpoint_every: Annotated[
        float, Option(metavar="SECONDS", help="At most so much of a training is lost when it is interrupted.")
    ] = 10.0
    fresh: Annotated[
        bool, Option(help="Begin anew; an earlier run in --run-dir DIR is put away as DIR.1.", default="no: resume")
    ] = False
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
        from esper.runs.interrupt import remembered

        with remembered():
            from esper.cli.progress import run_visibly

            return run_visibly(options, context)
