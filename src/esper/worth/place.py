"""Where a branch could grow and what it could be, in numbers that mean the same in every run."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from esper.protocol import SITE_FEATURES, Observation, SiteKind

SITE_KINDS = tuple(str(kind) for kind in SiteKind)
_COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}
_RANK_SHARE = 1 / 8
"""Width of reference on a layer, as a share of its smaller side."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """A site at one moment of a run. ``None`` and the empty text are *unknown*; logarithms are natural."""

    kind: str = ""
    """A :class:`~esper.protocol.SiteKind`."""
    family: str = ""
    """``mlp``, ``conv``, ``transformer`` or ``recurrent``."""
    optimizer: str = ""
    """``adaptive`` or ``sgd``."""
    log_in: float | None = None
    log_out: float | None = None
    log_hidden: float | None = None
    fill: float | None = None
    """Grown units over the host's own."""
    progress: float | None = None
    """Share of the planned steps that is over."""
    loss_level: float | None = None
    """Log of the held-out loss over the first one."""
    price: float | None = None
    """Log of the model's parameters over the host's own."""
    energy: float | None = None
    """Log of the gradient's energy at the site over the mean of the run's sites."""
    last_gain: float | None = None
    """Gain of the last cohort here, as a share of the held-out loss."""
    age: float | None = None
    """Share of the planned steps since something here became permanent."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What could grow at a place."""

    blueprint: str
    start: str
    growth: float
    """Units of all its seeds together, as a multiple of :func:`reference_width`."""
    seeds: int = 1
    """Seeds that the units and the site's chunks are shared out to."""
    scale: float = 1.0
    lr_scale: float = 1.0


def reference_width(inputs: int, outputs: int, hidden: int) -> float:
    """The width that growth is counted in: a span's own inner width, or an eighth of a layer's smaller side."""
    return float(hidden) if hidden > 0 else max(1.0, _RANK_SHARE * min(inputs, outputs))


def places(observation: Observation) -> tuple[Place, ...]:
    """Every site of an observation as a place."""
    over = progress(observation.step, observation.total_steps)
    level = log_ratio(observation.held_out, observation.held_out_initial)
    price = log_ratio(observation.params, observation.host_params)
    energies = relative_energies(observation.sites[:, _COLUMN["gradient_energy"]])
    kinds = observation.kinds or ("",) * len(observation.site_names)
    return tuple(
        Place(
            kind=kind, family=observation.family, optimizer=observation.optimizer, progress=over, loss_level=level,
            price=price, energy=energy, log_in=_known(row, "log_in"), log_out=_known(row, "log_out"),
            log_hidden=_known(row, "log_hidden"), fill=grown / hidden if hidden > 0 else None,
            last_gain=share(_known(row, "last_gain"), observation.held_out),
            age=share(_known(row, "steps_since_growth"), observation.total_steps),
        )
        for kind, row, energy, hidden, grown in zip(
            kinds, observation.sites, energies, observation.hidden.tolist(), observation.grown.tolist(), strict=True
        )
    )  # fmt: skip


def _known(row: np.ndarray[tuple[int], np.dtype[np.float64]], name: str) -> float | None:
    value = float(row[_COLUMN[name]])
    return value if math.isfinite(value) else None


def progress(step: int, total_steps: int | None) -> float | None:
    """Share of the planned steps that is over."""
    return None if not total_steps else step / total_steps


def share(value: float | None, whole: float | None) -> float | None:
    """``value`` over ``|whole|`` where both are known."""
    if value is None or whole is None or not (math.isfinite(value) and math.isfinite(whole)) or whole == 0:
        return None
    return value / abs(whole)


def log_ratio(value: float, base: float) -> float | None:
    """Log of ``value / base`` where both are known and positive."""
    if not (math.isfinite(value) and math.isfinite(base) and value > 0 and base > 0):
        return None
    return math.log(value / base)


def relative_energies(energies: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[float | None]:
    """Log of each site's gradient energy over the mean of the known ones."""
    known = energies[np.isfinite(energies)]
    mean = float(known.mean()) if known.size else math.nan
    return [log_ratio(float(energy), mean) for energy in energies]
