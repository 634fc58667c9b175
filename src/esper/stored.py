"""A run that can be saved and loaded: in memory as a state tree, on a disk as checkpoints."""

from __future__ import annotations

from pathlib import Path

from esper.accounts import Accounts
from esper.commands import Applied, Orders
from esper.copies import TwinsAlone
from esper.evidence.judge import Judge
from esper.guard import Guard
from esper.journal import Journal
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.safety.checkpoint import Loaded, Saved
from esper.safety.shelf import Shelf
from esper.safety.training import Training
from esper.safety.tree import Tree
from esper.stages import Stages
from esper.state import Loop, Part, Setup, Thoughts, Whole
from esper.tamiyo import Controller
from esper.trials import Trials


class Stored:
    """The side of a :class:`~esper.grower.Grower` that knows all parts of its state; each part knows its own."""

    kasmina: Kasmina
    clock: HostClock
    accounts: Accounts
    judge: Judge
    stages: Stages
    trials: Trials
    journal: Journal
    loop: Loop
    controller: Controller
    guard: Guard
    training: Training
    _orders: Orders
    _setup: Setup
    _shelf: Shelf

    def state_dict(self) -> Tree:
        """All that this run is made of, copied to the CPU; call it after :meth:`step`, between two training steps.

        Raises
        ------
        StateError
            Something cannot be part of a state (its place is named).
        """
        return self._whole(waiting=True).saved()

    def load_state_dict(self, state: Tree) -> None:
        """Go on exactly where :meth:`state_dict` was called, with a Grower that was built in the same way.

        Parameters stay the objects they are. After :meth:`absorb` build the model with the wider layers first.

        Raises
        ------
        StateError
            The state belongs to another run or is damaged. Nothing was changed.
        """
        self._whole(waiting=True).load(state)
        self.trials.tell_lost(self.loop.last_step)
        self.guard.after_step(self.loop.last_step)

    def save(self, folder: str | Path, *, keep: int = 2) -> Saved:
        """Write :meth:`state_dict` as a checkpoint into a folder, whose newest ``keep`` stay (docs/safety.md).

        When this returns the checkpoint survives a power cut. The folder is this run's until :meth:`detach`.

        Raises
        ------
        StateError
            The state cannot be stored, another run writes there, or the disk refused it; older checkpoints stay.
        """
        return self._shelf.save(folder, self.state_dict(), step=self.loop.last_step, keep=keep)

    def load(self, folder: str | Path) -> Loaded:
        """:meth:`load_state_dict` with the newest intact checkpoint; damaged newer ones are warned of.

        Raises
        ------
        StateError
            No checkpoint is intact, or it belongs to another run. Nothing was changed.
        """
        loaded, told = self._shelf.load(folder)
        self.load_state_dict(loaded.tree)
        if told is not None:
            self.journal.warn(told, told, self.loop.last_step)
        return loaded

    def _whole(self, *, waiting: bool, twins: bool = True) -> Whole:
        """The run's state by its parts, in the order in which they are restored.

        ``waiting``: commands that wait, snapshots and every copy of the network belong to what is stored; a snapshot
        in memory leaves commands waiting, finds the kept copies at hand, and has ``twins`` if they are asked for.
        """
        parts: dict[str, Part] = {
            "kasmina": self.kasmina, "clock": self.clock, "accounts": self.accounts, "judge": self.judge,
            "stages": self.stages, "trials": self.trials, "journal": self.journal, "loop": self.loop,
            "controller": Thoughts(self.controller), "guard": self.guard,
        }  # fmt: skip
        if waiting:
            parts |= {"orders": self._orders, "applied": Applied(self._orders), "snapshots": self.guard.snapshots}
        if waiting or twins:
            parts["copies"] = self.trials.copies if waiting else TwinsAlone(self.trials.copies)
        return Whole(self._setup, self.training, parts)
