"""The sites of a host as they are at first: equipped, and linked where one reads what another has grown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from esper.config import Config
from esper.kasmina.discovery import SitePlan
from esper.kasmina.site import Site
from esper.kasmina.telemetry import TelemetryBuffer


def laid_out(plans: Mapping[str, SitePlan], bounds: Sequence[npt.NDArray[np.int64]], config: Config) -> dict[str, Site]:
    """One dormant site a plan, by name; ``bounds``: where each site's chunks begin and end, in the plans' order."""
    sites = {name: Site(plan.info, plan.geometry, None) for name, plan in plans.items()}
    for number, (name, plan) in enumerate(plans.items()):
        if plan.upstream is not None and plan.upstream in sites:
            sites[name].upstream = sites[plan.upstream]
            sites[plan.upstream].downstream_reads = True
        _equip(sites[name], plan.weight.device, bounds[number], config, config.seed + number)
    return sites


def _equip(site: Site, device: torch.device, bounds: npt.NDArray[np.int64], config: Config, mask_seed: int) -> None:
    """Give a site its telemetry, and a random stream where it needs one."""
    site.telemetry = TelemetryBuffer(bounds, config.telemetry.rows, device)
    recompute = config.graft.recompute
    site.thrifty = device.type == "cuda" if recompute is None else recompute
    # only a dropout span draws on the device; its own stream leaves the host's alone
    if site.geometry.dropout > 0:
        site.generator = torch.Generator(device)
        site.mask_seed = mask_seed
