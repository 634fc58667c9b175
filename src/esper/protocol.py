"""What crosses a boundary: observations, commands and events, as plain typed data.

Everything here is a frozen ``msgspec.Struct`` (or a NumPy structure of arrays for the observation), so that it can be
logged, sent over a bus and replayed. This module imports nothing else of Esper; controllers and observers import
nothing but this module.

Missing values are NaN (floats) or ``None``; a missing value is *unknown*, never healthy.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

SCHEMA_VERSION = 1
"""Version of the event and command schema; raised when a field changes meaning or is removed."""


class Lifecycle(enum.IntEnum):
    """The eleven states of a seed; the codes are those of the specification and never change."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILIZATION = 4
    EVALUATING = 5
    FINE_TUNING = 6
    FOSSILIZED = 7
    CULLED = 8
    CANCELLED = 9
    ROLLED_BACK = 10


class SiteKind(enum.StrEnum):
    """Where a seed can sit. A *span* reaches from one module's input to a later module's output."""

    LINEAR_SPAN = "linear_span"
    """Linear, activation, Linear: a branch with the same activation is exactly *more hidden units*."""
    CONV_SPAN = "conv_span"
    """Conv2d, BatchNorm2d (optional), activation, Conv2d: more inner channels."""
    LINEAR_LAYER = "linear_layer"
    CONV_LAYER = "conv_layer"

    @property
    def is_span(self) -> bool:
        return self in (SiteKind.LINEAR_SPAN, SiteKind.CONV_SPAN)

    @property
    def is_conv(self) -> bool:
        return self in (SiteKind.CONV_SPAN, SiteKind.CONV_LAYER)


class SiteInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A place that can grow.

    ``hidden_features`` is the width inside a span (0 for a layer site); ``weights`` counts the host parameters the
    site covers.
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    hidden_features: int
    num_chunks: int
    weights: int


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """A module that could have been a site, and why it is not one."""

    name: str
    reason: str


# --------------------------------------------------------------------------------------------------------------------
# Observation: what a controller sees


class CohortView(msgspec.Struct, frozen=True, kw_only=True):
    """Seeds that are judged together, as a controller sees them."""

    cohort: int
    state: Lifecycle
    steps_in_state: int
    sites: tuple[str, ...]
    num_seeds: int
    alpha: float
    added_params: int


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a cohort ended. ``gain`` is the paired held-out loss difference (positive is better), NaN if never judged."""

    cohort: int
    step: int
    state: Lifecycle
    sites: tuple[str, ...]
    gain: float
    gain_low: float
    gain_high: float
    added_params: int
    added_flops_share: float
    """Forward FLOPs the cohort adds, as a share of the model's forward FLOPs before it."""
    reason: str


SITE_FEATURES = (
    "is_span",
    "is_conv",
    "log_in",
    "log_hidden",
    "log_out",
    "grown_share",
    "free_chunk_share",
    "activation_mean",
    "activation_var",
    "gradient_energy",
    "last_gain",
    "steps_since_growth",
)
"""Columns of :attr:`Observation.sites`; NaN marks a missing sensor."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One look at the run, at a decision point.

    Attributes
    ----------
    step:
        Real optimizer steps so far.
    total_steps:
        Planned steps, or ``None`` when the user stated none.
    held_out:
        Latest held-out loss on gate batches (NaN before the first), ``held_out_initial`` the first one.
    params, host_params, budget_params:
        Parameters now (host, annexes and live seeds), of the host alone, and the ceiling (``None``: no ceiling).
    flops_per_step, host_flops_per_step, budget_flops:
        Forward FLOPs of the model for one training step now, of the host alone, and the ceiling.
    site_names, sites:
        Names, and an array ``(S, len(SITE_FEATURES))`` float64.
    hidden, grown:
        Host's inner width and grown units per site, ``(S,)`` int64.
    eligible:
        ``(S,)`` bool: the site has free chunks, no embargo and no live seed.
    chunk_site, chunk_index, chunk_pressure:
        The pressing chunks, strongest first: site row, chunk index, gradient energy (float64).
    alive, verdicts:
        Cohorts alive now, and all cohorts that ended, oldest first.
    stopped:
        Growth has been stopped; ``None`` while it goes on.
    unit_params, unit_flops:
        What one more unit costs, ``(S,)`` float64 (a hidden unit of a span, a rank of a layer site): parameters, and
        forward FLOPs a training step. ``None`` or NaN is unknown: a controller then estimates from the site's sizes.
    """

    step: int
    total_steps: int | None
    held_out: float
    held_out_initial: float
    params: int
    host_params: int
    budget_params: int | None
    flops_per_step: float
    host_flops_per_step: float
    budget_flops: float | None
    site_names: tuple[str, ...]
    sites: npt.NDArray[np.float64]
    hidden: npt.NDArray[np.int64]
    grown: npt.NDArray[np.int64]
    eligible: npt.NDArray[np.bool_]
    chunk_site: npt.NDArray[np.int64]
    chunk_index: npt.NDArray[np.int64]
    chunk_pressure: npt.NDArray[np.float64]
    alive: tuple[CohortView, ...]
    verdicts: tuple[Verdict, ...]
    stopped: str | None
    unit_params: npt.NDArray[np.float64] | None = None
    unit_flops: npt.NDArray[np.float64] | None = None


