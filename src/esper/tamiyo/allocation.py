"""How many units each site gets, and what that costs: arrays over sites, no loops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from esper.protocol import SITE_FEATURES, Observation

MIN_WIDTH = 4
"""Fewer units than this are not worth a cohort's captures, fit and judgement."""

_COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}
_RANK_SHARE = 1 / 8
"""First rank of a layer's low-rank branch, as a share of its smaller side."""
_KERNEL_AREA = 9.0
"""Kernel positions assumed for a convolution of unknown kernel size."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class UnitCosts(NamedTuple):
    """What one more unit of each site costs, ``(S,)`` float64; NaN is unknown."""

    params: Floats
    flops: Floats
    """Forward FLOPs a training step."""


class Room(NamedTuple):
    """What the ceilings leave; infinite without a ceiling, NaN where the present size is unknown."""

    params: float
    flops: float


def column(observation: Observation, name: str) -> Floats:
    """Return one column of the site features, ``(S,)``."""
    return observation.sites[:, _COLUMN[name]]


def unit_costs(observation: Observation) -> UnitCosts:
    """Return what the observation states, and an estimate where it states nothing.

    Estimates: a unit holds one weight for each input and output feature and a bias (3x3 kernels for convolutions; a
    rank of a low-rank branch reads through the kernel only once), and a parameter costs the FLOPs that the host's
    parameters cost on average. The budget gate, which knows the blueprints, has the last word.
    """
    inputs, outputs = np.exp(column(observation, "log_in")), np.exp(column(observation, "log_out"))
    is_span = column(observation, "is_span") == 1
    area = np.where(column(observation, "is_conv") == 1, _KERNEL_AREA, 1.0)
    guess = np.where(is_span, area * (inputs + outputs) + 1.0, area * inputs + outputs)
    params = _known_or(observation.unit_params, guess)
    flops_per_param = observation.host_flops_per_step / observation.host_params
    return UnitCosts(params=params, flops=_known_or(observation.unit_flops, params * flops_per_param))


def _known_or(known: Floats | None, guess: Floats) -> Floats:
    return guess if known is None else np.where(np.isnan(known), guess, known)


def room(observation: Observation) -> Room:
    """Return what the ceilings leave now (negative when over them)."""
    params = np.inf if observation.budget_params is None else float(observation.budget_params - observation.params)
    flops = np.inf if observation.budget_flops is None else observation.budget_flops - observation.flops_per_step
    return Room(params=params, flops=float(flops))


def growth_for(share: float, observation: Observation, *, compound: bool = False) -> float:
    """Return how many times their width all spans together have to grow to add ``share`` of the host's FLOPs.

    As in :func:`asked_widths` ``compound`` is of present widths, and then of the present model's FLOPs. NaN where there
    are no spans or no cost is known.
    """
    width = observation.hidden + (observation.grown if compound else 0)
    flops = observation.flops_per_step if compound else observation.host_flops_per_step
    total = float(np.nansum((width * unit_costs(observation).flops)[column(observation, "is_span") == 1]))
    return share * flops / total if total > 0 else np.nan


def asked_widths(
    observation: Observation, growth: float | Floats, *, compound: bool = False, lean: bool = False
) -> Ints:
    """Return the width each site would get without ceilings, ``(S,)`` int64; ``growth`` is for all or ``(S,)``.

    Spans: ``growth`` times the host's inner width, or with ``compound`` times the present one (host and grown). With
    ``lean`` no more of these than a span can use at once (its outputs, or its inputs and a bias), but at least half.
    Layers: a rank of ``growth`` times an eighth of the smaller side, at most that side. At least :data:`MIN_WIDTH`,
    except for layers smaller than that and lean spans.
    """
    side = np.exp(np.fmin(column(observation, "log_in"), column(observation, "log_out")))
    side = np.where(np.isnan(side), MIN_WIDTH, np.maximum(np.rint(side), 1.0))
    rank = np.clip(np.rint(growth * _RANK_SHARE * side), np.minimum(MIN_WIDTH, side), side)
    present = observation.hidden + observation.grown if compound else observation.hidden
    width = np.maximum(np.rint(growth * present), MIN_WIDTH)
    if lean:
        width = np.fmin(width, np.maximum(_useful(observation), np.ceil(width / 2)))  # NaN caps nothing
    return np.where(column(observation, "is_span") == 1, width, rank).astype(np.int64)


def _useful(observation: Observation) -> Floats:
    """Directions that a span's new units can read and write, ``(S,)``; NaN where neither is known."""
    reads, writes = (np.rint(np.exp(column(observation, name))) for name in ("log_in", "log_out"))
    area = np.where(column(observation, "is_conv") == 1, _KERNEL_AREA, 1.0)
    return np.fmin(writes, reads * area + 1.0)


def affordable_share(asked: Ints, costs: UnitCosts, left: Room) -> float:
    """Return the largest share (0 to 1) of the asked widths that both ceilings leave room for; 0 if unknown.

    Sites of unknown cost do not count: under a ceiling they get nothing.
    """
    share = 1.0
    for unit, ceiling in ((costs.params, left.params), (costs.flops, left.flops)):
        if ceiling == np.inf:
            continue
        total = float(np.nansum(asked * unit))
        # An unknown ceiling is no room: comparisons with NaN are false.
        share = min(share, ceiling / total) if total > 0 and ceiling > 0 else 0.0
    return share


def fit_widths(asked: Ints, costs: UnitCosts, left: Room) -> Ints:
    """Trim the asked widths evenly until they fit under both ceilings.

    Where an even trim leaves no site its minimum (:data:`MIN_WIDTH`, or what it asked if that is less), the cheapest
    sites get their minimum for as long as there is room. A site whose cost is unknown gets nothing under a ceiling.

    Parameters
    ----------
    asked:
        ``(K,)`` int64, positive.
    costs:
        Arrays of shape ``(K,)``.
    left:
        What the ceilings leave.

    Returns
    -------
    numpy.ndarray
        ``(K,)`` int64; 0 leaves a site out. Its total cost never exceeds what is left.
    """
    known = (np.isfinite(costs.params) | (left.params == np.inf)) & (np.isfinite(costs.flops) | (left.flops == np.inf))
    # Zero stands in for "unknown but without a ceiling": it is never compared.
    costs = UnitCosts(*(np.where(np.isfinite(unit), unit, 0.0) for unit in costs))
    asked = np.where(known, asked, 0)
    least = np.minimum(asked, MIN_WIDTH)
    share = affordable_share(asked, costs, left)
    if share >= 1.0:
        return asked
    # The small addend undoes rounding in the share (31.999... of 32); where it overdoes it, one unit goes.
    widths = np.floor(asked * share + 1e-9).astype(np.int64)
    widths = widths if _fits(widths, costs, left) else np.maximum(widths - 1, 0)
    widths = np.where(widths >= least, widths, 0)
    if widths.any():
        return widths
    return _cheapest(least, costs, left)


def _fits(widths: Ints, costs: UnitCosts, left: Room) -> bool:
    return bool((widths * costs.params).sum() <= left.params and (widths * costs.flops).sum() <= left.flops)


def _cheapest(least: Ints, costs: UnitCosts, left: Room) -> Ints:
    candidates = np.flatnonzero(least)
    params, flops = least[candidates] * costs.params[candidates], least[candidates] * costs.flops[candidates]
    order = np.lexsort((flops, params))
    affordable = (np.cumsum(params[order]) <= left.params) & (np.cumsum(flops[order]) <= left.flops)
    widths = np.zeros_like(least)
    taken = candidates[order[affordable]]
    widths[taken] = least[taken]
    return widths
