"""Every setting a user may change: frozen, keyword-only, validated once, here.

Durations are counted in *real* optimizer steps (skipped and accumulating calls do not count).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from esper.errors import ConfigError


def _check(condition: bool, rule: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{rule}, got {value!r}; {remedy}")


@dataclass(frozen=True, kw_only=True)
class SitesConfig:
    """Which modules may grow."""

    include: tuple[str, ...] = ("*",)
    """Glob patterns over site names (``grower.sites()``); every pattern must match something."""
    exclude: tuple[str, ...] = ()
    """Patterns of sites to leave out, applied after ``include``."""
    layers: bool = False
    """Also offer single layers (Linear, convolutions, norms, embeddings, attention, recurrent), not only spans."""
    chunks: int | Literal["feature"] | None = None
    """Chunks a site: a number (never more than a site's output features), ``"feature"`` for one a feature, or ``None``
    for one a feature up to 1,024."""

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            given = getattr(self, name)
            _check(not isinstance(given, str), f"sites.{name} must be a tuple of patterns", given, f"use ({given!r},)")
        _check(len(self.include) > 0, "sites.include must hold at least one pattern", self.include, "use ('*',)")
        known = self.chunks in (None, "feature") or (type(self.chunks) is int and self.chunks >= 1)
        _check(known, "sites.chunks must be at least 1", self.chunks, 'use None, or "feature" for one a feature')


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """How the network is watched."""

    every: int = 10
    """Steps between telemetry snapshots, each taken in the step before a multiple of it; only while anything lives or
    anybody looks: a controller that does not just wait, who hears events, a bus, a measured held-out loss."""
    rows: int = 512
    """Rows (positions) read a snapshot, strided over the batch."""

    def __post_init__(self) -> None:
        _check(self.every >= 1, "telemetry.every must be at least 1", self.every, "use 10")
        _check(self.rows >= 1, "telemetry.rows must be at least 1", self.rows, "use 512")

    def is_due(self, step: int) -> bool:
        """Whether the sensors report in a step: the one before each multiple of ``every``, so that what they say has
        arrived when it is asked for."""
        return (step + 1) % self.every == 0

    def next_due(self, step: int) -> int:
        """First step after ``step`` in which they report."""
        return step + self.every - (step + 1) % self.every


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What a germinated seed's site records before the isolated training."""

    batches: int = 8
    """Training batches to record."""
    rows: int = 131_072
    """Rows to keep over all these batches (positions; images for convolutions count as their output positions)."""
    max_bytes: int = 1 << 30
    """Ceiling for all captures alive at once. A quarter of the free memory is another, and on GPUs, unless you name one
    here, a twentieth of what the training takes; ``esper doctor`` and the ``germinated`` event tell what was chosen."""
    timeout: int = 200
    """Steps after which an unfilled capture cancels its cohort."""
    max_age: int = 50
    """Steps after which captured rows are too old to graft on."""

    def __post_init__(self) -> None:
        _check(self.batches >= 2, "capture.batches must be at least 2 (fit and check)", self.batches, "use 8")
        _check(self.rows >= 16, "capture.rows must be at least 16", self.rows, "use 131072")
        _check(self.max_bytes >= 1 << 16, "capture.max_bytes must be at least 64 KiB", self.max_bytes, "use 1 << 30")
        _check(self.timeout >= 1, "capture.timeout must be at least 1", self.timeout, "use 200")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The isolated training of a candidate branch."""

    start: str | None = None
    """How first weights are made; ``None`` chooses by site kind and optimizer."""

    steps: int = 150
    """Optimizer steps of the isolated fit (Adam)."""
    batch_rows: int = 8192
    """Captured rows a step of the fit."""
    lr: float = 3e-3
    """Learning rate of the fit."""
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Multiples of ``base_scale`` tried with real forward losses."""
    base_scale: float = 0.1
    """First size of a fitted branch: its RMS as a share of the site's output RMS."""
    max_share: float | None = 0.1
    """Most FLOPs a cohort's fits may take, as a share of the training that is left: fits get fewer steps, or none and
    an output of zero. ``None``, or an unknown ``total_steps``, sets no limit."""
    min_t: float = 2.0
    """The fit must predict a gain on other batches with at least this clustered t statistic."""
    unproven: str = "zero"
    """What becomes of a fit below ``min_t``: ``zero`` keeps its features with output weights of zero, ``cull``
    removes the seed."""
    reconstruction_threshold: float = 0.9
    """Largest share of the output's variance a reconstruction fit may leave unexplained on other batches."""

    def __post_init__(self) -> None:
        _check(self.steps >= 1, "fit.steps must be at least 1", self.steps, "use 150")
        _check(self.unproven in ("zero", "cull"), "fit.unproven must be zero or cull", self.unproven, "use 'zero'")
        _check(self.lr > 0, "fit.lr must be positive", self.lr, "use 3e-3")
        share = self.max_share
        _check(share is None or share >= 0, "fit.max_share must not be negative", share, "use 0.1")
        _check(len(self.scales) > 0 and min(self.scales) > 0, "fit.scales must be positive", self.scales, "use (1.0,)")


@dataclass(frozen=True, kw_only=True)
class GraftConfig:
    """How a branch is blended in and how it learns."""

    strategy: str = "fixed_ramp"
    """How alpha moves: ``fixed_ramp``; the others wait now and then: ``performance_linked`` while the training loss is
    worse than before the graft, ``drift_controlled`` while the host's weights drift, ``grad_norm_gated`` while the
    gradient's size is unusual; or any name given to ``esper.register_strategy``."""
    ramp: str = "linear"
    """Shape of ``fixed_ramp``: linear, cosine or sigmoid."""
    ramp_steps: int = 50
    """Steps in which alpha rises from 0 to 1."""
    drift_threshold: float = 0.05
    """Relative distance of the host's weights from their running average above which ``drift_controlled`` waits."""
    pause_duration: int = 50
    """Longest pause a strategy may make at a stretch; 0 for none."""
    performance_window: int = 16
    """Training losses since the graft began over whose mean ``performance_linked`` judges."""
    performance_band: float = 2.0
    """Standard errors by which that mean may exceed the level before the graft."""
    grad_norm_window: int = 50
    """Steps behind the running median of ``grad_norm_gated``."""
    grad_norm_band: tuple[float, float] = (0.5, 2.0)
    """Gradient norms that ``grad_norm_gated`` finds usual, as multiples of the running median."""
    timeout: int = 400
    """Longest stay in GRAFTING, and in STABILIZATION; a cohort that needs more is culled."""
    settle_steps: int = 0
    """Steps a branch learns at full alpha before it is frozen and judged."""
    stabilize_steps: int = 10
    """Fewest steps a branch stays frozen at full alpha before it is judged."""
    stabilize_window: int = 30
    """Steps over which slope and variance of the loss are read."""
    fine_tune_steps: int = 20
    """Steps an accepted branch learns on before it is looked at once more."""
    cull_steps: int = 10
    """Steps over which a culled branch's alpha ramps to zero."""
    lr_boost: float = 2.0
    """Learning rate of new units over the host's."""
    lr_ceiling: float | None = 1.0
    """Ceiling on the boosted learning rate, as a multiple of the largest the host has had (``None``: no ceiling)."""
    warmup_steps: int = 50
    """Steps over which the learning rate of new units rises from zero."""
    embargo: int = 100
    """Steps a chunk rests after its seed was removed."""
    recompute: bool | None = None
    """Branches on Linear spans compute their hidden units again in the backward pass instead of keeping them: memory
    for a sixth more of a branch's training FLOPs. ``None``: on GPUs. Spans with dropout keep them."""

    def __post_init__(self) -> None:
        ramps = ("linear", "cosine", "sigmoid")
        _check(self.ramp in ramps, "graft.ramp must be linear, cosine or sigmoid", self.ramp, "use 'linear'")
        _check(self.ramp_steps >= 1, "graft.ramp_steps must be at least 1", self.ramp_steps, "use 50")
        self._check_pauses()
        _check(
            self.timeout > self.ramp_steps + self.settle_steps,
            "graft.timeout must exceed graft.ramp_steps + graft.settle_steps",
            self.timeout,
            "raise it",
        )
        _check(self.lr_boost > 0, "graft.lr_boost must be positive", self.lr_boost, "use 2.0")
        most = self.lr_ceiling
        _check(most is None or most > 0, "graft.lr_ceiling must be positive", most, "use 1.0, or None for no ceiling")
        _check(self.embargo >= 0, "graft.embargo must not be negative", self.embargo, "use 100")

    def _check_pauses(self) -> None:
        _check(self.drift_threshold > 0, "graft.drift_threshold must be positive", self.drift_threshold, "use 0.05")
        _check(self.pause_duration >= 0, "graft.pause_duration must not be negative", self.pause_duration, "use 50")
        window, band = self.performance_window, self.performance_band
        _check(window >= 1, "graft.performance_window must be at least 1", window, "use 16")
        _check(band >= 0, "graft.performance_band must not be negative", band, "use 2.0")
        _check(self.grad_norm_window >= 1, "graft.grad_norm_window must be at least 1", self.grad_norm_window, "use 50")
        _check(
            len(self.grad_norm_band) == 2 and 0 <= self.grad_norm_band[0] < 1 < self.grad_norm_band[1],
            "graft.grad_norm_band must hold a low end in [0, 1) and a high end above 1",
            self.grad_norm_band,
            "use (0.5, 2.0)",
        )


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """How a branch proves itself."""

    fdr: float = 0.05
    """False discovery rate over all cohorts of a run."""
    confirm_level: float = 0.05
    """Level of the single confirmation."""
    looks: int = 3
    """Most times a cohort is judged: while it shows a gain that is not proven yet, it learns on and is judged again."""
    calibration_share: float = 0.2
    """Share of the held-out batches that fix scales before a test starts."""
    confirm_share: float = 0.3
    """Share of the held-out batches kept for confirmations; what calibration and confirmation leave judges."""
    min_gain: float = 0.0
    """Smallest gain (loss units) that counts as one."""
    control: str = "projected"
    """What the branch is compared with: ``projected`` lets the host's own layer take over what it can express, or
    asks an earlier host where that is all of it (see docs/decisions), ``plain`` just switches the branch off."""
    accept: str = "evidence"
    """``evidence`` judges every cohort; ``always`` keeps whatever reaches judgement (a control arm, not for use)."""
    projection_rows: int = 8192
    """Calibration rows for fitting the projected control."""
    min_gain_per_cost: float = 0.0
    """Smallest relative gain per relative FLOPs at which a branch may become permanent."""
    tolerated_harm: float = 0.01
    """What becomes permanent must not raise the held-out loss by more than this share of it, at 95% confidence."""
    held_out_batches: int = 4
    """Gate batches behind the held-out curve."""
    twin_share: float = 0.0
    """Share of grafted cohorts that get a twin: the network trained on the same batches without them (needs
    ``grower.step(loss, batch=...)``; costs a second training while it lasts)."""
    twin_steps: int = 100
    """Steps a twin trains before it is compared with the host."""
    withhold_share: float = 0.0
    """Share of the cohorts ready for grafting that are not grafted, by a draw: what grafting does is the difference."""
    withhold_steps: int = 100
    """Steps a withheld cohort keeps its place, and after which the held-out loss of either kind is read."""

    def __post_init__(self) -> None:
        self._check_trials()
        _check(self.tolerated_harm >= 0, "evidence.tolerated_harm must be at least 0", self.tolerated_harm, "0.01")
        _check(self.looks >= 1, "evidence.looks must be at least 1", self.looks, "use 3")
        _check(0 < self.fdr < 1, "evidence.fdr must lie between 0 and 1", self.fdr, "use 0.05")
        level = self.confirm_level
        _check(0 < level < 1, "evidence.confirm_level must lie between 0 and 1", level, "use 0.05")
        _check(
            0 < self.calibration_share and 0 < self.confirm_share and self.calibration_share + self.confirm_share < 1,
            "evidence.calibration_share and confirm_share must be positive and leave room for the gate",
            (self.calibration_share, self.confirm_share),
            "use 0.2 and 0.3",
        )
        _check(
            self.accept in ("evidence", "always"),
            "evidence.accept must be evidence or always",
            self.accept,
            "use 'evidence'",
        )
        _check(
            self.control in ("projected", "plain"),
            "evidence.control must be projected or plain",
            self.control,
            "use 'projected'",
        )

    def _check_trials(self) -> None:
        for name in ("twin", "withhold"):
            share, steps = getattr(self, f"{name}_share"), getattr(self, f"{name}_steps")
            _check(0 <= share <= 1, f"evidence.{name}_share must lie between 0 and 1", share, "use 0.15")
            _check(steps >= 1, f"evidence.{name}_steps must be at least 1", steps, "use 100")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """The ceiling, if any."""

    params: int | None = None
    """Most parameters the whole model may have."""
    flops_share: float | None = None
    """Most forward FLOPs a step, as a multiple of the host's."""

    def __post_init__(self) -> None:
        _check(self.params is None or self.params > 0, "budget.params must be positive", self.params, "use None")
        _check(
            self.flops_share is None or self.flops_share >= 1,
            "budget.flops_share must be at least 1 (the host itself)",
            self.flops_share,
            "use None",
        )


@dataclass(frozen=True, kw_only=True)
class TamiyoConfig:
    """The controller's temper."""

    controller: str = "heuristic"
    """heuristic, neural, bandit, schedule, random, never, or a registered one of your own."""
    policy: str | None = None
    """Folder of the policy that the controller ``neural`` follows; ``None``: the one that comes with the package."""
    temper: str = "balanced"
    """conservative, balanced, aggressive or exploratory."""
    first: int | None = None
    """Steps before the first germination; ``None``: as late as leaves new units 700 steps to learn, between 10% and
    40% of ``total_steps``, at most 2,000 (0024); 100 without ``total_steps``."""
    spacing: int = 0
    """Fewest steps between germinations: spreading growth over the run saves FLOPs while the network is small."""
    growth: float | None = None
    """Units a cohort adds to a span, as a multiple of the host's inner width; ``None``: half of it. With
    ``total_steps`` ``None`` is as many as add half of the host's FLOPs where that is more, up to four times the width,
    and of either no more than the span has outputs (or inputs and a bias), but at least half (0025)."""
    compound: bool = False
    """Take ``growth`` as a multiple of the present inner width, grown units included."""
    seeds_per_site: int = 1
    """Seeds that a cohort's units on a site are shared out to, each on a share of its chunks (at most one a unit)."""
    keep_share: float = 1.0
    """Share of a site's seeds that are grafted after isolated training: those with most first-order held-out gain."""
    last_share: float = 0.15
    """After this share of ``total_steps`` nothing follows a cohort that was kept (0021): where ``first`` is later, the
    first one that is kept is the last. As long as nothing was kept it is tried until 0.6."""
    min_gain_per_cost: float = 0.02
    """Stop when gain (relative to the held-out loss) over cost (relative FLOPs added) falls under this."""
    patience: int | None = None
    """Cohorts in a row under the threshold, or refused, before growth stops; ``None``: 1 with ``total_steps``,
    else 2 (0025); above 1,000 they never do."""

    def __post_init__(self) -> None:
        _check(
            self.temper in ("conservative", "balanced", "aggressive", "exploratory"),
            "tamiyo.temper must be conservative, balanced, aggressive or exploratory",
            self.temper,
            "use 'balanced'",
        )
        _check(self.growth is None or self.growth > 0, "tamiyo.growth must be positive", self.growth, "use None")
        _check(self.patience is None or self.patience > 0, "tamiyo.patience must be at least 1", self.patience, "use 1")
        _check(self.seeds_per_site >= 1, "tamiyo.seeds_per_site must be at least 1", self.seeds_per_site, "use 1")
        _check(0 < self.keep_share <= 1, "tamiyo.keep_share must lie in (0, 1]", self.keep_share, "use 1.0")
        _check(0 < self.last_share <= 1, "tamiyo.last_share must lie in (0, 1]", self.last_share, "use 0.15")
        _check(self.first is None or self.first >= 0, "tamiyo.first must be at least 0", self.first, "use None")


@dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """What is done so that growth never costs the training itself."""

    snapshots: bool = True
    """Keep an exact copy of the whole training from just before every graft, in the CPU's memory, to go back to."""
    snapshot_bytes: int = 4 << 30
    """Most memory for these copies; a graft beyond it goes without one, and says so."""
    stored_snapshot_bytes: int = 256 << 20
    """Most bytes of them in a saved state, so that grafts can be taken back exactly after a load too; newest first."""
    window: int = 100
    """Training losses that the latest ones are compared with."""
    max_z: float = 10.0
    """A loss has diverged when its level lies so many (robust) standard deviations above that window's ..."""
    ratio: float = 2.0
    """... and is so many times as large: both must hold."""
    recovery: int = 50
    """Steps in which a diverged loss must have come back after the suspect was taken out, or the copy is restored."""
    headroom: float = 0.05
    """Share of a GPU's memory that a germination must leave free."""

    def __post_init__(self) -> None:
        _check(self.window >= 2, "safety.window must be at least 2", self.window, "use 100")
        _check(self.max_z > 0, "safety.max_z must be positive", self.max_z, "use 10.0")
        _check(self.ratio > 1, "safety.ratio must be above 1", self.ratio, "use 2.0")
        _check(self.recovery >= 1, "safety.recovery must be at least 1", self.recovery, "use 50")
        _check(0 <= self.headroom < 1, "safety.headroom must lie in [0, 1)", self.headroom, "use 0.05")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of an :class:`esper.Grower`; each part is validated where it is defined."""

    sites: SitesConfig = field(default_factory=SitesConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    graft: GraftConfig = field(default_factory=GraftConfig)
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    tamiyo: TamiyoConfig = field(default_factory=TamiyoConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    interval: int = 10
    """Steps between decisions."""
    total_steps: int | None = None
    """Steps the run will take, if known."""
    held_out_every: int = 100
    """Steps between held-out measurements outside judgements."""
    seed: int = 0
    """Seed of Esper's own generators (the global streams are never touched)."""

    def __post_init__(self) -> None:
        _check(self.interval >= 1, "interval must be at least 1", self.interval, "use 10")
        total = self.total_steps
        _check(total is None or total >= 1, "total_steps must be at least 1", total, "leave it None when unknown")
        _check(self.held_out_every >= 1, "held_out_every must be at least 1", self.held_out_every, "use 100")
