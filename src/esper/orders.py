"""Commands that wait for the next step, and whether a checkpoint has to follow them."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, get_args

import msgspec

from esper.errors import ConfigError
from esper.protocol import Command, Order, RollBack


class Keeping:
    """Whether the training's loop is to write a checkpoint at once, and why.

    A run that was taken back to before its newest checkpoint could not come here again by going on from there: its
    snapshots died with the process. Until the next checkpoint nothing may be promised on it.
    """

    def __init__(self) -> None:
        self.on_demand = False
        """Whether the loop looks at ``due``."""
        self.due: str | None = None
        self.is_uncertain = False
        self._kept_at: int | None = None

    @property
    def holds(self) -> bool:
        """Whether answers have to wait for a checkpoint."""
        return self.is_uncertain or self.due is not None

    def taken_back(self, step: int) -> None:
        """The run stands at ``step`` again."""
        if self._kept_at is not None and step < self._kept_at:
            self.is_uncertain = True
            if self.on_demand:
                self.due = f"the training was taken back to step {step}, before its newest checkpoint"

    def kept(self, step: int) -> None:
        """There is a checkpoint of the run as it is."""
        self._kept_at, self.due, self.is_uncertain = step, None, False


class Orders:
    """Commands that wait for the next step: from any thread, first come first served, none lost."""

    def __init__(self, keeping: Keeping | None = None) -> None:
        self._keeping = keeping or Keeping()
        self._waiting: deque[Order] = deque()
        self.applied: list[tuple[int, Order]] = []
        """Step and order, for as long as a snapshot from before could undo them."""
        self._lock = threading.Lock()

    def put(self, command: Command) -> None:
        """Let a command wait.

        Raises
        ------
        ConfigError
            A value is not of the type that the command asks for.
        """
        order = Order(command=checked(command))
        with self._lock:
            self._waiting.append(order)

    @property
    def is_empty(self) -> bool:
        """Whether none waits, and none that was applied could still be undone."""
        return not self._waiting and not self.applied

    def take(self, step: int) -> Order | None:
        """The oldest one, or ``None``; it is remembered as applied in ``step``."""
        with self._lock:
            if not self._waiting:
                return None
            order = self._waiting.popleft()
        self.note(order, step)
        return order

    def note(self, order: Order, step: int) -> None:
        """Remember one that came another way as applied in ``step``."""
        self.applied.append((step, order))

    def forget(self, step: int | None) -> None:
        """Nothing before ``step`` will be undone (``None``: nothing at all)."""
        self.applied = [] if step is None else [entry for entry in self.applied if entry[0] > step]

    def undone(self, step: int) -> None:
        """Everything after ``step`` was undone: the commands since then wait again, before those that came later.

        What asked for the undoing itself does not.
        """
        self._keeping.taken_back(step)
        with self._lock:
            again = [order for at, order in self.applied if at > step and not _undoes(order.command)]
            self._waiting.extendleft(reversed(again))
            self.applied = [entry for entry in self.applied if entry[0] <= step]

    def state(self) -> list[dict[str, Any]]:
        """What waits, as plain values."""
        with self._lock:
            return [msgspec.to_builtins(order) for order in self._waiting]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Let exactly the commands wait that :meth:`state` has told of."""
        orders = [_order_of(plain) for plain in state]
        with self._lock:
            self._waiting = deque(orders)


class Applied:
    """Orders that a snapshot could undo, as a part of what is stored with the snapshots."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders

    def state(self) -> list[list[Any]]:
        return [[step, msgspec.to_builtins(order)] for step, order in self._orders.applied]

    def restore(self, state: list[list[Any]]) -> None:
        self._orders.applied = [(step, _order_of(plain)) for step, plain in state]


def checked(command: Command) -> Command:
    """The command with plain values of the right types: Python itself checks none of them.

    A chunk of 1.5, say, would become chunk 1 later on.
    """
    known = get_args(Command)
    if type(command) not in known:
        names = ", ".join(sorted(kind.__name__ for kind in known))
        raise ConfigError(f"a command must be one of {names}, got {type(command).__name__}; see esper.protocol")
    try:
        return msgspec.convert(msgspec.to_builtins(command, enc_hook=_plain), type(command))
    except (msgspec.ValidationError, NotImplementedError) as error:
        kind = type(command).__name__
        raise ConfigError(f"{kind} must hold values of the types it names, {error}; see esper.protocol") from error


def _plain(value: object) -> object:
    """Ranges, and what numpy and torch hold, as Python's own lists and numbers."""
    if isinstance(value, range):
        return list(value)
    listed = getattr(value, "tolist", None)
    if listed is None:
        raise NotImplementedError(f"got a {type(value).__name__}")
    return listed()


def _order_of(plain: dict[str, Any]) -> Order:
    """An order, or what was kept before there were any: the command alone."""
    return msgspec.convert(plain if "command" in plain else {"command": plain}, Order)


def _undoes(command: Command) -> bool:
    return isinstance(command, RollBack) and command.exact
