"""Networks as they were when something was claimed of them, to be scored after the run on batches never read before."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from esper.evidence.judge import Judge
from esper.evidence.paired import PairedResult, paired_difference
from esper.kasmina.hooks import armed
from esper.kasmina.site import Site


@dataclass
class Network:
    """A model with all that grows on it: the sites, by name, that its hooks refer to."""

    model: nn.Module
    sites: dict[str, Site]

    @classmethod
    def of(cls, model: nn.Module, sites: Mapping[str, Site]) -> Network:
        """A copy."""
        with armed(sites):
            return cls(*copy.deepcopy((model, dict(sites))))


@dataclass
class OnOff:
    """A network at the moment a cohort became permanent, the cohort's branches still apart."""

    network: Network

    source = "on_off"

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.network,)

    def score(
        self, judge: Judge, cohort: int, members: Sequence[str], batches: Sequence[Any]
    ) -> tuple[PairedResult, float]:
        """Paired gain against the run's own kind of control (fitted on the run's calibration batches), and the loss."""
        evaluator = judge.evaluator.over(self.network.model, batches)
        auditor = Judge(evaluator, self.network.sites, judge.config, seed=cohort)
        return auditor.measure(cohort, members, evaluator.splits.gate)


@dataclass
class HostAndTwin:
    """A host and its twin after the same steps."""

    host: Network
    twin: Network

    source = "twin"

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.host, self.twin)

    def score(
        self, judge: Judge, cohort: int, members: Sequence[str], batches: Sequence[Any]
    ) -> tuple[PairedResult, float]:
        """Paired difference of the losses, and the host's mean loss."""
        arms: list[list[float]] = []
        for network in self.networks:
            evaluator = judge.evaluator.over(network.model, batches)
            arms.append(evaluator.losses(evaluator.splits.gate))
        return paired_difference([off - on for on, off in zip(*arms, strict=True)]), float(np.mean(arms[0]))
