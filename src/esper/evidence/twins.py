"""Twins: the network a cohort is grafted on, trained on alone, to see what would have become of it.

A twin is a copy of the model, its optimizers and its annexes (moments included), taken just before the graft. In every
real step of the host it takes the same batch with the same random numbers and hyperparameters. It shares no tensor
with the host, so the host cannot notice it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.kasmina.cohort import Cohort
from esper.kasmina.hooks import RandomNote, armed
from esper.kasmina.isolation import RandomState, replayed_rng
from esper.kasmina.optim import Hyperparameters, SlotAdamW
from esper.kasmina.site import Site

Settings = list[list[dict[str, Any]]]
"""Hyperparameters by optimizer and parameter group."""
TrainStep = Callable[[nn.Module, list[Optimizer], Any], object]

MAX_DEPARTURE = 0.02
"""Largest difference from the host after the first step, as a share of that step, that still counts as the same
training: exact on the CPU, rounding on an accelerator."""


class HostWatch:
    """Listens to the host's steps: hyperparameters as they are used, random state as the forward pass begins.

    Its hooks are there only while a twin needs them.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self.settings: Settings = [_settings(optimizer) for optimizer in optimizers]
        self._note = RandomNote()
        self._handles = [model.register_forward_pre_hook(self._note)]
        for number, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._reader(number)))
        self._note.arm()

    def _reader(self, number: int) -> Callable[..., None]:
        def read(optimizer: Optimizer, *_: Any) -> None:
            self.settings[number] = _settings(optimizer)

        return read

    @property
    def random(self) -> RandomState:
        assert self._note.state is not None  # armed from the beginning
        return self._note.state

    def rearm(self) -> None:
        """Begin listening to the next step."""
        self._note.arm()

    def go_on_from(self, settings: Settings, random: RandomState) -> None:
        """Take what an earlier one has heard, until the next step tells better."""
        self.settings, self._note.state = settings, random

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


class Twin:
    """One twin.

    Parameters
    ----------
    model, optimizers, sites:
        The host's, copied here; ``sites`` by name, without the cohort's branch in the forward pass.
    learner:
        The update rule of grown units.
    step_flops:
        What one of its training steps costs.
    """

    def __init__(
        self,
        cohort: Cohort,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        sites: Mapping[str, Site],
        learner: SlotAdamW,
        *,
        since: int,
        step_flops: float,
    ) -> None:
        self.cohort, self.since = cohort, since
        self.step_flops = step_flops
        self.steps = 0
        self.learner = learner
        # one copy of all: optimizers and hooks keep referring to what is theirs
        with armed(sites):
            self.model, self.optimizers, self.sites = copy.deepcopy((model, list(optimizers), dict(sites)))
        for name, site in sites.items():
            twin = self.sites[name]
            twin.annex = None if site.annex is None else site.annex.learning_copy()
            twin.generator = None if site.generator is None else torch.Generator(site.generator.device)
            twin.refresh()

    def step(
        self,
        train_step: TrainStep,
        batch: Any,
        watch: HostWatch,
        hosts: Mapping[str, Hyperparameters],
    ) -> None:
        """Repeat the step that the host has just taken, without the cohort."""
        for optimizer, groups in zip(self.optimizers, watch.settings, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        with torch.enable_grad(), replayed_rng(watch.random):
            train_step(self.model, self.optimizers, batch)
        for name, site in self.sites.items():
            if site.annex is not None and site.annex.learning:
                self.learner.step(site.annex, hosts[name])
        self.steps += 1

    def departure(self, host: nn.Module, before: Sequence[Tensor]) -> float:
        """Distance from the host as a share of the distance from ``before``; 0 if neither has moved.

        After the first step the host's branch is still without effect, so both must have done the same.
        """
        pairs = zip(self.model.parameters(), host.parameters(), before, strict=True)
        apart = moved = 0.0
        for mine, theirs, start in pairs:
            apart += float((mine.detach().double() - theirs.detach().double()).square().sum())
            moved += float((mine.detach().double() - start.double()).square().sum())
        return (apart / moved) ** 0.5 if moved else float(apart > 0)


def plain_step(loss: Callable[[nn.Module, Any], Tensor]) -> TrainStep:
    """Forward, backward and a step of every optimizer, as in the documented loop."""

    def step(model: nn.Module, optimizers: list[Optimizer], batch: Any) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

    return step


def as_given(train_step: Callable[[nn.Module, Any, Any], object], *, single: bool) -> TrainStep:
    """The user's training step, called with one optimizer if the user has one, otherwise with the list."""
    return lambda model, optimizers, batch: train_step(model, optimizers[0] if single else optimizers, batch)
