"""The user's side of a run's state: host, optimizers, what ``track=`` names, and the global random streams.

Everything is read without copying and written in place: parameters stay the objects they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import StateError
from esper.safety.tree import Tree

KEYS = ("host", "training", "optimizers", "tracked", "random")


class Training:
    """What belongs to the user's training.

    Parameters
    ----------
    tracked:
        Schedulers, a GradScaler, averaged models, data sources: whatever has ``state_dict`` and ``load_state_dict``.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], tracked: Iterable[Any]) -> None:
        self.model, self.optimizers, self.tracked = model, optimizers, list(tracked)

    @property
    def omissions(self) -> list[str]:
        """What to tell the user of tracked things that no state can hold."""
        kinds = [type(thing).__name__ for thing in self.tracked if not _has_state(thing)]
        return [f"a tracked {kind} has no state_dict and load_state_dict, so no state holds it" for kind in kinds]

    @property
    def rewinds(self) -> bool:
        """Whether a data source is tracked that goes back with its state."""
        return any(
            getattr(thing, "rewinds", hasattr(thing, "__next__")) and _has_state(thing) for thing in self.tracked
        )

    def state(self) -> dict[str, Tree]:
        """Everything as a state tree; the tensors are the training's own, not copies."""
        return {
            "host": module_state(self.model),
            "training": {name: module.training for name, module in self.model.named_modules()},
            "optimizers": [{"kind": type(o).__name__, "state": plain(o.state_dict())} for o in self.optimizers],
            "tracked": [{"kind": type(thing).__name__, "state": _state_of(thing)} for thing in self.tracked],
            "random": random_streams(),
        }

    def check(self, state: Mapping[str, Tree]) -> None:
        """Refuse a state that is not this training's; nothing is changed.

        Raises
        ------
        StateError
            Another host, other optimizers or other tracked things; the difference is named.
        """
        check_module(self.model, state["host"], "the model")
        _check_names("the model's modules", dict(self.model.named_modules()), state["training"])
        _check_kinds("optimizers", self.optimizers, state["optimizers"])
        for number, (optimizer, saved) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            here = [len(group["params"]) for group in optimizer.param_groups]
            there = [len(group["params"]) for group in saved["state"]["param_groups"]]
            if here != there:
                raise StateError(
                    f"optimizer {number} must have the parameter groups it was saved with, sizes {there}, got {here}; "
                    "build it in the same way"
                )
        _check_kinds("tracked", self.tracked, state["tracked"])
        for thing, saved in zip(self.tracked, state["tracked"], strict=True):
            if _has_state(thing) != (saved["state"] is not None):
                raise StateError(
                    f"a tracked {type(thing).__name__} must have a state in both runs or in neither; track the same"
                )
            if isinstance(thing, nn.Module):
                check_module(thing, saved["state"], f"the tracked {type(thing).__name__}")
        cuda = state["random"]["cuda"]
        if cuda and len(cuda) != torch.cuda.device_count():
            raise StateError(
                f"the saved run drew on {len(cuda)} CUDA devices, got {torch.cuda.device_count()}; make as many "
                "visible (CUDA_VISIBLE_DEVICES)"
            )

    def restore(self, state: Mapping[str, Tree]) -> None:
        """Go on from what :meth:`state` has told; tensors may be taken over. Random streams last: loading may draw."""
        restore_module(self.model, state["host"])
        for name, module in self.model.named_modules():
            module.training = state["training"][name]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.state.clear()  # not beside what takes its place
            optimizer.load_state_dict(saved["state"])
        for thing, saved in zip(self.tracked, state["tracked"], strict=True):
            if isinstance(thing, nn.Module):
                restore_module(thing, saved["state"])
            elif saved["state"] is not None:
                thing.load_state_dict(_shaped_like(thing.state_dict(), saved["state"]))
        set_random_streams(state["random"])


# ----------------------------------------------------------------------------------------------------------------------
# Modules


