"""The same host twice: as one of a stack, and under a real grower whose first units are handed to the stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import esper
from esper.greenhouse.family import HostSpec
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.isolated import Units
from esper.greenhouse.observing import observe
from esper.greenhouse.real import RealHost
from esper.greenhouse.stages import finish
from esper.protocol import Command, Observation

Script = Callable[[Observation], Sequence[Command]]


@dataclass
class Scripted:
    """A controller that plays a script, and keeps what it saw."""

    script: Script
    seen: list[Observation] = field(default_factory=list[Observation])

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        self.seen.append(observation)
        return tuple(self.script(observation))

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


class Twin(RealHost):
    """A real host that notes every seed's first weights before they learn."""

    def __init__(self, spec: HostSpec, config: esper.Config, script: Script, dtype: torch.dtype) -> None:
        self.script, self.player, self.config = script, Scripted(script), config
        self.planted: dict[tuple[int, int, int], Units] = {}
        super().__init__(spec, self.player, config, dtype=dtype)

    def step(self) -> None:
        super().step()
        names = list(self.grower.kasmina.sites)
        for cohort in self.grower.kasmina.cohorts.values():
            for name in cohort.sites:
                key = (0, cohort.number, names.index(name))
                if key not in self.planted:
                    bank = self.grower.kasmina.sites[name].banks[cohort.number]
                    parts = (bank.params[part].detach()[0].clone() for part in ("w1", "b1", "w2"))
                    self.planted[key] = Units(*(part.flatten(2) if part.dim() == 4 else part for part in parts))


def without_snapshots(config: esper.Config) -> esper.Config:
    """Settings without what stacks leave out: copies of the training for a rollback."""
    return replace(config, safety=esper.SafetyConfig(snapshots=False))


def play(real: Twin, dtype: torch.dtype) -> tuple[Hosts, list[float], list[Observation]]:
    """A stack of one with the real host's first units and script: the host, its losses, what was seen of it."""
    hosts = Hosts([real.spec], real.config, dtype=dtype)
    hosts.given_units = real.planted
    losses: list[float] = []
    seen: list[Observation] = []
    while not hosts.done:
        hosts.advance(1)
        losses.append(hosts.lives[0].losses[-1])
        if hosts.step_count % hosts.config.interval == 0:
            seen.append(observe(hosts, 0))
            for command in real.script(seen[-1]):
                apply(hosts, 0, command)
    finish(hosts)
    return hosts, losses, seen


def assert_same_sight(stacked: list[Observation], real: list[Observation]) -> None:
    """Two lists of observations tell the same."""
    assert len(stacked) == len(real)
    for mine, theirs in zip(stacked, real, strict=True):
        np.testing.assert_allclose(mine.sites, theirs.sites, rtol=1e-2, err_msg=f"at step {mine.step}")
        for name in ("step", "params", "host_params", "site_names", "stopped", "alive"):
            assert getattr(mine, name) == getattr(theirs, name), (name, mine.step)
        for name in (
            "held_out", "held_out_initial", "flops_per_step", "host_flops_per_step", "hidden", "grown", "eligible",
            "unit_params", "unit_flops", "train_loss", "loss_noise", "lr_share", "price",
        ):  # fmt: skip
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=1e-2, err_msg=name)
