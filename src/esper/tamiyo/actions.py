"""What a learned controller may do at a decision point, one factor after the other: an invalid action has no number.

::

    operation   wait | germinate | cull | stop
    site        0: all sites that may grow together; 1 to S: one of them        (germinate; cull: where the cohort sits)
    size        growth as a multiple of the host's inner width                  (germinate)
    blueprint   the site kind's default, or another that can sit there          (germinate)
    strategy    how alpha rises                                                 (germinate)

A factor that an operation does not ask for holds :data:`UNUSED`. Masks depend on the factors before: whatever is drawn
within them is allowed by ceilings, embargoes and the cohorts that are alive.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError
from esper.protocol import Cancel, CohortView, Command, Cull, Germinate, Lifecycle, Observation, SeedPlan, Stop
from esper.tamiyo.allocation import asked_widths, column, room, unit_costs

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Operation(enum.IntEnum):
    """The first factor."""

    WAIT = 0
    GERMINATE = 1
    CULL = 2
    STOP = 3


FACTORS = ("operation", "site", "size", "blueprint", "strategy")
SIZES = (0.25, 0.5, 1.0, 2.0)
BLUEPRINTS = (
    "default", "affine", "attention", "bottleneck", "bottleneck_conv", "chunk_mlp", "depthwise_conv", "gated",
    "low_rank",
)  # fmt: skip
STRATEGIES = ("default", "fixed_ramp", "performance_linked", "drift_controlled", "grad_norm_gated")
UNUSED = -1
ALL = 0
"""The site factor's value for all sites that may grow: all eligible spans, or all eligible layers if no span is."""
DEFAULT = 0
"""The blueprint's and the strategy's value that leaves the choice to Esper."""
VERSION = 1
"""Raised when a number changes its meaning."""

_ON_TRIAL = range(Lifecycle.GERMINATED, Lifecycle.FINE_TUNING)
_CULLABLE = range(Lifecycle.GERMINATED, Lifecycle.FOSSILIZED)


class Action(NamedTuple):
    """One choice, as numbers: positions in :class:`Operation`, (all, sites), SIZES, BLUEPRINTS and STRATEGIES."""

    operation: int
    site: int = UNUSED
    size: int = UNUSED
    blueprint: int = UNUSED
    strategy: int = UNUSED


