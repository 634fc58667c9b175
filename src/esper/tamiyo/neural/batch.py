"""Decision points side by side: any number of sites each, padded to the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.tamiyo.actions import BLUEPRINTS, SIZES
from esper.tamiyo.features import SITE_COLUMNS
from esper.tamiyo.sight import Sight


@dataclass(frozen=True)
class Batch:
    """N decision points with at most S sites; token 0 is the run as a whole, site s is token s + 1.

    Attributes
    ----------
    world, sites:
        ``(N, G)`` and ``(N, S, F)`` float32; rows beyond a decision point's own sites are zero.
    absent:
        ``(N, S + 1)`` bool: tokens that are padding.
    operation, fits, cullable, strategy:
        The masks of :class:`~esper.tamiyo.actions.Masks`, padded with False.
    """

    world: Tensor
    sites: Tensor
    absent: Tensor
    operation: Tensor
    fits: Tensor
    cullable: Tensor
    strategy: Tensor

    @classmethod
    def of(cls, sights: Sequence[Sight]) -> Batch:
        """Put decision points side by side, in their order."""
        num = len(sights)
        most = max(sight.masks.num_sites for sight in sights)
        sites = np.zeros((num, most, len(SITE_COLUMNS)), dtype=np.float32)
        absent = np.ones((num, most + 1), dtype=np.bool_)
        fits = np.zeros((num, most + 1, len(SIZES), len(BLUEPRINTS)), dtype=np.bool_)
        cullable = np.zeros((num, most + 1), dtype=np.bool_)
        for row, sight in enumerate(sights):
            own = sight.masks.num_sites
            sites[row, :own] = sight.features.sites
            absent[row, : own + 1] = False
            fits[row, : own + 1] = sight.masks.fits
            cullable[row, : own + 1] = sight.masks.cullable
        return cls(
            world=torch.from_numpy(np.stack([sight.features.world for sight in sights])),
            sites=torch.from_numpy(sites),
            absent=torch.from_numpy(absent),
            operation=torch.from_numpy(np.stack([sight.masks.operation for sight in sights])),
            fits=torch.from_numpy(fits),
            cullable=torch.from_numpy(cullable),
            strategy=torch.from_numpy(np.stack([sight.masks.strategy for sight in sights])),
        )
