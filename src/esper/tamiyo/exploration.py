"""What the exploratory temper varies from cohort to cohort: all from a seeded generator of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper.protocol import Observation

_GROWTHS = (0.5, 1.0, 1.5)
_STARTS = (None, "random_zero", "negative_gradient")
_STRATEGIES = (None, "fixed_ramp", "performance_linked", "drift_controlled", "grad_norm_gated")
_SUBSET_RATE = 0.5
_PRESSING_RATE = 0.25
_PRESSING_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Variation:
    """One draw. ``None`` leaves the choice to the default of the site."""

    growth: float
    """Factor on the cohort's size."""
    start: str | None
    strategy: str | None
    keep: npt.NDArray[np.bool_]
    """``(K,)``: the candidate sites that take part; at least one."""
    pressing_only: bool
    """Hold only the pressing chunks of each site instead of all free ones."""


STEADY = Variation(growth=1.0, start=None, strategy=None, keep=np.ones(0, dtype=np.bool_), pressing_only=False)
"""No variation (``keep`` is unused)."""


def draw_variation(num_sites: int, seed: int, cohort: int) -> Variation:
    """Draw for the ``cohort``-th germination; the same arguments give the same draw, so there is no state to save.

    Each site takes part with probability 1/2 (one at random if none does); a quarter of the cohorts aim at pressing
    chunks only.
    """
    rng = np.random.default_rng([seed, cohort])
    keep = rng.random(num_sites) < _SUBSET_RATE
    if num_sites and not keep.any():
        keep[rng.integers(num_sites)] = True
    return Variation(
        growth=_GROWTHS[rng.integers(len(_GROWTHS))],
        start=_STARTS[rng.integers(len(_STARTS))],
        strategy=_STRATEGIES[rng.integers(len(_STRATEGIES))],
        keep=keep,
        pressing_only=bool(rng.random() < _PRESSING_RATE),
    )


def pressing_chunks(observation: Observation, rows: npt.NDArray[np.int64]) -> dict[int, tuple[int, ...]]:
    """Return, for those of the sites ``rows`` that have any, the chunks among the strongest quarter of all pressing
    ones (ascending). Chunks of unknown pressure do not press.
    """
    usable = np.isfinite(observation.chunk_pressure) & np.isin(observation.chunk_site, rows)
    picked = np.flatnonzero(usable)
    picked = picked[: int(np.ceil(_PRESSING_SHARE * picked.size))]
    sites, chunks = observation.chunk_site[picked], observation.chunk_index[picked]
    order = np.lexsort((chunks, sites))
    sites, chunks = sites[order], chunks[order]
    names, starts = np.unique(sites, return_index=True)
    groups = np.split(chunks, starts[1:])
    return {int(site): tuple(group.tolist()) for site, group in zip(names, groups, strict=False)}