# --------------------------------------------------------------------------------------------------------------------
# Commands: what a controller or an operator may ask for


class SeedPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One seed to germinate. ``None`` means: the default for this site's kind and the host's optimizer.

    ``chunks`` empty means all free chunks of the site. ``width`` is the blueprint's size (hidden units or rank).
    """

    site: str
    chunks: tuple[int, ...] = ()
    blueprint: str | None = None
    width: int | None = None
    start: str | None = None
    strategy: str | None = None


class Germinate(msgspec.Struct, frozen=True, kw_only=True, tag="germinate"):
    """Germinate one cohort: its seeds are fitted, grafted and judged together."""

    seeds: tuple[SeedPlan, ...]
    reason: str = ""


class Cull(msgspec.Struct, frozen=True, kw_only=True, tag="cull"):
    """Take a cohort out: its alpha ramps to zero, then its storage is freed."""

    cohort: int
    reason: str


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """A person or a system withdraws a cohort; legal in every active state."""

    cohort: int
    reason: str


class RollBack(msgspec.Struct, frozen=True, kw_only=True, tag="roll_back"):
    """Remove a cohort at once, without a ramp."""

    cohort: int
    reason: str


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag="pause"):
    """Hold a cohort where it is: alpha stays as it is, timers stand still."""

    cohort: int


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag="resume"):
    """Let a paused cohort go on."""

    cohort: int


class SetBudget(msgspec.Struct, frozen=True, kw_only=True, tag="set_budget"):
    """Change the ceiling. ``None`` removes it."""

    params: int | None = None
    flops: float | None = None


class SetStrategy(msgspec.Struct, frozen=True, kw_only=True, tag="set_strategy"):
    """Change how a cohort's alpha moves from here on."""

    cohort: int
    strategy: str


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Start no further cohort. Cohorts that are alive are brought to their end."""

    reason: str


Command = Germinate | Cull | Cancel | RollBack | Pause | Resume | SetBudget | SetStrategy | Stop


# --------------------------------------------------------------------------------------------------------------------
# Events: the truth of a run, one line each in events.jsonl


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Fields every event has. ``arm`` and ``seed`` name the training run it belongs to."""

    step: int
    arm: str = "grown"
    seed: int = 0


class RunStarted(Event, frozen=True, kw_only=True, tag="run_started"):
    """The first line. ``environment`` holds versions and the device; ``config`` what the user asked for."""

    run: str
    preset: str
    config: dict[str, Any]
    environment: dict[str, str]


class Attached(Event, frozen=True, kw_only=True, tag="attached"):
    """A grower was attached to a model."""

    sites: tuple[SiteInfo, ...]
    skipped: tuple[Skipped, ...]
    host_params: int
    covered_params: int
    total_steps: int | None


class TrainLoss(Event, frozen=True, kw_only=True, tag="train_loss"):
    """The user's loss at a decision point (not smoothed)."""

    loss: float
    flops: float
    """FLOPs spent so far by this arm, everything counted."""


class HeldOut(Event, frozen=True, kw_only=True, tag="held_out"):
    """Held-out loss on gate batches; ``flops`` spent so far and ``params`` now."""

    loss: float
    params: int
    flops: float


