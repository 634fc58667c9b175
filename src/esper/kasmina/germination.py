"""Make cohorts: complete what a plan leaves open, ask the gate, then create banks, table rows and captures."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from esper.config import Config
from esper.errors import EsperError
from esper.kasmina import memory
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS, refusal_of
from esper.kasmina.capture import Capture, rows_per_batch
from esper.kasmina.chunks import columns_of
from esper.kasmina.cohort import Cohort, Member
from esper.kasmina.defaults import default_blueprint, default_start
from esper.kasmina.discovery import SitePlan, present_geometry
from esper.kasmina.gates import Gate, germination_gate
from esper.kasmina.seeds import SeedTable
from esper.kasmina.site import Site
from esper.kasmina.starts import STARTS
from esper.kasmina.starts.start import refusal_of as start_refusal
from esper.kasmina.strategies import STRATEGIES
from esper.protocol import SeedPlan

MAX_LIVE_SEEDS = 1 << 20
_BYTES_PER_PARAM = 12
"""A weight and its two moments, float32."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """One plan with nothing left open: N seeds of one kind."""

    site: str
    chunks: npt.NDArray[np.int64]
    """``(N, C)``: the chunks of each seed."""
    blueprint: str
    width: int
    start: str
    strategy: str
    keep: int | None
    scale: float
    lr_scale: float
    design: str
    params: int
    """Of all N seeds."""
    flops: float
    """Forward FLOPs a training step, of all N seeds."""
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What the model has and costs before a germination, and the ceilings on it."""

    params: int
    flops: float
    """Forward FLOPs a training step, everything grown included."""
    budget_params: int | None
    budget_flops: float | None