def module_state(module: nn.Module) -> dict[str, Tree]:
    """Its ``state_dict``, and the buffers that are not in it."""
    saved = plain(module.state_dict())
    return {"state": saved, "buffers": dict(_transient(module))}


def check_module(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    """Refuse another module's state: names, shapes and dtypes must agree.

    Raises
    ------
    StateError
        They differ; the first difference is named.
    """
    here, there = plain(module.state_dict()), state["state"]
    _check_names(f"the tensors of {what}", here, there)
    for name, value in here.items():
        if isinstance(value, Tensor):
            saved = there[name]
            if not isinstance(saved, Tensor) or saved.shape != value.shape or saved.dtype != value.dtype:
                raise StateError(
                    f"{name} of {what} must be as it was saved, {_describe(saved)}, got {_describe(value)}; build the "
                    "layers with the saved sizes (absorb() widens them: make the fresh model as wide, then load)"
                )
    _check_names(f"the buffers of {what}", dict(_transient(module)), state["buffers"])


@torch.no_grad()
def restore_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a state into a module, in place; a buffer that has another size now is replaced."""
    module.load_state_dict(state["state"], strict=True)
    for name, value in _transient(module):
        saved = state["buffers"][name]
        if value.shape == saved.shape and value.dtype == saved.dtype:
            value.copy_(saved)
        else:
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner)._buffers[last] = saved.to(value.device)  # pyright: ignore[reportPrivateUsage]


def _transient(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that ``state_dict`` leaves out, by their full names."""
    found: list[tuple[str, Tensor]] = []
    for prefix, part in module.named_modules():
        left_out = part._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]  # torch tells nowhere else
        for name, value in part.named_buffers(recurse=False):
            if name in left_out:
                found.append((f"{prefix}.{name}" if prefix else name, value))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Random streams


def random_streams() -> dict[str, Tree]:
    """Python's, NumPy's and torch's global streams; CUDA's if CUDA runs."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": cast("tuple[Any, ...]", np.random.get_state()),
        "torch": torch.get_rng_state(),
        "cuda": list(cuda),
    }


def set_random_streams(state: Mapping[str, Any]) -> None:
    """Let the global streams go on from what :func:`random_streams` has told."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])


# ----------------------------------------------------------------------------------------------------------------------
# Plain values


def plain(value: Any) -> Tree:
    """The value with NumPy's scalars as Python's, which a state tree can hold (a schedule computed with NumPy)."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in cast("list[Any] | tuple[Any, ...]", value)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _shaped_like(present: Any, saved: Tree) -> Any:
    """``saved`` with the dictionaries' own classes (a counter, an ordered one) where ``present`` has them."""
    if not isinstance(present, dict) or not isinstance(saved, dict):
        return saved
    here, there = cast("dict[Any, Any]", present), cast("dict[Any, Any]", saved)
    parts = {key: _shaped_like(here.get(key), value) for key, value in there.items()}
    if type(here) is dict:
        return parts
    own = here.copy()
    own.clear()
    own.update(parts)
    return own


def _has_state(thing: Any) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


def _state_of(thing: Any) -> Tree:
    if isinstance(thing, nn.Module):
        return module_state(thing)
    return plain(thing.state_dict()) if _has_state(thing) else None


def _check_names(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    missing, extra = sorted(set(here) - set(there)), sorted(set(there) - set(here))
    if missing or extra:
        parts = [f"{len(n)} {word} ({', '.join(n[:3])})" for n, word in ((missing, "missing"), (extra, "extra")) if n]
        raise StateError(f"{what} must be those of the saved run, got {' and '.join(parts)}; build the same model")


def _check_kinds(what: str, here: Sequence[Any], there: Sequence[Mapping[str, Any]]) -> None:
    now, saved = [type(thing).__name__ for thing in here], [entry["kind"] for entry in there]
    if now != saved:
        raise StateError(f"{what} must be those of the saved run, {saved}, got {now}; pass the same, in order")


def _describe(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
