"""The same host twice: as one of a stack, and under a real grower whose first units are handed to the stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import esper
from esper.greenhouse.family import HostSpec
from esper.greenhouse.isolated import Units
from esper.greenhouse.real import RealHost
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
