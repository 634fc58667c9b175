"""Forward hooks as importable objects: a hooked model can be copied and saved, and carries its branches along."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.kasmina.discovery import SitePlan
from esper.kasmina.isolation import RandomState, random_state
from esper.kasmina.layer_kinds import PACKED, first_input, first_output, with_first_output
from esper.kasmina.site import Site


class ParentEnter:
    """Opens the spans inside a module at each of its calls."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites

    def __call__(self, module: nn.Module, args: Any) -> None:
        for site in self.sites:
            if site.engaged:
                site.open()


class HeadEnter:
    """Notes what a span's first layer reads."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.site.engaged:
            self.site.enter(first_input(args, kwargs))


class TailLeave:
    """Adds the branches to the site's (first) output; returns nothing while there is nothing to do."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, y: Any) -> Any:
        if not self.site.engaged:
            return None
        first = first_output(y)
        if not isinstance(first, Tensor):
            self.site.refuse(PACKED)
            return None
        new = self.site.leave(module, first_input(args, kwargs), first, writable=first is y and _is_ours_alone(module))
        return None if new is None else with_first_output(y, new)


class RandomNote:
    """Notes torch's random state at the first training forward after :meth:`arm`; a copied host's notes nothing."""

    def __init__(self) -> None:
        self.state: RandomState | None = None
        self.armed = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.armed and module.training and not torch.compiler.is_compiling():
            self.state, self.armed = random_state(), False

    def arm(self) -> None:
        """Take the state as it is now, until a forward pass tells better."""
        self.state, self.armed = random_state(), True

    def __getstate__(self) -> dict[str, Any]:
        return {"state": None, "armed": False}


def attach(plans: list[SitePlan], sites: dict[str, Site]) -> list[RemovableHandle]:
    """Register the hooks of all sites. A chain's upstream leaves before its downstream reads."""
    _stay_compiled()
    handles: list[RemovableHandle] = []
    parents: dict[int, tuple[nn.Module, list[Site]]] = {}
    for plan in plans:
        site = sites[plan.info.name]
        if plan.info.kind.is_span:
            parents.setdefault(id(plan.parent), (plan.parent, []))[1].append(site)
            handles.append(plan.head.register_forward_pre_hook(HeadEnter(site), with_kwargs=True))
        handles.append(plan.tail.register_forward_hook(TailLeave(site), with_kwargs=True))
    for parent, inside in parents.values():
        handles.append(parent.register_forward_pre_hook(ParentEnter(inside)))
    return handles


def _stay_compiled() -> None:
    """Let a compiler accept what the hooks note inside activation checkpointing: once, in the forward pass.

    Without this setting it gives such a host up and runs all of it uncompiled, without a word, from then on. The
    module is there as soon as an optimizer is.
    """
    settings = sys.modules.get("torch._dynamo.config")
    if hasattr(settings, _NOTED_ONCE):
        setattr(settings, _NOTED_ONCE, True)


_NOTED_ONCE = "skip_fwd_side_effects_in_bwd_under_checkpoint"


def is_attached(model: nn.Module) -> bool:
    """Whether any module already carries Esper's hooks."""
    stores = (store for module in model.modules() for store in _stores(module))
    return any(isinstance(hook, _OURS) for store in stores for hook in store.values())


def strip(model: nn.Module) -> None:
    """Remove Esper's hooks from a model (a deep copy carries them along)."""
    for module in model.modules():
        for store, flags in zip(_stores(module), _keyword_flags(module), strict=True):
            for key in [key for key, hook in store.items() if isinstance(hook, _OURS)]:
                del store[key]
                flags.pop(key, None)


_OURS = (ParentEnter, HeadEnter, TailLeave, RandomNote)


def _is_ours_alone(module: nn.Module) -> bool:
    """Whether no other hook may have kept the output; a compiler keeps track of memory by itself."""
    return not torch.compiler.is_compiling() and all(isinstance(hook, _OURS) for hook in _stores(module)[0].values())


def _stores(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Forward hooks and forward pre-hooks by id: torch has no public access to them."""
    return module._forward_hooks, module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]  # see above


def _keyword_flags(module: nn.Module) -> tuple[dict[int, bool], dict[int, bool]]:
    """Which hooks of :func:`_stores` are called with keyword arguments, by the same ids."""
    return module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs  # pyright: ignore[reportPrivateUsage]