WAIT = Action(Operation.WAIT)


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What of all this a controller may use: a policy keeps to the scope that it was trained in."""

    operations: tuple[str, ...] = tuple(operation.name.lower() for operation in Operation)
    sizes: tuple[float, ...] = SIZES
    blueprints: tuple[str, ...] = BLUEPRINTS
    strategies: tuple[str, ...] = STRATEGIES
    together: bool = True
    """Whether all sites may grow as one cohort."""
    most_on_trial: int | None = 1
    """Cohorts between GERMINATED and EVALUATING beyond which nothing germinates; ``None``: any number."""

    def __post_init__(self) -> None:
        names = tuple(operation.name.lower() for operation in Operation)
        for field, chosen, known in (
            ("operations", self.operations, names),
            ("sizes", self.sizes, SIZES),
            ("blueprints", self.blueprints, BLUEPRINTS),
            ("strategies", self.strategies, STRATEGIES),
        ):
            if not chosen or not set(chosen) <= set(known):
                raise ConfigError(f"scope.{field} must be some of {known}, got {chosen!r}; leave others out")
        if "wait" not in self.operations:
            raise ConfigError(f"scope.operations must hold 'wait', got {self.operations!r}; add it")


EVERYTHING = Scope()


@dataclass(frozen=True)
class Masks:
    """What is valid now. S sites, Z sizes, B blueprints, K strategies.

    Attributes
    ----------
    operation:
        ``(4,)``; waiting always is.
    fits:
        ``(S + 1, Z, B)``: a germination that ceilings, embargoes and live seeds allow.
    cullable:
        ``(S + 1,)``: sites with a cohort that can be taken out.
    strategy:
        ``(K,)``.
    """

    operation: Bools
    fits: Bools
    cullable: Bools
    strategy: Bools

    @property
    def num_sites(self) -> int:
        return len(self.cullable) - 1

    @property
    def forced(self) -> bool:
        """Whether there is nothing to choose."""
        return int(self.operation.sum()) == 1

    def valid(self, chosen: Sequence[int]) -> Bools:
        """What the next factor may be after the first ones were ``chosen``; empty where no further one is asked for."""
        if not chosen:
            return self.operation
        operation = chosen[0]
        if operation == Operation.CULL and len(chosen) == 1:
            return self.cullable
        if operation != Operation.GERMINATE or len(chosen) == len(FACTORS):
            return np.zeros(0, dtype=np.bool_)
        if len(chosen) == 1:
            return cast("Bools", self.fits.any(axis=(1, 2)))
        if len(chosen) == 4:
            return self.strategy
        here = cast("Bools", self.fits[chosen[1]])
        return cast("Bools", here.any(axis=1) if len(chosen) == 2 else here[chosen[2]])

    def allow(self, action: Action) -> bool:
        """Whether ``action`` is one of the valid ones."""
        chosen: list[int] = []
        while (mask := self.valid(chosen)).size:
            choice = action[len(chosen)]
            if not 0 <= choice < mask.size or not mask[choice]:
                return False
            chosen.append(choice)
        return all(value == UNUSED for value in action[len(chosen) :])


def masks(observation: Observation, scope: Scope = EVERYTHING) -> Masks:
    """What a controller with this ``scope`` may do now."""
    fits = _fits(observation, scope)
    cullable = np.zeros(len(observation.site_names) + 1, dtype=np.bool_)
    held = {name for view in observation.alive if view.state in _CULLABLE for name in view.sites}
    cullable[1:] = [name in held for name in observation.site_names]
    going = observation.stopped is None
    possible = {
        "wait": True,
        "germinate": going and bool(fits.any()),
        "cull": going and bool(cullable.any()),
        "stop": going,
    }
    operation = np.array([name in scope.operations and is_possible for name, is_possible in possible.items()])
    return Masks(operation, fits, cullable, np.array([name in scope.strategies for name in STRATEGIES]))


def _fits(observation: Observation, scope: Scope) -> Bools:
    """``(S + 1, Z, B)``: germinations that fit under the ceilings whole (a controller never asks for part of a size).

    A blueprint's cost is taken as its width times the cost of one unit, which is never less than it costs.
    """
    num = len(observation.site_names)
    found = np.zeros((num + 1, len(SIZES), len(BLUEPRINTS)), dtype=np.bool_)
    on_trial = sum(view.state in _ON_TRIAL for view in observation.alive)
    left = room(observation)
    if observation.stopped is not None or np.isnan(left.params) or np.isnan(left.flops):
        return found
    if scope.most_on_trial is not None and on_trial >= scope.most_on_trial:
        return found
    group = together(observation)
    params, flops = _costs(observation)
    if left.params == left.flops == np.inf:  # nothing depends on the size
        found[1:] = (np.isfinite(params) | np.isnan(params))[:, None] & observation.eligible[:, None, None]
        found[ALL, :, DEFAULT] = scope.together and len(group) > 1
        found &= np.array([growth in scope.sizes for growth in SIZES])[:, None]
        return found & np.array([name in scope.blueprints for name in BLUEPRINTS])
    for size, growth in enumerate(SIZES):
        if growth not in scope.sizes:
            continue
        width = asked_widths(observation, growth)
        wanted = np.array([params * width[:, None], flops * width[:, None]])
        found[1:, size] = _within(wanted, left) & observation.eligible[:, None]
        if scope.together and len(group) > 1:
            found[ALL, size, DEFAULT] = _within(wanted[:, group, DEFAULT].sum(axis=1), left)
    found &= np.array([name in scope.blueprints for name in BLUEPRINTS])
    return found


def _within(wanted: Floats, left: tuple[float, float]) -> Bools:
    """``(2, ...)`` costs against what is left; an unknown cost fits only where there is no ceiling.

    A blueprint that cannot sit on a site costs infinitely much.
    """
    params, flops = (
        np.isfinite(cost) | np.isnan(cost) if ceiling == np.inf else cost <= ceiling
        for cost, ceiling in zip(wanted, left, strict=True)
    )
    return params & flops


def _costs(observation: Observation) -> tuple[Floats, Floats]:
    """``(S, B)`` parameters and FLOPs of one more unit; infinite where a blueprint cannot sit."""
    unit = unit_costs(observation)
    found: list[Floats] = []
    for default, table in ((unit.params, observation.alternative_params), (unit.flops, observation.alternative_flops)):
        costs = np.full((len(observation.site_names), len(BLUEPRINTS)), np.inf)
        costs[:, DEFAULT] = default
        for index, name in enumerate(observation.alternatives):
            if name in BLUEPRINTS and table is not None:
                costs[:, BLUEPRINTS.index(name)] = np.where(np.isnan(table[:, index]), np.inf, table[:, index])
        found.append(costs)
    return found[0], found[1]


def together(observation: Observation) -> Ints:
    """Rows of the sites that :data:`ALL` stands for."""
    is_span = column(observation, "is_span") == 1
    spans = np.flatnonzero(observation.eligible & is_span)
    return spans if spans.size else np.flatnonzero(observation.eligible & ~is_span)


def commands(action: Action, observation: Observation, *, reason: str = "learned") -> tuple[Command, ...]:
    """What a valid action asks for.

    Raises
    ------
    ConfigError
        The action's numbers name nothing in this observation.
    """
    if action.operation == Operation.WAIT:
        return ()
    if action.operation == Operation.STOP:
        return (Stop(reason=f"{reason}: stop"),)
    if not 0 <= action.site <= len(observation.site_names):
        raise ConfigError(
            f"an action's site must lie between 0 (all) and {len(observation.site_names)}, got {action.site}; draw it "
            "within the masks of this observation"
        )
    if action.operation == Operation.CULL:
        view = _cohort_at(action.site, observation)
        ending = Cancel if view.state == Lifecycle.GERMINATED else Cull  # what still captures can only be withdrawn
        return (ending(cohort=view.cohort, reason=f"{reason}: cull"),)
    rows = together(observation) if action.site == ALL else np.array([action.site - 1])
    width = asked_widths(observation, SIZES[action.size])
    plans = tuple(
        SeedPlan(
            site=observation.site_names[row],
            width=int(width[row]),
            blueprint=None if action.blueprint == DEFAULT else BLUEPRINTS[action.blueprint],
            strategy=None if action.strategy == DEFAULT else STRATEGIES[action.strategy],
        )
        for row in rows.tolist()
    )
    return (Germinate(seeds=plans, reason=f"{reason}: {describe(action, observation)}"),)


def describe(action: Action, observation: Observation) -> str:
    """An action in words."""
    if action.operation in (Operation.WAIT, Operation.STOP):
        return Operation(action.operation).name.lower()
    site = "all sites" if action.site == ALL else observation.site_names[action.site - 1]
    if action.operation == Operation.CULL:
        return f"cull at {site}"
    return f"grow {site} by {SIZES[action.size]:g} of its width"


def _cohort_at(site: int, observation: Observation) -> CohortView:
    name = observation.site_names[site - 1] if site != ALL else None
    for view in observation.alive:
        if view.state in _CULLABLE and name in view.sites:
            return view
    raise ConfigError(f"an action culls where a cohort is alive, got site {site} without one; draw it within the masks")


def nearest(wanted: Sequence[Command], observation: Observation, valid: Masks) -> Action:
    """The valid action that comes closest to another controller's commands: what cloning learns from.

    The first command counts. Several sites become all sites; the size is the largest that fits and does not exceed the
    one asked for (else the smallest); what nothing comes close to becomes a wait.
    """
    command = wanted[0] if wanted else None
    if isinstance(command, Stop) and valid.operation[Operation.STOP]:
        return Action(Operation.STOP)
    rows = {name: row for row, name in enumerate(observation.site_names)}
    if isinstance(command, Cull | Cancel) and valid.operation[Operation.CULL]:
        held = [view.sites for view in observation.alive if view.cohort == command.cohort]
        sites = [rows[name] + 1 for group in held for name in group if name in rows]
        return next((Action(Operation.CULL, site) for site in sites if valid.cullable[site]), WAIT)
    if isinstance(command, Germinate) and valid.operation[Operation.GERMINATE]:
        return _nearest_germination(command.seeds, observation, valid, rows)
    return WAIT


def _nearest_germination(
    plans: Sequence[SeedPlan], observation: Observation, valid: Masks, rows: dict[str, int]
) -> Action:
    sites = dict.fromkeys(rows[plan.site] for plan in plans if plan.site in rows)
    if not sites:
        return WAIT
    first = next(iter(sites))
    site = first + 1 if len(sites) == 1 else ALL
    fitting = np.flatnonzero(valid.fits[site].any(axis=1))
    if not fitting.size:
        return WAIT
    asked = sum((plan.width or 0) * plan.seeds for plan in plans if rows.get(plan.site) == first)
    offered = np.array([asked_widths(observation, growth)[first] for growth in SIZES])[fitting]
    below = np.flatnonzero(offered <= asked)
    size = int(fitting[below[-1] if below.size else 0])
    names = {plan.blueprint for plan in plans}, {plan.strategy for plan in plans}
    blueprint, strategy = (
        known.index(name) if len(group) == 1 and (name := next(iter(group))) in known else DEFAULT
        for group, known in zip(names, (BLUEPRINTS, STRATEGIES), strict=True)
    )
    blueprint = blueprint if valid.fits[site, size, blueprint] else int(np.flatnonzero(valid.fits[site, size])[0])
    strategy = strategy if valid.strategy[strategy] else int(np.flatnonzero(valid.strategy)[0])
    return Action(Operation.GERMINATE, site, size, blueprint, strategy)


def every_action(valid: Masks) -> Iterator[Action]:
    """All valid actions, in order."""

    def extend(chosen: tuple[int, ...]) -> Iterator[Action]:
        mask = valid.valid(chosen)
        if not mask.size:
            yield Action(*chosen)
            return
        for choice in np.flatnonzero(mask).tolist():
            yield from extend((*chosen, choice))

    return extend(())


def draw(valid: Masks, rng: np.random.Generator) -> Action:
    """Each factor uniformly among its valid values."""
    chosen: list[int] = []
    while (mask := valid.valid(chosen)).size:
        chosen.append(int(rng.choice(np.flatnonzero(mask))))
    return Action(*chosen)
