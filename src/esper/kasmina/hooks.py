"""Forward hooks as importable objects: a hooked model can be copied and saved, and carries its branches along."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.kasmina.discovery import SitePlan
from esper.kasmina.isolation import RandomState, random_state
from esper.kasmina.layer_kinds import PACKED, first_input, first_output, with_first_input, with_first_output
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

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.site.engaged:
            return None
        x = first_input(args, kwargs)
        read = self.site.enter(x)
        return None if read is x else with_first_input(args, kwargs, read)


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


def attach(plans: list[SitePlan], sites: dict[str, Site]) -> Switch:
    """Register the hooks of all sites. A chain's upstream leaves before its downstream reads."""
    _stay_compiled()
    switch = Switch()
    parents: dict[int, tuple[nn.Module, list[Site]]] = {}
    for plan in plans:
        site = sites[plan.info.name]
        if plan.info.kind.is_span:
            parents.setdefault(id(plan.parent), (plan.parent, []))[1].append(site)
            switch.add(plan.head, HeadEnter(site), [site])
        switch.add(plan.tail, TailLeave(site), [site])
    for parent, inside in parents.values():
        switch.add(parent, ParentEnter(inside), inside)
    for site in sites.values():
        site.switch = switch
    return switch


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
    """Whether a grower watches any module, or one carries Esper's hooks (a copy does)."""
    if any(module in _carriers for module in model.modules()):
        return True
    stores = (store for module in model.modules() for store in _stores(module))
    return any(isinstance(hook, _OURS) for store in stores for hook in store.values())


def strip(model: nn.Module) -> None:
    """Remove Esper's hooks from a model (a deep copy carries them along)."""
    for module in model.modules():
        for store, flags in zip(_stores(module), _keyword_flags(module), strict=True):
            for key in [key for key, hook in store.items() if isinstance(hook, _OURS)]:
                del store[key]
                flags.pop(key, None)


@dataclass
class _Store:
    """Hooks of ours in one dictionary of a module, by number, and the sites that they are for."""

    hooks: dict[int, Any]
    flags: dict[int, bool]
    sites: list[Site]
    ours: dict[int, Any] = field(default_factory=dict[int, Any])
    our_flags: dict[int, bool] = field(default_factory=dict[int, bool])

    def fill(self) -> None:
        """What came while ours were off goes behind them, as if they had hung there."""
        if not self.hooks and not self.flags:
            self.hooks.update(self.ours)
            self.flags.update(self.our_flags)
            return
        others, flags = dict(self.hooks), dict(self.flags)
        for store, first, then in ((self.hooks, self.ours, others), (self.flags, self.our_flags, flags)):
            store.clear()
            store.update(first)
            store.update(then)

    def empty(self) -> bool:
        """Take ours off, if they hang alone and Python has been seen to call them; whether it was done."""
        if len(self.hooks) != len(self.ours) or not all(site.ran_eagerly for site in self.sites):
            return False
        self.hooks.clear()
        if self.flags:
            self.flags.clear()
        return True


