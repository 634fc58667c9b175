"""A run that can be saved and loaded: in memory as a state tree, on a disk as checkpoints."""

from __future__ import annotations

from pathlib import Path

from esper.accounts import Accounts
from esper.commands import Desk
from esper.copies import TwinsAlone
from esper.errors import StateError
from esper.evidence.judge import Judge
from esper.guard import Guard
from esper.journal import Journal
from esper.kasmina.execution import Kasmina
from esper.kasmina.host import HostClock
from esper.orders import Applied, Keeping, Orders
from esper.safety.checkpoint import Loaded, Saved
from esper.safety.shelf import Shelf
from esper.safety.training import Training
from esper.safety.tree import Tree
from esper.stages import Stages
from esper.state import DESK, Loop, Part, Setup, Thoughts, Whole
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
    keeping: Keeping
    _orders: Orders
    _desk: Desk | None
    _setup: Setup
    _shelf: Shelf

    def _foresee(self) -> None: ...

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
        try:
            self._whole(waiting=True).load(state)
            self.trials.tell_lost(self.loop.last_step)
            self.guard.after_step(self.loop.last_step)
        finally:
            self._foresee()  # what the saved run had begun to read is read again: all of it is in the state
        self.keeping.kept(self.loop.last_step)

    def serve(self, desk: Desk | None, *, checkpoints: bool = False) -> None:
        """Take orders over ``desk`` from the next step on; call it before :meth:`load`, which replays its log.

        With ``checkpoints`` your loop promises to look at :attr:`checkpoint_due` after each step and to save then.
        """
        self._desk = desk
        self.keeping.on_demand = checkpoints

    @property
    def checkpoint_due(self) -> str | None:
        """Why a checkpoint should be written now, out of turn; ``None`` where nothing asks for one."""
        return None if self.is_replaying else self.keeping.due

    @property
    def is_replaying(self) -> bool:
        """Whether orders of an earlier life are still to be applied again, up to where that life was.

        Until then no checkpoint is written: an order that takes the training back needs snapshots from before it, and
        those die with the process. What there is leads here again.
        """
        return self._desk is not None and self._desk.is_replaying

    def kept(self, refusal: str | None = None) -> None:
        """Say that :meth:`state_dict` is safe on a disk as it is now (:meth:`save` does), or why it is not.

        What was promised on it can now be told.
        """
        if refusal is None:
            self.keeping.kept(self.loop.last_step)
        else:
            self.keeping.due = None
        if self._desk is not None:
            self._desk.kept(refusal)

    def save(self, folder: str | Path, *, keep: int = 2) -> Saved:
        """Write :meth:`state_dict` as a checkpoint into a folder, whose newest ``keep`` stay (docs/safety.md).

        When this returns the checkpoint survives a power cut. The folder is this run's until :meth:`detach`. While
        :attr:`is_replaying` nothing is written, and the number returned is 0.

        Raises
        ------
        StateError
            The state cannot be stored, another run writes there, or the disk refused it; older checkpoints stay.
        """
        if self.is_replaying:
            return Saved(number=0, step=0, num_bytes=0)
        try:
            saved = self._shelf.save(folder, self.state_dict(), step=self.loop.last_step, keep=keep)
        except StateError as error:
            self.kept(str(error))
            raise
        self.kept()
        return saved

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
            if self._desk is not None:
                parts[DESK] = self._desk
        if waiting or twins:
            parts["copies"] = self.trials.copies if waiting else TwinsAlone(self.trials.copies)
        return Whole(self._setup, self.training, parts)
