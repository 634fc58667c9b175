"""The truth of a run, one line each in events.jsonl."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from esper.protocol.lifecycle import Lifecycle
from esper.protocol.sites import SiteInfo, Skipped

SCHEMA_VERSION = 1
"""Version of the event and command schema; raised when a field changes meaning or is removed."""


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
    notes: tuple[str, ...] = ()
    """What was chosen otherwise than asked (fewer chunks where memory is short), and why."""
    family: str = ""
    """What kind of network the host is (``mlp``, ``conv``, ``transformer``, ``recurrent``); empty is unknown."""
    optimizer: str = ""
    """The host's optimizer: ``adaptive`` or ``sgd``; empty is unknown."""


class TrainLoss(Event, frozen=True, kw_only=True, tag="train_loss"):
    """The user's loss at a decision point (not smoothed); while nothing is alive that of the step before."""

    loss: float
    flops: float
    """FLOPs spent so far by this arm, everything counted."""


class HeldOut(Event, frozen=True, kw_only=True, tag="held_out"):
    """Held-out loss on gate batches; ``flops`` spent so far and ``params`` now."""

    loss: float
    params: int
    flops: float


class Germinated(Event, frozen=True, kw_only=True, tag="germinated"):
    """A cohort came alive. One entry a seed in ``seeds``, ``sites``, ``widths`` and ``chunks`` (how many it holds).

    The tuples behind ``chunks`` have one too, or are empty in logs of an Esper that did not know them.
    """

    cohort: int
    seeds: tuple[int, ...]
    sites: tuple[str, ...]
    blueprints: tuple[str, ...]
    starts: tuple[str, ...]
    widths: tuple[int, ...]
    added_params: int
    reason: str
    chunks: tuple[int, ...] = ()
    params: tuple[int, ...] = ()
    """Parameters of each seed."""
    scales: tuple[float, ...] = ()
    lr_scales: tuple[float, ...] = ()
    designs: tuple[str, ...] = ()
    """Name of the design that each seed follows; empty for none."""
    model_params: int = 0
    """Parameters of the whole model before it; 0 is unknown."""
    added_flops_share: float = math.nan
    """Forward FLOPs the cohort adds, as a share of the model's before it."""


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
    look: int = 1
    """Which look at the cohort this was, for ``evaluate``."""
    undecided: bool = False
    """Not accepted, but not rejected either: it learns on and is judged again."""


class TwinScored(Event, frozen=True, kw_only=True, tag="twin_scored"):
    """What a cohort changed against its twin: the network it was grafted on, trained on the same batches without it.

    ``credit`` is the mean over held-out batches of the twin's loss minus the host's (positive: the cohort helped), with
    its 95% interval. It decides nothing.
    """

    cohort: int
    sites: tuple[str, ...]
    num_steps: int
    """Steps both have trained since the graft."""
    credit: float
    credit_low: float
    credit_high: float
    loss: float
    """Of the host, over the same batches."""
    num_batches: int
    flops: float
    """The twin's training and its score."""
    reason: str
    """Why it was scored at this step."""


class Withheld(Event, frozen=True, kw_only=True, tag="withheld"):
    """A cohort that was ready to be grafted was drawn not to be; it keeps its place until the step ``until``."""

    cohort: int
    sites: tuple[str, ...]
    until: int


class EffectScored(Event, frozen=True, kw_only=True, tag="effect_scored"):
    """How the held-out loss moved in ``num_steps`` after a ready cohort was grafted or, by a draw, withheld."""

    cohort: int
    withheld: bool
    loss_before: float
    loss_after: float
    num_steps: int
    flops: float


class Audited(Event, frozen=True, kw_only=True, tag="audited"):
    """An accepted cohort scored after the run, on batches that nothing had read before.

    Gains are in loss units; positive is better.
    """

    cohort: int
    sites: tuple[str, ...]
    source: str
    """``on_off``: as it was when it became permanent, with and without it. ``twin``: host against twin, as they were
    when the twin was scored."""
    claimed: float
    """Gain measured when the cohort was accepted."""
    claimed_shrunken: float
    gain: float
    gain_low: float
    gain_high: float
    loss: float
    """With the cohort, over the audit batches."""
    num_batches: int
    flops: float


class Refused(Event, frozen=True, kw_only=True, tag="refused"):
    """A gate said no; nothing was changed. ``gate`` names it, ``reason`` gives rule, value and remedy."""

    command: str
    gate: str
    reason: str
    issuer: str = ""


class Commanded(Event, frozen=True, kw_only=True, tag="commanded"):
    """An order from outside was judged: who wanted what, and what became of it."""

    id: str
    issuer: str
    kind: str
    outcome: str
    """``applied``, ``refused`` or ``expired``."""
    gate: str
    reason: str
    again: bool = False
    """It was applied before, but that was taken back with the whole training. Its acknowledgement is the first one."""


class GrowthPaused(Event, frozen=True, kw_only=True, tag="growth_paused"):
    """Growth as a whole waits (``paused``), or goes on."""

    paused: bool
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


class Absorbed(Event, frozen=True, kw_only=True, tag="absorbed"):
    """Growth has moved into the host's own layers, by name; ``params`` is what the host has gained."""

    layers: tuple[str, ...]
    params: int


class Incident(Event, frozen=True, kw_only=True, tag="incident"):
    """Something went wrong: non-finite numbers, a loss that diverges, no memory, a plug-in that raised."""

    cohort: int | None
    """The suspect, or ``None`` where nothing of Esper was on trial: then it is the training's own."""
    action: str
    """``removed`` (one cohort out, the host untouched), ``restored`` (the whole training taken back to before the
    graft, exactly) or ``reported``."""
    reason: str


class Restored(Event, frozen=True, kw_only=True, tag="restored"):
    """The whole training was put back, exactly, to what it was after ``to_step``; what followed did not happen."""

    to_step: int
    cohort: int | None
    """The cohort whose graft was undone; it ends right after."""
    verified: bool
    """Whether the restored state has the snapshot's hash."""
    rewound: bool
    """Whether the data went back as well; otherwise training goes on with the next batch."""
    digest: str
    reason: str


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
    | TwinScored
    | Withheld
    | EffectScored
    | Audited
    | Refused
    | Commanded
    | GrowthPaused
    | Telemetry
    | Overhead
    | Stopped
    | Warned
    | Absorbed
    | Incident
    | Restored
    | ArmFinished
    | RunFinished
)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An event as written: schema version, position in the log, wall-clock time in seconds, the event itself."""

    v: int
    seq: int
    time: float
    event: AnyEvent
