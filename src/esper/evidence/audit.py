"""Networks as they were when something was claimed of them, to be scored after the run on batches never read before."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.evidence.judge import Judge
from esper.evidence.paired import PairedResult, paired_difference
from esper.kasmina import memory
from esper.kasmina.hooks import armed
from esper.kasmina.site import Site


@dataclass
class Network:
    """A model with all that grows on it: the sites, by name, that its hooks refer to."""

    model: nn.Module
    sites: dict[str, Site]
    _homes: list[tuple[Tensor, torch.device]] = field(default_factory=list[tuple[Tensor, torch.device]], repr=False)
    """What is parked, and where it computes."""

    @classmethod
    def of(cls, model: nn.Module, sites: Mapping[str, Site]) -> Network:
        """A copy."""
        with armed(sites):
            return cls(*copy.deepcopy((model, dict(sites))))

    def park(self) -> Network:
        """Let it lie in the CPU's memory until :meth:`at_hand`; returns itself."""
        tensors = [tensor for tensor in self._tensors() if memory.is_scarce(tensor.device)]
        self._homes += [(tensor, tensor.device) for tensor in tensors]  # behind those that have stayed parked
        parked = memory.Parked(tensors)
        parked.wait()
        for tensor, copied in zip(tensors, parked.copies, strict=True):
            tensor.data = copied
        return self

    @contextmanager
    def at_hand(self) -> Generator[None, None, None]:
        """Where it computes, for as long as the context lasts; parked again on exit."""
        try:
            while self._homes:
                tensor, device = self._homes[-1]
                tensor.data = tensor.data.to(device)
                self._homes.pop()
            yield
        finally:
            self.park()

    def _tensors(self) -> list[Tensor]:
        """Everything of it that counts, each once: the host's parameters and buffers, and those of the branches."""
        found: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        for site in self.sites.values():
            for bank in [*site.banks.values(), *site.permanent]:
                found += [*bank.params.values(), *bank.buffers.values(), bank.alpha]
                found += [*bank.moments.first.values(), *bank.moments.second.values()]
        return list({id(tensor): tensor for tensor in found}.values())


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
        with self.network.at_hand():
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
            with network.at_hand():
                evaluator = judge.evaluator.over(network.model, batches)
                arms.append(evaluator.losses(evaluator.splits.gate))
        return paired_difference([off - on for on, off in zip(*arms, strict=True)]), float(np.mean(arms[0]))
