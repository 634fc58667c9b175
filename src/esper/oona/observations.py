"""An observation as bytes and back, exactly: arrays as they are, the rest as JSON beside them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np

from esper.errors import EnvelopeError
from esper.oona import arrays as packed
from esper.protocol import SITE_FEATURES, CohortView, Observation, Verdict


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """What of an observation is no array."""

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
    alive: tuple[CohortView, ...]
    verdicts: tuple[Verdict, ...]
    stopped: str | None
    # A sender of an earlier version does not have these.
    train_loss: float = math.nan
    loss_noise: float = math.nan
    lr_share: float = math.nan
    price: float = math.nan
    alternatives: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    offers: tuple[tuple[tuple[str, str], ...], ...] = ()
    family: str = ""
    optimizer: str = ""
    untold: int = 0


_PER_SITE: dict[str, type[np.generic]] = {"hidden": np.int64, "grown": np.int64, "eligible": np.bool_}
_PER_CHUNK: dict[str, type[np.generic]] = {
    "chunk_site": np.int64, "chunk_index": np.int64, "chunk_pressure": np.float64,
}  # fmt: skip
_MAYBE = ("unit_params", "unit_flops", "fit_explained", "fit_error")
"""float64, a value a site, or nothing."""
_MAYBE_PER_ALTERNATIVE = ("alternative_params", "alternative_flops")


def encode(observation: Observation) -> bytes:
    """Safetensors bytes. About a hundred a site."""
    head = _Head(**{name: getattr(observation, name) for name in _Head.__struct_fields__})
    arrays = {name: getattr(observation, name) for name in ("sites", *_PER_SITE, *_PER_CHUNK)}
    maybe = {name: getattr(observation, name) for name in (*_MAYBE, *_MAYBE_PER_ALTERNATIVE)}
    return packed.pack(head, {**arrays, **{name: array for name, array in maybe.items() if array is not None}})


def decode(data: bytes) -> Observation:
    """The observation that :func:`encode` has written.

    Raises
    ------
    EnvelopeError
        The data are something else, or what does not go together.
    """
    head, arrays = packed.unpack(data, _Head)
    num_sites = len(head.site_names)
    site = packed.take(arrays, "chunk_site", np.int64, (None,))
    if site.size and not 0 <= site.min() <= site.max() < num_sites:
        raise EnvelopeError(f"chunk_site must name one of {num_sites} sites, got {site.min()} to {site.max()}")
    fields: dict[str, Any] = {name: getattr(head, name) for name in _Head.__struct_fields__}
    fields["sites"] = packed.take(arrays, "sites", np.float64, (num_sites, len(SITE_FEATURES)))
    fields |= {name: packed.take(arrays, name, kind, (num_sites,)) for name, kind in _PER_SITE.items()}
    fields |= {name: packed.take(arrays, name, kind, (site.size,)) for name, kind in _PER_CHUNK.items()}
    fields |= {name: packed.take(arrays, name, np.float64, (num_sites,)) for name in _MAYBE if name in arrays}
    shape = (num_sites, len(head.alternatives))
    fields |= {n: packed.take(arrays, n, np.float64, shape) for n in _MAYBE_PER_ALTERNATIVE if n in arrays}
    for name in ("kinds", "offers"):
        if len(fields[name]) not in (0, num_sites):
            raise EnvelopeError(f"{name} must be told of all {num_sites} sites or of none, got {len(fields[name])}")
    return Observation(**fields)
