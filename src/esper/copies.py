"""Copies of the whole network that experiments need, as a part of a run's state: twins, and networks to be audited.

A network of a state is made anew in two steps: the host is copied as it is now, which brings structure, hooks and the
optimizers' references to what is theirs, and then every value in the copy is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from esper.errors import StateError
from esper.evidence.audit import HostAndTwin, Network, OnOff
from esper.evidence.twins import HostWatch, Twin
from esper.kasmina.cohort import Cohort
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.safety.training import check_module, module_state, plain, restore_module
from esper.safety.tree import Tree

_KINDS: dict[str, type[OnOff | HostAndTwin]] = {kind.source: kind for kind in (OnOff, HostAndTwin)}


@dataclass
class Kept:
    """Something to be audited: a cohort, what was claimed of it, and the networks."""

    cohort: Cohort
    networks: OnOff | HostAndTwin


@dataclass
class Copies:
    """Twins and networks kept for the audit, with what listens to the host for the twins.

    Parameters
    ----------
    kasmina:
        Tells the execution layer as it is now: absorbing growth makes a new one.
    """

    model: nn.Module
    clock: HostClock
    kasmina: Callable[[], Kasmina]
    twins: dict[int, Twin] = field(default_factory=dict[int, Twin])
    kept: list[Kept] = field(default_factory=list[Kept])
    """Only ever added to, until the run ends; none of them changes any more."""
    watch: HostWatch | None = None
    missing: dict[str, list[int]] = field(default_factory=lambda: {"twins": [], "kept": []})
    """Cohorts of which the restored run had copies that this one has not; until it was told."""
    _wanted: list[int] = field(default_factory=list[int])
    """Cohorts of which the restored run had kept networks."""

    # ---------------------------------------------------------------------------------------------- experiments

    def begin(self, cohort: Cohort, *, since: int, step_flops: float) -> None:
        """Give a cohort that is about to be grafted a twin."""
        self.twins[cohort.number] = self._twin(cohort, since, step_flops)
        self._listen()

    def drop(self, number: int) -> Twin:
        """Let a twin go; with the last one, what listens to the host."""
        twin = self.twins.pop(number)
        if not self.twins and self.watch is not None:
            self.watch.close()
            self.watch = None
        return twin

    def numbers(self) -> dict[str, list[int]]:
        """Cohorts with a twin, and those with a network kept for the audit; missing ones as well."""
        here = {"twins": list(self.twins), "kept": [entry.cohort.number for entry in self.kept]}
        return {kind: [*self.missing[kind], *here[kind]] for kind in here}

    def go_back(self, numbers: Mapping[str, list[int]]) -> None:
        """The run is one again that had only these: later networks were never kept, and twins of now are others."""
        for number in list(self.twins):
            self.drop(number)
        del self.kept[len(numbers["kept"]) :]
        for entry in self.kept:
            entry.cohort = self.kasmina().cohorts.get(entry.cohort.number, entry.cohort)
        self.missing = {kind: list(numbers[kind]) for kind in numbers}
        self._wanted = list(numbers["kept"])
        self._note_kept()

    def _note_kept(self) -> None:
        here = {entry.cohort.number for entry in self.kept}
        self.missing["kept"] = [number for number in self._wanted if number not in here]

    # ---------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tree]:
        """All of them as a state tree. Kept networks of another shape than the host's (it has absorbed growth since)
        could not be made again and are left out."""
        kept = [_kept_state(entry) for entry in self.kept if self._has_hosts_shape(entry)]
        return {**self.twins_state(), "kept": kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told; it takes over the tensors. Sites and cohorts must be restored."""
        self.restore_twins(state)
        self.kept[:] = [self._kept_of(entry) for entry in state["kept"]]
        self._note_kept()

    def twins_state(self) -> dict[str, Tree]:
        watch = self.watch
        return {
            "twins": [_twin_state(twin) for twin in self.twins.values()],
            "watch": None if watch is None else {"settings": plain(watch.settings), "random": watch.random},
        }

    def restore_twins(self, state: dict[str, Any]) -> None:
        for number in list(self.twins):
            self.drop(number)
        for kept in state["twins"]:
            cohort = self._cohort_of(kept["cohort"])
            twin = self._twin(cohort, kept["since"], kept["step_flops"])
            twin.steps = kept["steps"]
            self._overwrite(Network(twin.model, twin.sites), kept["network"], twin.optimizers, kept["optimizers"])
            self.twins[cohort.number] = twin
        self.missing["twins"] = [number for number in self.missing["twins"] if number not in self.twins]
        if self.twins:
            self._listen().go_on_from(state["watch"]["settings"], state["watch"]["random"])

    def _listen(self) -> HostWatch:
        if self.watch is not None:
            self.watch.close()
        self.watch = HostWatch(self.model, self.clock.optimizers)
        return self.watch

    def _twin(self, cohort: Cohort, since: int, step_flops: float) -> Twin:
        kasmina = self.kasmina()
        return Twin(
            cohort, self.model, self.clock.optimizers, kasmina.sites, kasmina.optimizer, since=since,
            step_flops=step_flops,
        )  # fmt: skip

    def _kept_of(self, state: dict[str, Any]) -> Kept:
        networks = [Network.of(self.model, self.kasmina().sites) for _ in state["networks"]]
        for network, kept in zip(networks, state["networks"], strict=True):
            self._overwrite(network, kept)
            network.park()
        return Kept(self._cohort_of(state["cohort"]), _KINDS[state["source"]](*networks))

    def _cohort_of(self, state: dict[str, Any]) -> Cohort:
        """The cohort itself while it lives, else what is remembered of it."""
        living = self.kasmina().cohorts.get(state["number"])
        return Cohort.of(state, self._devices()) if living is None else living

    def _overwrite(
        self, network: Network, state: dict[str, Any], optimizers: list[Optimizer] | None = None, kept: Any = ()
    ) -> None:
        restore_module(network.model, state["host"])
        for name, module in network.model.named_modules():
            module.training = state["training"][name]
        devices = self._devices()
        for name, site in network.sites.items():
            site.restore(state["sites"][name], devices[name])
        for site in network.sites.values():
            site.refresh()
        for optimizer, values in zip(optimizers or (), kept, strict=True):
            optimizer.load_state_dict(values)

    def _devices(self) -> dict[str, torch.device]:
        return {name: plan.weight.device for name, plan in self.kasmina().plans.items()}

    def _has_hosts_shape(self, entry: Kept) -> bool:
        try:
            for network in entry.networks.networks:
                check_module(self.model, module_state(network.model), "the model")
        except StateError:
            return False
        return True


@dataclass
class TwinsAlone:
    """The part of :class:`Copies` that goes on changing, for snapshots in memory: what is kept is at hand there."""

    copies: Copies

    def state(self) -> dict[str, Tree]:
        return self.copies.twins_state()

    def restore(self, state: dict[str, Any]) -> None:
        self.copies.restore_twins(state)


def _network_state(network: Network) -> dict[str, Tree]:
    return {
        "host": module_state(network.model),
        "training": {name: module.training for name, module in network.model.named_modules()},
        "sites": {name: site.state() for name, site in network.sites.items()},
    }


def _twin_state(twin: Twin) -> dict[str, Tree]:
    return {
        "cohort": twin.cohort.state_tree(),
        "since": twin.since,
        "steps": twin.steps,
        "step_flops": twin.step_flops,
        "network": _network_state(Network(twin.model, twin.sites)),
        "optimizers": [plain(optimizer.state_dict()) for optimizer in twin.optimizers],
    }


def _kept_state(entry: Kept) -> dict[str, Tree]:
    networks = entry.networks
    return {
        "cohort": entry.cohort.state_tree(),
        "source": networks.source,
        "networks": [_network_state(network) for network in networks.networks],
    }
