"""An observation as bytes and back, exactly: arrays as they are, the rest as JSON beside them."""

from __future__ import annotations

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


_PER_SITE: dict[str, type[np.generic]] = {"hidden": np.int64, "grown": np.int64, "eligible": np.bool_}
_PER_CHUNK: dict[str, type[np.generic]] = {
    "chunk_site": np.int64, "chunk_index": np.int64, "chunk_pressure": np.float64,
}  # fmt: skip
_COSTS = ("unit_params", "unit_flops")


def encode(observation: Observation) -> bytes:
    """Safetensors bytes. About a hundred a site."""
    head = _Head(**{name: getattr(observation, name) for name in _Head.__struct_fields__})
    arrays = {name: getattr(observation, name) for name in ("sites", *_PER_SITE, *_PER_CHUNK)}
    costs = {name: getattr(observation, name) for name in _COSTS if getattr(observation, name) is not None}
    return packed.pack(head, {**arrays, **costs})


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
    fields |= {name: packed.take(arrays, name, np.float64, (num_sites,)) for name in _COSTS if name in arrays}
    return Observation(**fields)
