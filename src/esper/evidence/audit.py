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
from esper.kasmina.site import Site


@dataclass
class OnOff:
    """A network at the moment a cohort became permanent, the cohort's branches still apart."""

    model: nn.Module
    sites: dict[str, Site]

    source = "on_off"

    @classmethod
    def of(cls, model: nn.Module, sites: Mapping[str, Site]) -> OnOff:
        return cls(*copy.deepcopy((model, dict(sites))))

    def score(
        self, judge: Judge, cohort: int, members: Sequence[str], batches: Sequence[Any]
    ) -> tuple[PairedResult, float]:
        """Paired gain against the run's own kind of control (fitted on the run's calibration batches), and the loss."""
        evaluator = judge.evaluator.over(self.model, batches)
        auditor = Judge(evaluator, self.sites, judge.config, seed=cohort)
        return auditor.measure(cohort, members, evaluator.splits.gate)


@dataclass
class HostAndTwin:
    """A host and its twin after the same steps."""

    host: nn.Module
    twin: nn.Module

    source = "twin"

    @classmethod
    def of(cls, host: nn.Module, twin: nn.Module) -> HostAndTwin:
        return cls(copy.deepcopy(host), twin)

    def score(
        self, judge: Judge, cohort: int, members: Sequence[str], batches: Sequence[Any]
    ) -> tuple[PairedResult, float]:
        """Paired difference of the losses, and the host's mean loss."""
        arms: list[list[float]] = []
        for model in (self.host, self.twin):
            evaluator = judge.evaluator.over(model, batches)
            arms.append(evaluator.losses(evaluator.splits.gate))
        return paired_difference([off - on for on, off in zip(*arms, strict=True)]), float(np.mean(arms[0]))
