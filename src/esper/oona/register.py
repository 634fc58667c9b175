"""What the id of an order stands for and what became of it, from the moment it is known until its answer is in the log.

The log has one pen. The training thread takes it for the orders of a step and their answers, and never waits for it
while a step lasts: what it could not write then is written later. Refusals are written by :meth:`Register.write`, in
another thread, which lets the training thread go first.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import msgspec

from esper.oona.answers import JOURNAL, SNAPSHOT, Answer, acknowledge, answer_entry, content_of, refused
from esper.oona.pad import Pad
from esper.protocol import Acknowledgement, Order
from esper.safety.command_log import Entry

MOST_AT_ONCE = 256
"""Refusals written at once."""
PATIENCE = 1.0
"""Seconds for which the pen is kept for the training thread: a validation between two steps takes longer."""


class Register:
    """Open orders and answers of one training.

    Parameters
    ----------
    lock:
        The desk's. Whoever calls holds it, except where it says otherwise; nobody waits for the pen with it.
    on_written:
        Called when answers have reached the log.
    """

    def __init__(self, pad: Pad, lock: threading.RLock, on_written: Callable[[], None] | None) -> None:
        self._pad, self._lock, self._on_written = pad, lock, on_written
        self._pen = threading.Lock()
        self._wanted_until = -math.inf
        """The training thread found the pen taken: it goes next, unless it takes its time (:func:`time.monotonic`)."""
        self.answers: dict[str, Answer] = {}
        self.open: dict[str, str] = {}
        """Content of the orders whose answer is not in the log yet, by id."""
        self._unwritten: list[Answer] = []
        """Of orders that were applied in a step, or refused there by a gate."""
        self._held: list[Answer] = []
        """The same, but nobody may be told before the next checkpoint."""
        self._turned_away: list[Answer] = []
        """Refused without a step; no step waits while they go to the disk."""

    # ---------------------------------------------------------------------------------------------- what is known

    def content(self, order_id: str) -> str | None:
        """What an id stands for, if it is known."""
        answer = self.answers.get(order_id)
        return self.open.get(order_id) if answer is None else answer.content

    def again(self, order: Order, content: str, step: int) -> Acknowledgement | None:
        """What to say to an id that is known: the same order is answered again, another one is refused."""
        if content != content_of(order):
            reason = f"the id {order.id!r} stands for another order; give each its own"
            told = acknowledge(order, "refused", "id", reason, step)
            return msgspec.structs.replace(told, first=False)
        answer = self.answers.get(order.id)
        return None if answer is None else msgspec.structs.replace(answer.acknowledgement, first=False)

    # ---------------------------------------------------------------------------------------------- what comes to it

    def enter(self, answer: Answer, *, hold: bool) -> None:
        """An answer of this step. What comes after one that is held waits behind it: order is kept."""
        (self._held if hold or self._held else self._unwritten).append(answer)

    def turn_away(self, order: Order, told: Acknowledgement) -> None:
        """The answer to an order that is not applied."""
        answer = Answer(told, content_of(order))
        self._turned_away.append(answer)
        if told.gate == JOURNAL:  # the one answer that need not be on the disk: the disk is what it is about
            self.answers[order.id] = answer
            self.open.pop(order.id, None)
        else:
            self.open[order.id] = answer.content

    def kept(self, refusal: str | None) -> None:
        """A checkpoint was written, or could not be: then nobody who asked for it gets it."""
        if refusal is None:
            self._unwritten, self._held = self._unwritten + self._held, []
        else:
            asked = [answer for answer in self._held if answer.acknowledgement.kind == SNAPSHOT]
            self._held = [answer for answer in self._held if answer not in asked]
            self._unwritten += [refused(answer, refusal) for answer in asked]
        self.flush()

    @property
    def unwritten(self) -> list[Answer]:
        """Answers that are not in the log, for a checkpoint."""
        return [*self._turned_away, *self._unwritten, *self._held]

    def restore(self, answers: Sequence[Answer], unwritten: Sequence[Answer], waiting: Sequence[Order]) -> None:
        """Go on with what a checkpoint and the log say; what was refused meanwhile is no part of either, and stays."""
        self.answers = {answer.acknowledgement.id: answer for answer in answers}
        # What was held was held for this checkpoint.
        self._held, self._unwritten = [], [one for one in unwritten if one.acknowledgement.id not in self.answers]
        mine = {answer.acknowledgement.id for answer in self._unwritten} | set(self.answers)
        self._turned_away = [one for one in self._turned_away if one.acknowledgement.id not in mine]
        self.open = {order.id: content_of(order) for order in waiting if order.id not in self.answers}
        self.open |= {a.acknowledgement.id: a.content for a in (*self._unwritten, *self._turned_away)}
        self.answers |= {a.acknowledgement.id: a for a in self._turned_away if a.acknowledgement.gate == JOURNAL}

    # ---------------------------------------------------------------------------------------------- to the disk

    @contextmanager
    def pen(self, *, ask: bool = False) -> Generator[bool]:
        """Whether the training thread has the pen now. With ``ask`` nobody else takes it before it had it."""
        is_mine = self._pen.acquire(blocking=False)
        if ask:
            self._wanted_until = -math.inf if is_mine else time.monotonic() + PATIENCE
        try:
            yield is_mine
        finally:
            if is_mine:
                self._pen.release()

    def _is_wanted(self) -> bool:
        return time.monotonic() < self._wanted_until

    @contextmanager
    def waiting_for_pen(self) -> Generator[None]:
        """The pen, and then the lock: for whoever does not hold the lock and may wait for the disk."""
        with self._pen, self._lock:
            self._wanted_until = -math.inf
            yield

    def flush(self) -> None:
        """Bring the answers of steps onto the disk; those that it does not take wait."""
        if self._unwritten and self._pad.is_ready:
            with self.pen() as is_mine:
                if is_mine:
                    self._note(self._written(self._unwritten))

    def flush_all(self) -> None:
        """Bring refusals onto the disk as well. Call it with the pen (:meth:`waiting_for_pen`)."""
        if self._pad.is_ready and (self._turned_away or self._unwritten):
            self._note(self._written([*self._turned_away, *self._unwritten]))

    def write(self) -> None:
        """Bring refusals onto the disk, and answers that a step could not write. Call it without the lock."""
        with self._lock:
            answers = [*self._turned_away[:MOST_AT_ONCE], *self._unwritten]
            if not answers or self._is_wanted() or not self._pad.is_ready or not self._pen.acquire(blocking=False):
                return
        try:
            written = self._written(answers)
            with self._lock:
                self._note(written)
        finally:
            self._pen.release()

    def write_entry(self, entry: Entry) -> None:
        """Bring something else onto the disk, and wait for it. Call it without the lock."""
        with self.waiting_for_pen():
            self._pad.write([entry])

    @property
    def num_turned_away(self) -> int:
        """Refusals that are not on the disk yet."""
        return len(self._turned_away)

    @property
    def has_unwritten(self) -> bool:
        """Whether :meth:`write` has anything to do."""
        return bool(self._turned_away or self._unwritten)

    def _written(self, answers: Sequence[Answer]) -> list[Answer]:
        """Those of ``answers`` that the log has taken."""
        entries = [answer_entry(answer) for answer in answers]
        self._pad.write(entries)
        return [answer for answer, entry in zip(answers, entries, strict=True) if entry.id in self._pad]

    def _note(self, written: Sequence[Answer]) -> None:
        ids = {answer.acknowledgement.id for answer in written}
        self.answers |= {answer.acknowledgement.id: answer for answer in written}
        for order_id in ids:
            self.open.pop(order_id, None)
        self._unwritten = [answer for answer in self._unwritten if answer.acknowledgement.id not in ids]
        self._turned_away = [answer for answer in self._turned_away if answer.acknowledgement.id not in ids]
        if ids and self._on_written is not None:
            self._on_written()
