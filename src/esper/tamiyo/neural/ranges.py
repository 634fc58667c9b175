"""What a policy has seen in training: outside of it nobody knows what it would do."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from esper.tamiyo.features import GLOBAL_COLUMNS, GLOBAL_FEATURES, SITE_COLUMNS, SITE_FEATURES, Features

_MARGIN = 0.1
"""Values may lie outside by this share of the range ..."""
_LEAST_MARGIN = 0.05
"""... and by this much at any rate; a flag that was never raised (or never down) must stay so."""

Range = tuple[float, float]


class Ranges(msgspec.Struct, frozen=True, kw_only=True):
    """Least and largest value of every column, and of the number of sites."""

    world: tuple[Range, ...]
    sites: tuple[Range, ...]
    num_sites: tuple[int, int]

    @classmethod
    def of(cls, seen: Iterable[Features]) -> Ranges:
        """Of some looks; values behind a raised flag do not count."""
        looks = list(seen)
        worlds = np.stack([look.world for look in looks])
        sites = np.concatenate([look.sites for look in looks])
        counts = [len(look.sites) for look in looks]
        return cls(
            world=_ranges(worlds, len(GLOBAL_FEATURES)),
            sites=_ranges(sites, len(SITE_FEATURES)),
            num_sites=(min(counts), max(counts)),
        )

    def joined(self, other: Ranges) -> Ranges:
        """Both together."""
        return Ranges(
            world=_joined(self.world, other.world),
            sites=_joined(self.sites, other.sites),
            num_sites=(
                min(self.num_sites[0], other.num_sites[0]),
                max(self.num_sites[1], other.num_sites[1]),
            ),
        )

    def stranger(self, features: Features) -> str | None:
        """A column that lies outside (or ``num_sites``), or ``None``; the first one where there are several."""
        if not self.num_sites[0] <= len(features.sites) <= self.num_sites[1]:
            return "num_sites"
        for values, ranges, names, num in (
            (features.world[None], self.world, GLOBAL_COLUMNS, len(GLOBAL_FEATURES)),
            (features.sites, self.sites, SITE_COLUMNS, len(SITE_FEATURES)),
        ):
            low, high = np.array(ranges).T
            margin = np.maximum(_MARGIN * (high - low), _LEAST_MARGIN)
            outside = (values < low - margin) | (values > high + margin)
            outside[:, :num] &= values[:, num:] == 0
            if outside.any():
                return names[int(np.flatnonzero(outside.any(axis=0))[0])]
        return None


def _ranges(values: npt.NDArray[np.float32], num: int) -> tuple[Range, ...]:
    """One a column; a column that was never known has an empty range (and its flag says why)."""
    known = np.ones(values.shape, dtype=np.bool_)
    known[:, :num] = values[:, num:] == 0
    low = np.where(known, values, np.inf).min(axis=0)
    high = np.where(known, values, -np.inf).max(axis=0)
    never = low > high
    low, high = np.where(never, 0.0, low), np.where(never, 0.0, high)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def _joined(one: tuple[Range, ...], other: tuple[Range, ...]) -> tuple[Range, ...]:
    return tuple((min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(one, other, strict=True))
