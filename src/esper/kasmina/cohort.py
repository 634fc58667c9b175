"""A cohort: seeds that are fitted, grafted and judged together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.kasmina.starts import StartReport
from esper.protocol import Lifecycle


@dataclass
class Member:
    """A cohort's seeds on one site: one bank, whose slot ``i`` is the table's slot ``slots[i]``."""

    site: str
    slots: npt.NDArray[np.int64]
    start: str
    report: StartReport = field(default_factory=StartReport)
    flops_share: float = 0.0
    """Its part of the cohort's ``added_flops_share``."""
    keep: int | None = None
    """How many of its seeds go on after the isolated training; ``None``: all."""
    scale: float = 1.0
    """Factor on the random weights that its seeds were given."""
    design: str = ""
    """Name of the design that they follow, if any."""
    preserves_function: bool = False
    """Whether the branches' output is exactly zero when they are grafted."""

    def state(self) -> dict[str, Any]:
        """All of it as a state tree."""
        return {**vars(self), "report": asdict(self.report)}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Member:
        """The member that :meth:`state` has told of."""
        values: dict[str, Any] = {**state, "report": StartReport(**state["report"])}
        return cls(**values)


@dataclass
class Cohort:
    """What the execution layer remembers of a cohort besides the seed table.

    ``ramped`` counts the steps in which alpha moved; ``memory`` belongs to the strategy; ``fading`` counts the steps
    since a cull. ``gain_history`` holds (stage, gain, low, high).
    """

    number: int
    members: dict[str, Member]
    strategy: str
    born: int
    seed_ids: tuple[int, ...]
    added_params: int
    added_flops_share: float
    notes: tuple[str, ...] = ()
    """What was done otherwise than asked, and why."""
    state: Lifecycle = Lifecycle.GERMINATED
    entered: int = 0
    alpha: float = 0.0
    ramped: int = 0
    fading: int = 0
    fading_from: float = 0.0
    paused: bool = False
    memory: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    losses: list[float] = field(default_factory=list[float])
    gain: tuple[float, float, float] = (float("nan"), float("nan"), float("nan"))
    gain_error: float = float("nan")
    """Standard error of the last measured gain."""
    gain_shrunken: float = float("nan")
    withheld_since: int | None = None
    """Step at which it was ready and drawn not to be grafted; it keeps its place in TRAINING for a while."""
    held_by: str | None = None
    """Why the strategy held alpha in the last step, if it did."""

    def state_tree(self) -> dict[str, Any]:
        """All of it as a state tree (``state`` is its place in the lifecycle)."""
        plain = {part.name: getattr(self, part.name) for part in fields(self)}
        members = {name: member.state() for name, member in self.members.items()}
        return {**plain, "state": int(self.state), "members": members}

    @classmethod
    def of(cls, tree: dict[str, Any], devices: Mapping[str, torch.device]) -> Cohort:
        """The cohort that :meth:`state_tree` has told of; what strategies remember lies where their site does."""
        memory = {site: _placed(kept, devices[site]) for site, kept in tree["memory"].items()}
        members = {name: Member.of(member) for name, member in tree["members"].items()}
        values: dict[str, Any] = {**tree, "state": Lifecycle(tree["state"]), "members": members, "memory": memory}
        return cls(**values)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.members)

    @property
    def num_seeds(self) -> int:
        return sum(len(member.slots) for member in self.members.values())

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        return np.concatenate([member.slots for member in self.members.values()])


def _placed(value: Any, device: torch.device) -> Any:
    """Plain values with all tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _placed(item, device) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        items = [_placed(item, device) for item in cast("list[Any] | tuple[Any, ...]", value)]
        return items if isinstance(value, list) else tuple(items)
    return value