@dataclass(kw_only=True)
class Nursery:
    """Makes cohorts on a model's sites.

    The mappings are Kasmina's own and change under it: output rows of a real step, output rows and samples of one
    call, each by site.
    """

    config: Config
    adaptive: bool
    plans: Mapping[str, SitePlan]
    sites: Mapping[str, Site]
    table: SeedTable
    index: Mapping[str, int]
    rows_per_step: Mapping[str, int]
    rows_per_batch: Mapping[str, int]
    samples_per_batch: Mapping[str, int]
    generator: torch.Generator
    next_cohort: int = 1

    def germinate(self, plans: Sequence[SeedPlan], room: Room, *, step: int) -> Cohort | Gate:
        """Make a cohort of ``plans``, all or nothing; a :class:`Gate` says why not.

        Raises
        ------
        EsperError
            For an unknown site, blueprint, start or strategy (the known ones are listed), or seeds that do not go
            together.
        """
        if not plans:
            return Gate("germination", False, "a cohort needs at least one seed, got none; name a site")
        seeds = [self._resolve(plan, step) for plan in plans]
        params, flops = sum(seed.params for seed in seeds), sum(seed.flops for seed in seeds)
        waiting = sum(len(seed.chunks) for seed in seeds) - 1
        free_slots = MAX_LIVE_SEEDS - len(self.table.occupied()) - waiting
        for seed in seeds:
            gate = self._gate(seed, params, flops, room, step, free_slots)
            if not gate.passed:
                return Gate(gate.name, False, f"{seed.site}: {gate.reason}")
        return self._create(seeds, params, flops / max(1.0, room.flops), step)

    # ---------------------------------------------------------------------------------------------- may it be?

    def _resolve(self, plan: SeedPlan, step: int) -> Resolved:
        if plan.site not in self.sites:
            near = difflib.get_close_matches(plan.site, self.sites, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise EsperError(f"no site is called {plan.site!r}; {hint}known: {', '.join(list(self.sites)[:8])}")
        site = self.sites[plan.site]
        blueprint = plan.blueprint or default_blueprint(site.info.kind)
        if site.info.kind not in BLUEPRINTS[blueprint].kinds:
            raise EsperError(
                f"blueprint {blueprint!r} sits on {', '.join(sorted(BLUEPRINTS[blueprint].kinds))}, got site "
                f"{plan.site!r} of kind {site.info.kind}; use {default_blueprint(site.info.kind)!r}"
            )
        family = BLUEPRINTS[blueprint]
        reason = refusal_of(blueprint, site.geometry)
        if reason is not None:
            raise EsperError(f"blueprint {blueprint!r} cannot sit on {plan.site!r}: {reason}")
        start = self._start(plan, site, blueprint)
        strategy = plan.strategy or self.config.graft.strategy
        STRATEGIES[strategy]
        chunks, notes = self._shared_out(plan, step)
        bounds = self.table.bounds[self.index[plan.site]]
        columns = len(columns_of(bounds, chunks[0])) if len(chunks) else 0
        columns_of(bounds, chunks)  # raises for absent chunks
        if plan.width is not None and plan.width < 1:
            raise EsperError(f"a seed's width must be at least 1, got {plan.width} on {plan.site!r}; leave it None")
        width = family.resolve_units(site.geometry, plan.width)
        if plan.width is None:
            width = max(1, width // max(1, len(chunks)))  # the default is what a site gets, all seeds together
        _check_scales(plan, blueprint, start)
        cap = STARTS[start].max_units(site.geometry, columns=columns, reads=site.reads)
        if cap is not None and width > cap > 0:
            notes += (f"{plan.site}: {start} gives a seed here at most {cap} units (its rank), {width} were asked for",)
            width = cap
        cost = family.cost(site.geometry, units=width, columns=columns, reads=site.reads)
        return Resolved(
            site=plan.site, chunks=chunks, blueprint=blueprint, width=width, start=start, strategy=strategy,
            keep=plan.keep, scale=plan.scale, lr_scale=plan.lr_scale, design=plan.design or "",
            params=cost.params * len(chunks),
            flops=cost.flops_per_row * self.rows_per_step[plan.site] * len(chunks), notes=notes,
        )  # fmt: skip

    def _start(self, plan: SeedPlan, site: Site, blueprint: str) -> str:
        """The start that the plan names, else the configuration, else the default of the site's kind."""
        rows = self.rows_per_batch[plan.site] * self.config.capture.batches
        asked = plan.start or self.config.fit.start
        start = asked or default_start(site.info.kind, adaptive=self.adaptive, expected_rows=rows)
        refusal = _start_refusal(start, blueprint, site)
        if refusal is None:
            return start
        if asked is None or (plan.start is None and not site.info.kind.is_span):
            return "random_zero"  # nobody asked for it here: a configuration is written with spans in mind
        raise EsperError(f"{plan.site}: {refusal}")

    def _shared_out(self, plan: SeedPlan, step: int) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """``(N, C)`` chunks of each seed, and what had to be done otherwise than asked."""
        if plan.seeds < 1 or (plan.keep is not None and not 1 <= plan.keep):
            raise EsperError(
                f"a plan's seeds and keep must be at least 1, got {plan.seeds} and {plan.keep} on {plan.site!r}; "
                "leave keep None to keep all"
            )
        free = self.table.free_chunks(self.index[plan.site], step)
        chunks = np.array(plan.chunks, dtype=np.int64) if plan.chunks else free
        num = max(1, min(plan.seeds, chunks.size))
        each = chunks.size // num
        notes: tuple[str, ...] = ()
        if num < plan.seeds:
            notes += (f"{plan.site}: {num} chunks make at most {num} seeds, {plan.seeds} were asked for",)
        if num * each < chunks.size:
            notes += (f"{plan.site}: {chunks.size - num * each} of {chunks.size} chunks stay dormant (uneven shares)",)
        return chunks[: num * each].reshape(num, each), notes

    def _gate(self, seed: Resolved, params: int, flops: float, room: Room, step: int, free_slots: int) -> Gate:
        """The gate for one seed of a cohort that adds ``params`` and ``flops`` as a whole."""
        index = self.index[seed.site]
        rows = slice(int(self.table.offsets[index]), int(self.table.offsets[index + 1]))
        site = self.sites[seed.site]
        if site.refused is not None:
            return Gate("germination", False, f"the site cannot be used: {site.refused}")
        needed, room_there = params * _BYTES_PER_PARAM, memory.device_bytes(self.plans[seed.site].weight.device)
        if room_there is not None and needed > room_there[0] - self.config.safety.headroom * room_there[1]:
            reason = (
                f"a germination must leave {self.config.safety.headroom:.0%} of the GPU's {room_there[1]} bytes free "
                f"(safety.headroom), got {needed} needed and {room_there[0]} free; grow less, or free memory"
            )
            return Gate("memory", False, reason)
        owned = self.table.owner[rows][seed.chunks] >= 0
        capturing = sum(s.capture.num_bytes for s in self.sites.values() if s.capture is not None)
        return germination_gate(
            free_slots=free_slots,
            chunks_free=0 if bool(owned.any()) else seed.chunks.size,
            embargo=int((self.table.embargo_until[rows][seed.chunks] - step).max(initial=0)),
            params_after=room.params + params,
            budget_params=room.budget_params,
            flops_after=max(1.0, room.flops + flops),
            budget_flops=room.budget_flops,
            bytes_needed=needed,
            bytes_free=max(0, self.config.capture.max_bytes - capturing),
        )

    # ---------------------------------------------------------------------------------------------- make it

    def _create(self, seeds: Sequence[Resolved], params: int, flops_share: float, step: int) -> Cohort:
        number = self.next_cohort
        grouped: dict[str, list[Resolved]] = {}
        for seed in seeds:
            grouped.setdefault(seed.site, []).append(seed)
        # all sites are checked before anything is made
        columns = {name: self._columns(name, group) for name, group in grouped.items()}
        notes = [note for seed in seeds for note in seed.notes]
        banks = self._create_banks(grouped, columns, notes)
        members = {name: self._seat(name, group, banks[name], number, step) for name, group in grouped.items()}
        total = sum(seed.flops for seed in seeds)
        for name, member in members.items():
            part = sum(seed.flops for seed in grouped[name]) / total if total > 0 else 0.0
            member.flops_share = flops_share * part
        slots = np.concatenate([member.slots for member in members.values()])
        self.next_cohort += 1
        return Cohort(
            number=number,
            members=members,
            strategy=seeds[0].strategy,
            born=step,
            entered=step,
            seed_ids=tuple(self.table.seed_id[slots].tolist()),
            added_params=params,
            added_flops_share=flops_share,
            notes=tuple(dict.fromkeys(notes)),
        )

    def _columns(self, name: str, group: Sequence[Resolved]) -> npt.NDArray[np.int64]:
        """``(N, K)`` feature columns of all seeds of a cohort on one site.

        Raises
        ------
        EsperError
            Seeds that do not go together.
        """
        kinds = {(s.blueprint, s.width, s.start, s.chunks.shape[1], s.scale, s.lr_scale) for s in group}
        if len(kinds) > 1:
            raise EsperError(
                f"seeds of one cohort on one site must share blueprint, width, start, scales and number of chunks, got "
                f"{len(kinds)} kinds on {name!r}; germinate them as cohorts of their own"
            )
        chunks = np.concatenate([seed.chunks for seed in group])
        if len(np.unique(chunks)) < chunks.size:
            raise EsperError(f"a chunk can be named once in a cohort, got one twice on {name!r}; name each once")
        bounds = self.table.bounds[self.index[name]]
        sizes = np.diff(bounds)[chunks].sum(axis=1)
        if (sizes != sizes[0]).any():
            raise EsperError(
                f"seeds of one cohort on {name!r} must cover equally many features, got {sizes.min()} to "
                f"{sizes.max()}; choose other chunks, or sites.chunks that divides its {bounds[-1]} features"
            )
        return columns_of(bounds, chunks).reshape(len(chunks), -1)

    def _create_banks(
        self,
        grouped: Mapping[str, Sequence[Resolved]],
        columns: Mapping[str, npt.NDArray[np.int64]],
        notes: list[str],
    ) -> dict[str, Bank]:
        """Storage and captures of a cohort, for all sites or none: a user's blueprint may fail, and memory may end."""
        banks: dict[str, Bank] = {}
        capturing: list[Site] = []
        try:
            for name, group in grouped.items():
                site, first = self.sites[name], group[0]
                whole = len(columns[name]) == 1 and columns[name].size == site.info.out_features
                banks[name] = Bank(
                    first.blueprint,
                    present_geometry(self.plans[name]),
                    units=first.width,
                    reads=site.reads,
                    columns=None if whole else torch.from_numpy(columns[name]),
                    generator=self.generator,
                    device=self.plans[name].weight.device,
                    scale=first.scale,
                    lr_scale=first.lr_scale,
                )
                if STARTS[first.start].needs_rows and site.capture is None:
                    site.capture = self._capture(site, notes)
                    capturing.append(site)
        except BaseException:
            for site in capturing:
                site.capture = None
            raise
        return banks

    def _seat(self, name: str, group: Sequence[Resolved], bank: Bank, number: int, step: int) -> Member:
        site, first = self.sites[name], group[0]
        chunks = np.concatenate([seed.chunks for seed in group])
        slots = self.table.germinate_many(
            np.full(len(chunks), self.index[name]),
            chunks,
            np.full(len(chunks), chunks.shape[1]),
            cohort=number,
            blueprint=BLUEPRINTS.code(first.blueprint),
            strategy=STRATEGIES.code(first.strategy),
            width=first.width,
            step=step,
        )
        site.banks[number] = bank
        keeps = [seed.keep for seed in group]
        keep = None if None in keeps else sum(k for k in keeps if k is not None)
        return Member(name, slots, first.start, keep=keep, scale=first.scale, design=first.design)

    def _capture(self, site: Site, notes: list[str]) -> Capture:
        """Room for a site's rows; where memory is short, fewer of them, and ``notes`` says so."""
        config, name = self.config.capture, site.info.name
        device = self.plans[name].weight.device
        held = sum(other.capture.num_bytes for other in self.sites.values() if other.capture is not None)
        budget, shortage = memory.capture_budget(config.max_bytes, device, held, memory.used_bytes(device))
        if shortage is not None:
            notes.append(shortage)
        capturing = 1 + sum(1 for other in self.sites.values() if other.capture is not None)
        per_batch = rows_per_batch(
            site.geometry,
            max(1, self.rows_per_batch[name]),
            max(1, self.samples_per_batch[name]),
            rows=config.rows,
            batches=config.batches,
            max_bytes=budget // max(capturing, len(self.sites)),
        )
        capture = Capture(
            site.geometry, num_batches=config.batches, rows_per_batch=per_batch, generator=self.generator,
            device=device,
        )  # fmt: skip
        if site.shapes is not None:
            capture.expect(site.shapes)
        return capture


def _check_scales(plan: SeedPlan, blueprint: str, start: str) -> None:
    """Refuse scales that are out of range or would change nothing."""
    for name, value in (("scale", plan.scale), ("lr_scale", plan.lr_scale)):
        if not (math.isfinite(value) and value > 0):
            raise EsperError(f"a plan's {name} must be positive and finite, got {value} on {plan.site!r}; use 1.0")
    if plan.scale == 1.0:
        return
    if not BLUEPRINTS[blueprint].input_names():
        raise EsperError(
            f"a plan's scale multiplies the weights that units read by, got {plan.scale} for {blueprint!r} on "
            f"{plan.site!r}, which has none; leave it 1.0"
        )
    if not STARTS[start].keeps_draw:
        raise EsperError(
            f"a plan's scale multiplies random first weights, got {plan.scale} for the start {start!r} on "
            f"{plan.site!r}, which makes its own; leave it 1.0, or use 'random_zero'"
        )


def offers(site: Site) -> tuple[tuple[str, str], ...]:
    """The ``(blueprint, start)`` pairs that a plan may name at a site, in the order of their names.

    A start that goes by several names is offered under its first.
    """
    starts: dict[type, str] = {}
    for name in STARTS.names:
        starts.setdefault(type(STARTS[name]), name)
    families = [
        name
        for name in BLUEPRINTS
        if site.info.kind in BLUEPRINTS[name].kinds and refusal_of(name, site.geometry) is None
    ]
    return tuple(
        (name, start)
        for name in families
        for start in sorted(starts.values())
        if _start_refusal(start, name, site) is None
    )


def _start_refusal(start: str, blueprint: str, site: Site) -> str | None:
    """Why a start cannot make first weights of a blueprint at a site, or ``None``."""
    if STARTS[start].needs_rows and not BLUEPRINTS[blueprint].fits_rows:
        return (
            f"start {start!r} fits branches to rows of a site's input, got blueprint {blueprint!r}, which reads "
            "more than those; use 'random_zero'"
        )
    return start_refusal(start, blueprint, site.geometry)