class Germinated(Event, frozen=True, kw_only=True, tag="germinated"):
    """A cohort came alive. One entry a seed in ``seeds``, ``sites``, ``widths``."""

    cohort: int
    seeds: tuple[int, ...]
    sites: tuple[str, ...]
    blueprints: tuple[str, ...]
    starts: tuple[str, ...]
    widths: tuple[int, ...]
    added_params: int
    reason: str


class Transitioned(Event, frozen=True, kw_only=True, tag="transitioned"):
    """Seeds of a cohort changed state, through the gate named in ``reason``."""

    cohort: int
    seeds: tuple[int, ...]
    source: Lifecycle
    target: Lifecycle
    alpha: float
    reason: str


class AlphaMoved(Event, frozen=True, kw_only=True, tag="alpha_moved"):
    """Alpha of a cohort at a decision point, with the strategy's reason when it holds."""

    cohort: int
    alpha: float
    held_by: str | None


class Fitted(Event, frozen=True, kw_only=True, tag="fitted"):
    """How the isolated training of one seed ended."""

    cohort: int
    seed_id: int
    site: str
    start: str
    explained: float
    """Share of the target's energy explained on rows of batches the fit never saw (NaN where a start has no target)."""
    t_statistic: float
    scale: float
    flops: float


class Judged(Event, frozen=True, kw_only=True, tag="judged"):
    """The evidence on one cohort: paired held-out gain with its interval, and what was concluded."""

    cohort: int
    stage: str
    """``evaluate`` (the acceptance test) or ``hold`` (is the gain still there before it becomes permanent?)."""
    sites: tuple[str, ...]
    gain: float
    gain_low: float
    gain_high: float
    gain_shrunken: float
    e_value: float
    e_threshold: float
    confirm_p: float
    """p-value of the single confirmation on batches used for nothing else; NaN when it was not reached."""
    num_batches: int
    accepted: bool
    added_params: int
    added_flops_share: float
    flops: float
    reason: str


class Refused(Event, frozen=True, kw_only=True, tag="refused"):
    """A gate said no; nothing was changed. ``gate`` names it, ``reason`` gives rule, value and remedy."""

    command: str
    gate: str
    reason: str


class Telemetry(Event, frozen=True, kw_only=True, tag="telemetry"):
    """One snapshot of all sites: means over chunks, a value a site; NaN where a sensor is silent."""

    sites: tuple[str, ...]
    activation_mean: tuple[float, ...]
    activation_var: tuple[float, ...]
    gradient_energy: tuple[float, ...]
    grown: tuple[int, ...]
    """Grown units per site: annex and live seeds."""


class Overhead(Event, frozen=True, kw_only=True, tag="overhead"):
    """Milliseconds Esper spent since the last such event, by part, over ``num_steps`` real steps."""

    num_steps: int
    milliseconds: dict[str, float]


class Stopped(Event, frozen=True, kw_only=True, tag="stopped"):
    """Growth ended by itself or on command; training goes on."""

    reason: str


class Warned(Event, frozen=True, kw_only=True, tag="warned"):
    """Something the user should know; the run goes on."""

    message: str


class ArmFinished(Event, frozen=True, kw_only=True, tag="arm_finished"):
    """One training run of one arm, scored on the test split. ``score`` is higher-is-better."""

    score: float
    score_name: str
    loss: float
    params: int
    flops: float
    seconds: float
    lr: float
    widths: dict[str, int]
    """Inner width per span site at the end."""


class RunFinished(Event, frozen=True, kw_only=True, tag="run_finished"):
    """The last line of a run that ended by itself. ``summary`` is what ``--json`` writes."""

    summary: dict[str, Any]


AnyEvent = (
    RunStarted
    | Attached
    | TrainLoss
    | HeldOut
    | Germinated
    | Transitioned
    | AlphaMoved
    | Fitted
    | Judged
    | Refused
    | Telemetry
    | Overhead
    | Stopped
    | Warned
    | ArmFinished
    | RunFinished
)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An event as written: schema version, position in the log, wall-clock time in seconds, the event itself."""

    v: int
    seq: int
    time: float
    event: AnyEvent
