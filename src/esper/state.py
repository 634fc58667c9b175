"""A whole run as one state tree, and back: every part tells and restores its own, nothing here knows how."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import msgspec
from torch import Tensor

from esper.config import Config
from esper.errors import EsperError, StateError
from esper.kasmina.host import as_tensors
from esper.protocol import SiteInfo
from esper.safety.training import KEYS, Training, plain
from esper.safety.tree import Tree, copy_of, digest
from esper.tamiyo import Controller

DESK = "desk"
"""The part that a run has only where orders come from outside."""
VERSION = 3
"""Raised when a part's state changes its meaning; older ones are migrated where they are read from a disk."""


class Part(Protocol):
    """Something with a state of its own."""

    def state(self) -> Tree: ...

    def restore(self, state: Any) -> None: ...


@dataclass
class Loop:
    """What the grower itself remembers from step to step."""

    losses: deque[Tensor | float]
    """Detached task losses of the last steps, oldest first."""
    last_step: int = 0
    calls_without_step: int = 0
    skipped: int = 0
    """Steps that a GradScaler has skipped in a row."""
    held_out_initial: float = math.nan
    stopped: str | None = None
    paused: str | None = None
    """Why growth as a whole waits."""

    def state(self) -> dict[str, Tree]:
        """All of it as a state tree."""
        return {**vars(self), "losses": as_tensors(self.losses)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told."""
        self.losses.clear()
        self.losses.extend(state["losses"])
        self.last_step, self.calls_without_step = state["last_step"], state["calls_without_step"]
        self.skipped = state["skipped"]
        self.held_out_initial, self.stopped = state["held_out_initial"], state["stopped"]
        self.paused = state.get("paused")  # older states know no pause


class Thoughts:
    """A controller's state, under the names that all parts have."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def state(self) -> dict[str, Tree]:
        return plain(self._controller.state())

    def restore(self, state: dict[str, Any]) -> None:
        self._controller.load(state)


class Setup:
    """What a run was built with: a state belongs to this and to nothing else.

    Parameters
    ----------
    sites:
        Tells the sites as they are now.
    batches:
        The held-out batches; their hash is taken once, when first asked for.
    """

    def __init__(self, config: Config, sites: Callable[[], Sequence[SiteInfo]], batches: Sequence[Any]) -> None:
        self.config, self._sites = config, sites
        self._batches = batches
        self._digest: str | None = None

    def state(self) -> dict[str, Tree]:
        """Settings, sites and held-out batches, as a state tree."""
        if self._digest is None:
            self._digest = _digest_of(self._batches)
        return {
            "config": asdict(self.config),
            "sites": [msgspec.to_builtins(info) for info in self._sites()],
            "held_out": {"batches": len(self._batches), "sha256": self._digest},
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse what was saved with another set-up.

        Raises
        ------
        StateError
            Settings, sites or held-out batches differ; the differences are named.
        """
        here = self.state()
        for key, what in (("config", "settings"), ("sites", "sites"), ("held_out", "held-out batches")):
            found = list(_differences(here[key], state[key], key))
            if found:
                raise StateError(
                    f"the {what} must be those of the saved run, got {len(found)} differences: "
                    f"{'; '.join(found[:5])}; build the Grower as the saved one was"
                )


class Whole:
    """The state of a run.

    Parameters
    ----------
    parts:
        Everything of Esper by name, in the order in which it is restored.
    """

    def __init__(self, setup: Setup, training: Training, parts: Mapping[str, Part]) -> None:
        self.setup, self.training, self.parts = setup, training, parts

    def state(self) -> dict[str, Tree]:
        """Everything a run is made of; the tensors are its own, not copies."""
        esper = {name: part.state() for name, part in self.parts.items()}
        return {"version": VERSION, **self.training.state(), "esper": esper}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Go on from a state of this very run. It takes over the tensors."""
        for name, part in self.parts.items():
            part.restore(tree["esper"].get(name))  # only a desk may find nothing
        self.training.restore(tree)

    def saved(self) -> dict[str, Tree]:
        """A copy on the CPU that can be kept, written and loaded into another process."""
        return copy_of({**self.state(), "setup": self.setup.state()}, to_cpu)

    def load(self, tree: Tree) -> None:
        """Go on from what :meth:`saved` has returned: all or nothing.

        Raises
        ------
        StateError
            It belongs to another run or is damaged; nothing was changed.
        """
        try:
            self.check(tree)
        except _DAMAGE as error:
            raise _unreadable(error) from error
        before = copy_of(self.state(), to_cpu)
        try:
            self.restore(copy_of(tree))
        except BaseException as error:
            self.restore(before)
            if isinstance(error, _DAMAGE):
                raise _unreadable(error) from error
            raise

    def check(self, tree: Tree) -> None:
        """Refuse what cannot be a state of this run.

        Raises
        ------
        StateError
            Another version, other keys, another training or set-up.
        """
        if not isinstance(tree, dict):
            raise StateError(f"a state is what state_dict() returned, got {type(tree).__name__}; pass that")
        saved = cast("dict[str, Any]", tree)
        if saved.get("version") != VERSION:
            raise StateError(
                f"a state must have version {VERSION}, got {saved.get('version')!r}; use Esper of its time"
            )
        parts = set(saved.get("esper", ()))
        if DESK in parts and DESK not in self.parts:
            raise StateError(
                "a run that took orders from outside goes on with their log, got none; call serve() with a desk first"
            )
        for what, here, there in (
            ("state", {"version", "setup", "esper", *KEYS}, set(saved)),
            ("state of Esper", set(self.parts) - {DESK}, parts - {DESK}),
        ):
            if here != there:
                raise StateError(
                    f"a {what} must have the keys {sorted(here)}, got {sorted(here ^ there)} missing or extra; "
                    "pass what state_dict() returned"
                )
        self.training.check(saved)
        self.setup.check(saved["setup"])


_DAMAGE = (EsperError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _unreadable(error: BaseException) -> StateError:
    if isinstance(error, StateError):
        return error
    return StateError(f"the state cannot be read ({type(error).__name__}: {error}); it is damaged or another run's")


def to_cpu(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory."""
    return tensor.to("cpu", copy=True)


def _digest_of(batches: Sequence[Any]) -> str | None:
    """Hash of the batches, or ``None`` where they are not made of plain values, tensors and arrays."""
    try:
        return digest(list(batches))
    except StateError:
        return None


def _differences(here: Tree, there: Tree, path: str) -> list[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        one, two = cast("dict[str, Any]", here), cast("dict[str, Any]", there)
        found: list[str] = []
        for key in dict.fromkeys([*two, *one]):
            found += _differences(one.get(key), two.get(key), f"{path}.{key}")
        return found
    if isinstance(here, list) and isinstance(there, list):
        pairs = list(zip(cast("list[Any]", here), cast("list[Any]", there), strict=False))
        found = [text for number, (a, b) in enumerate(pairs) for text in _differences(a, b, f"{path}[{number}]")]
        return found if len(here) == len(there) else [*found, f"{path}: {len(there)} saved, {len(here)} here"]
    return [] if here == there else [f"{path}: {there!r} saved, {here!r} here"]