class Switch:
    """Takes hooks that have nothing to do off their modules, and puts them back in the order in which they hung.

    PyTorch calls a module with a hook on it the long way, microseconds more even for one that returns at once. A
    compiled graph keeps the hooks that it was traced with and need not look at a module again: what has not been seen
    to be called by Python stays where it is, and all are back before a compiler starts.
    """

    def __init__(self) -> None:
        self.armed = True
        self._stores: dict[int, _Store] = {}
        self._handles: list[RemovableHandle] = []
        self._off: list[_Store] = []
        self._modules: list[nn.Module] = []
        self._num_compilations = 0
        _switches.add(self)

    def add(self, module: nn.Module, hook: Any, sites: list[Site]) -> None:
        """Hang ``hook`` on ``module``, behind what hangs there."""
        before, keywords = not isinstance(hook, TailLeave), not isinstance(hook, ParentEnter)
        register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
        handle = register(hook, with_kwargs=keywords)
        hooks = _stores(module)[before]
        store = self._stores.setdefault(id(hooks), _Store(hooks, _keyword_flags(module)[before], []))
        store.ours[handle.id] = hook
        if keywords:
            store.our_flags[handle.id] = True
        store.sites.extend(sites)
        self._handles.append(handle)
        self._modules.append(module)
        _carriers.add(module)

    def arm(self) -> None:
        """Every hook is called again from now on."""
        if self._off and not self.armed and _was_forgotten():
            warnings.warn(
                "the compiler was reset (torch._dynamo.reset()) while Esper's hooks were off: a graph that was "
                "compiled since may lack them, so all graphs are traced anew",
                RuntimeWarning,
                stacklevel=2,
            )
            sys.modules["torch._dynamo"].reset()
        self.armed = True
        for store in self._off:
            store.fill()
        self._off = []

    def disarm(self) -> None:
        """No hook is called from now on, as far as that is safe; those beside somebody else's stay."""
        self.armed = False
        if self._num_compilations <= _MOST_COMPILATIONS and _hears_compilers():
            self._off = [store for store in self._stores.values() if store.empty()]

    def expect_compiler(self) -> None:
        """A compiler is about to trace: what it sees is what its graph will do."""
        self._num_compilations += 1
        self.arm()
        for store in self._stores.values():
            for site in store.sites:
                site.ran_eagerly = False

    def detach(self) -> None:
        """Remove every hook for good."""
        for handle in self._handles:
            handle.remove()
        self._off, self._handles, self._stores = [], [], {}
        for module in self._modules:
            _carriers.discard(module)
        self._modules = []


_switches: weakref.WeakSet[Switch] = weakref.WeakSet()
_carriers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that a grower watches, its hooks on them or off for the moment."""
_MOST_COMPILATIONS = 8
"""Of a process that goes on compiling the hooks stay where they are: a graph may look for them at each call."""


def _before_compiling(*_: Any) -> None:
    for switch in list(_switches):
        switch.expect_compiler()


def _was_forgotten() -> bool:
    """Whether the compiler has dropped who listens, as a reset of it does, and has compiled something since."""
    handler: Any = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
    if _before_compiling in getattr(handler, "start_callbacks", [_before_compiling]):
        return False
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", 1) > 0


def _hears_compilers() -> bool:
    """Whether a compiler that starts now will tell; one that was never imported cannot be asked yet."""
    handler: Any = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
    callbacks = getattr(handler, "start_callbacks", None)
    if callbacks is None:
        return False
    if _before_compiling not in callbacks:  # a reset of the compiler forgets who listens
        handler.register_start_callback(_before_compiling)
    return True


@contextmanager
def armed(sites: Mapping[str, Site]) -> Generator[None]:
    """All hooks of these sites hang on their modules inside, for a copy of them to have them."""
    switches = {id(site.switch): site.switch for site in sites.values() if site.switch is not None}
    before = [switch for switch in switches.values() if not switch.armed]
    for switch in before:
        switch.arm()
    try:
        yield
    finally:
        for switch in before:
            switch.disarm()


_OURS = (ParentEnter, HeadEnter, TailLeave, RandomNote)


def _is_ours_alone(module: nn.Module) -> bool:
    """Whether no other hook may have kept the output; a compiler keeps track of memory by itself."""
    hooks = module._forward_hooks  # pyright: ignore[reportPrivateUsage]  # as in `_stores`
    return not torch.compiler.is_compiling() and (len(hooks) == 1 or all(isinstance(h, _OURS) for h in hooks.values()))


def _stores(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """Forward hooks and forward pre-hooks by id: torch has no public access to them."""
    return module._forward_hooks, module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]  # see above


def _keyword_flags(module: nn.Module) -> tuple[dict[int, bool], dict[int, bool]]:
    """Which hooks of :func:`_stores` are called with keyword arguments, by the same ids."""
    return module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs  # pyright: ignore[reportPrivateUsage]
