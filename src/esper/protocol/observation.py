"""What a controller sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from esper.protocol.lifecycle import Lifecycle


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
    gain_shrunken: float = float("nan")
    """``gain`` shrunk towards the run's other gains (the best of many looks is too good)."""


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

    While no cohort is alive, losses and sensors are those of the end of the step before: nobody waits for the device.

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
        Cohorts alive now, and how cohorts ended, oldest first: all that were kept, of the others the newest thousand.
    untold:
        How many more have ended, too long ago to be among ``verdicts``.
    stopped:
        Growth has been stopped; ``None`` while it goes on.
    kinds, offers:
        Per site, its :class:`~esper.protocol.SiteKind`, and the ``(blueprint, start)`` pairs that a plan may name
        there. Empty is unknown.
    family, optimizer:
        Of the host, as in :class:`~esper.protocol.Attached`. Empty is unknown.
    unit_params, unit_flops:
        What one more unit costs, ``(S,)`` float64 (a hidden unit of a span, a rank of a layer site): parameters, and
        forward FLOPs a training step. ``None`` or NaN is unknown: a controller then estimates from the site's sizes.
    train_loss, loss_noise:
        Mean of the latest training losses, and their standard deviation as a share of it; NaN where unknown.
    lr_share:
        Learning rate now as a share of the largest so far, mean over the sites; NaN where unknown.
    price:
        Smallest gain (share of the held-out loss) per share of FLOPs added that is worth having; NaN where unknown.
    fit_explained, fit_error:
        Of the isolated fit of the seeds alive on a site, ``(S,)`` float64: share of the target's energy explained on
        rows of other batches, and its standard error. ``None`` or NaN where nothing was fitted.
    alternatives, alternative_params, alternative_flops:
        Names of B blueprints, and what one more unit of each costs on each site, ``(S, B)`` float64, as for
        ``unit_params``; NaN where it cannot sit or is the default already. Empty and ``None`` where unknown.
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
    train_loss: float = math.nan
    loss_noise: float = math.nan
    lr_share: float = math.nan
    price: float = math.nan
    fit_explained: npt.NDArray[np.float64] | None = None
    fit_error: npt.NDArray[np.float64] | None = None
    alternatives: tuple[str, ...] = ()
    alternative_params: npt.NDArray[np.float64] | None = None
    alternative_flops: npt.NDArray[np.float64] | None = None
    kinds: tuple[str, ...] = ()
    offers: tuple[tuple[tuple[str, str], ...], ...] = ()
    family: str = ""
    optimizer: str = ""
    untold: int = 0

    @property
    def num_ended(self) -> int:
        """Cohorts that have ended since the beginning."""
        return self.untold + len(self.verdicts)
