"""The desk of one training: orders from outside come in at any time, from any thread, and leave at step boundaries.

::

    take       checked: size, schema, run and job, signature; an id that is known is answered, not taken again
    turn       in the training thread: on the disk (the intent), then handed out to be applied
    answer     on the disk (what became of it), and only then told: whoever sends acknowledgements follows the log

So whatever was told survives any death, and what was applied without having been told is applied again, in the same
step of the same run, before anything new. The bus need not remember: a delivery is done with once
:meth:`Desk.is_open` says no.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from esper.errors import StateError
from esper.kasmina.lifecycle import Gate
from esper.oona.answers import (
    SNAPSHOT,
    Answer,
    Intent,
    Kept,
    acknowledge,
    answer_entry,
    content_of,
    intent_entry,
    read_entry,
    refused,
)
from esper.oona.envelope import Envelope, seconds
from esper.oona.incoming import Verify, check_order, read_order
from esper.oona.pad import Pad
from esper.protocol import Acknowledgement, Order, Outcome, Stop
from esper.safety.command_log import Position
from esper.safety.disk import Disk
from esper.safety.tree import Tree

ROOM = 1000
"""Orders that may wait."""
EMERGENCY_ROOM = 16
"""More of them, for emergency stops."""
JOURNAL = "journal"
"""The gate of the one refusal that a death may forget: the log did not take the order."""
MOST_AT_ONCE = 256
"""Orders applied in one step, and refusals written at once; the others wait for the next one."""


class Desk:
    """Takes, remembers and answers the orders for one training.

    Parameters
    ----------
    path:
        The log of commands; made if it is missing. What is in it is applied again before anything new is taken.
    run, job:
        Whose orders these are.
    verify:
        Who may give orders (``anybody``, ``nobody``, or a check of signatures).
    clock:
        Unix time, for deadlines.
    room:
        Most orders that may wait; more are refused.
    on_written:
        Called when answers have reached the log, in the training thread or that of :meth:`take`; keep it short.
        What :meth:`take` refuses is written with the next step, or when many refusals wait.

    Raises
    ------
    StateError
        The log is in use, damaged, or another training's.
    """

    def __init__(
        self, path: str | Path, *, run: str, job: str, verify: Verify, clock: Callable[[], float] = time.time,
        room: int = ROOM, on_written: Callable[[], None] | None = None, disk: Disk | None = None,
    ) -> None:  # fmt: skip
        self.run, self.job = run, job
        self._verify, self._clock, self._room, self._on_written = verify, clock, room, on_written
        self._lock = threading.RLock()
        self._waiting: dict[str, Order] = {}
        """Taken, and not on the disk yet: a death forgets them, and their senders have not been told anything."""
        self._unwritten: list[Answer] = []
        self._unlogged: list[Acknowledgement] = []
        self._doubted: list[Order] = []
        """They may be on the disk or not, and were not applied: nothing is said of them before it is known."""
        self._ended: str | None = None
        self._step = 0
        self._pad = Pad(Path(path), clock, disk)
        try:
            self.restore(None)
        except StateError:
            self._pad.close()
            raise

    # ---------------------------------------------------------------------------------------------- from any thread

    def take(self, envelope: Envelope) -> Acknowledgement | None:
        """Take the order that a message holds; returns what has to be said of it at once.

        ``None``: it is another training's, or its answer is in the log or will be.

        Raises
        ------
        EnvelopeError
            It is no order, or nobody vouches for it. Nothing was changed; it is for the dead letters.
        """
        read = read_order(envelope, run=self.run, job=self.job, verify=self._verify)
        if read is None:
            return None
        order, doubt = read
        if doubt is None:
            return self._put(order)
        with self._lock:
            if self._content(order.id) is not None:
                return self._put(order)
            if doubt.flaw not in ("stale", "expired"):
                self._turn_away(order, doubt.flaw, str(doubt))
                return None
            # Late once is late for ever, so this need not be remembered.
            outcome: Outcome = "expired" if doubt.flaw == "expired" else "refused"
            return acknowledge(order, outcome, doubt.flaw, str(doubt), self._step)

    def submit(self, order: Order) -> Acknowledgement | None:
        """Take an order of this very process, whose sender needs no proof; returns what :meth:`take` does.

        Raises
        ------
        EnvelopeError
            It cannot be written down.
        """
        order = msgspec.structs.replace(order, run=self.run, job=self.job)
        check_order(order)
        return self._put(order)

    def is_open(self, order_id: str) -> bool:
        """Whether its answer is still to come: until then its delivery must not be acknowledged to the bus."""
        with self._lock:
            return order_id in self._waiting or order_id in self._open

    @property
    def num_bytes(self) -> int:
        """How much of the log is on the disk for certain. Safe from any thread."""
        return self._pad.num_bytes

    def answer_to(self, order_id: str) -> Acknowledgement | None:
        """The answer for ever, or ``None`` before there is one."""
        with self._lock:
            known = self._answers.get(order_id)
            return None if known is None else known.acknowledgement

    def unlogged(self) -> list[Acknowledgement]:
        """Orders that the log could not take were refused; nobody else will send this. Each is told once."""
        with self._lock:
            told, self._unlogged = self._unlogged, []
            return told

    def end(self, reason: str) -> None:
        """The training is over: what waits and what comes is refused."""
        with self._lock:
            self._ended = reason
            if self._replay:
                warnings.warn(
                    f"{len(self._replay)} logged commands were not reached again; the training took another course",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._turn_away_waiting(dict.fromkeys(self._waiting, ("refused", "ended", reason)))

    def close(self) -> None:
        """Let the next process have the log."""
        with self._lock:
            self._ended = self._ended or "the desk is closed"
            self._flush()
            self._pad.close()

    # ---------------------------------------------------------------------------------------------- step boundaries

    @property
    def is_replaying(self) -> bool:
        """Whether orders of an earlier life are still to be applied again."""
        with self._lock:
            return bool(self._replay)

    def turn(self, step: int) -> Generator[Order, None, None]:
        """The orders to apply in this real step. Steps that are taken back count all the same."""
        with self._lock:
            self._turn, self._step = self._turn + 1, step
            self._take_from_log()
            if not self._ready and not self._replay:
                self._write_down(step)
        while True:
            with self._lock:
                if not self._ready:
                    self._flush()
                    return
                order = self._ready.popleft()
            yield order

    def answer(self, order: Order, step: int, gate: Gate, *, hold: bool) -> None:
        """What became of an order. With ``hold`` it is not written before the next checkpoint."""
        outcome: Outcome = "applied" if gate.passed else "refused"
        told = acknowledge(order, outcome, gate.name, gate.reason, step)
        with self._lock:
            known = self._answers.get(order.id)
            if known is not None:
                self._compare(known.acknowledgement, told)
                return
            answer = Answer(told, content_of(order))
            # The next ones wait behind it: order is kept.
            (self._held if hold or self._held else self._unwritten).append(answer)
            if not self._ready:
                self._flush()

    def kept(self, refusal: str | None = None) -> None:
        """A checkpoint was written, or could not be: then nobody who asked for it gets it."""
        with self._lock:
            if refusal is None:
                self._unwritten, self._held = self._unwritten + self._held, []
            else:
                asked = [answer for answer in self._held if answer.acknowledgement.kind == SNAPSHOT]
                self._held = [answer for answer in self._held if answer not in asked]
                self._unwritten += [refused(answer, refusal) for answer in asked]
            self._flush()

    # ---------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tree]:
        """Answers, those that are held, and how far the log goes. What waits is not part of it."""
        with self._lock:
            held = [*self._unwritten, *self._held]
            kept = Kept(list(self._answers.values()), held, list(self._ready), list(self._replay))
            return {
                "turn": self._turn,
                "position": self._pad.position.tree(),
                "kept": np.frombuffer(msgspec.msgpack.encode(kept), dtype=np.uint8),
            }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state` has told, or from a run that knew no desk; what the log says after it follows.

        Raises
        ------
        StateError
            The log does not go on from there, or is another training's.
        """
        turn, position, kept = 0, Position(), Kept([], [], [], [])
        if state is not None:
            turn, position = state["turn"], Position(**state["position"])
            kept = msgspec.msgpack.decode(bytes(state["kept"]), type=Kept)
        with self._lock:
            self._flush()  # what was refused meanwhile is no part of any checkpoint
            said = [read_entry(entry) for entry in self._pad.after(position)]
            for intent in said:
                if isinstance(intent, Intent):
                    self._check_mine(intent.order)
            answered = {answer.acknowledgement.id: answer for answer in said if isinstance(answer, Answer)}
            self._turn, self._ready = turn, deque(kept.ready)
            self._replay = deque([*kept.replay, *(intent for intent in said if isinstance(intent, Intent))])
            self._answers = {**{answer.acknowledgement.id: answer for answer in kept.answers}, **answered}
            # What was held was held for this checkpoint.
            self._held, self._unwritten = [], [a for a in kept.held if a.acknowledgement.id not in answered]
            orders = [*kept.ready, *(intent.order for intent in self._replay)]
            self._open = {order.id: content_of(order) for order in orders if order.id not in self._answers}
            self._open |= {answer.acknowledgement.id: answer.content for answer in self._unwritten}
            for known in [order_id for order_id in self._waiting if order_id in self._open | self._answers]:
                del self._waiting[known]
            self._flush()

    # ---------------------------------------------------------------------------------------------- how

    def _put(self, order: Order) -> Acknowledgement | None:
        with self._lock:
            known = self._content(order.id)
            if known is not None:
                return self._again(order, known)
            is_emergency = isinstance(order.command, Stop) and order.command.emergency
            if self._ended is not None:
                self._turn_away(order, "ended", self._ended)
            elif len(self._waiting) >= self._room + EMERGENCY_ROOM * is_emergency:
                reason = f"at most {self._room} orders may wait; send it later, with an id of its own"
                self._turn_away(order, "room", reason)
            else:
                self._waiting[order.id] = order
            return None

    def _again(self, order: Order, content: str) -> Acknowledgement | None:
        """An id that is known: the same order is answered again, another one is refused."""
        if content != content_of(order):
            reason = f"the id {order.id!r} stands for another order; give each its own"
            told = acknowledge(order, "refused", "id", reason, self._step)
            return msgspec.structs.replace(told, first=False)
        answer = self._answers.get(order.id)
        return None if answer is None else msgspec.structs.replace(answer.acknowledgement, first=False)

    def _content(self, order_id: str) -> str | None:
        """What an id stands for, if it is known."""
        if order_id in self._waiting:
            return content_of(self._waiting[order_id])
        answer = self._answers.get(order_id)
        return self._open.get(order_id) if answer is None else answer.content

    def _turn_away(self, order: Order, gate: str, reason: str) -> None:
        """Refuse what was not taken. A step must not wait while each of many refusals goes to the disk by itself."""
        self._remember(order, acknowledge(order, "refused", gate, reason, self._step))
        if self._ended is not None or len(self._unwritten) >= MOST_AT_ONCE:
            self._flush()

    def _turn_away_waiting(self, why: dict[str, tuple[Outcome, str, str]]) -> None:
        """Answer those of what waits that will not be applied: outcome, gate and reason by id."""
        for order_id, reasons in why.items():
            order = self._waiting.pop(order_id)
            self._remember(order, acknowledge(order, *reasons, self._step))
        self._flush()
        for answer in self._unwritten:
            if answer.acknowledgement.id in why and answer.acknowledgement.gate == JOURNAL:
                self._unlogged.append(answer.acknowledgement)

    def _remember(self, order: Order, told: Acknowledgement) -> None:
        answer = Answer(told, content_of(order))
        self._unwritten.append(answer)
        if told.gate == JOURNAL:  # the one answer that need not be on the disk: the disk is what it is about
            self._answers[order.id] = answer
        else:
            self._open[order.id] = answer.content

    def _take_from_log(self) -> None:
        while self._replay and self._replay[0].turn <= self._turn:
            self._ready.append(self._replay.popleft().order)

    def _settle(self) -> None:
        """Refuse what was in doubt, once it is certain that it is not on the disk."""
        if self._doubted and self._pad.settle():
            for order in self._doubted:
                self._open.pop(order.id)
                self._waiting[order.id] = order
            why: tuple[Outcome, str, str] = ("refused", JOURNAL, "the disk did not take it; send it anew")
            doubted, self._doubted = self._doubted, []
            self._turn_away_waiting({order.id: why for order in doubted})

    def _write_down(self, step: int) -> None:
        """Bring what waits onto the disk: what is there is ready, all else is turned away."""
        self._settle()
        orders = list(islice(self._waiting.values(), MOST_AT_ONCE))
        away: dict[str, tuple[Outcome, str, str]] = {
            order.id: ("expired", "deadline", f"its deadline {order.deadline} has passed")
            for order in orders
            if self._is_late(order)
        }
        timely = [order for order in orders if order.id not in away]
        entries = [intent_entry(Intent(order, self._turn), step) for order in timely]
        refusal = self._pad.write(entries) if entries else None
        for order, entry in zip(timely, entries, strict=True):
            if entry.id in self._pad:
                self._ready.append(self._waiting.pop(order.id))
                self._open[order.id] = content_of(order)
            elif entry.id in self._pad.doubtful:
                self._doubted.append(self._waiting.pop(order.id))
                self._open[order.id] = content_of(order)
            else:
                away[order.id] = ("refused", JOURNAL, refusal or "")
        self._turn_away_waiting(away)

    def _is_late(self, order: Order) -> bool:
        return order.deadline is not None and seconds(order.deadline) < self._clock()

    def _flush(self) -> None:
        """Bring answers onto the disk; those that it does not take wait."""
        if not self._unwritten or not self._pad.is_ready:
            return
        entries = [answer_entry(answer) for answer in self._unwritten]
        self._pad.write(entries)
        waiting: list[Answer] = []
        for answer, entry in zip(self._unwritten, entries, strict=True):
            if entry.id in self._pad:
                self._answers[answer.acknowledgement.id] = answer
                self._open.pop(answer.acknowledgement.id, None)
            else:
                waiting.append(answer)
        is_news, self._unwritten = len(waiting) < len(entries), waiting
        if is_news and self._on_written is not None:
            self._on_written()

    def _compare(self, first: Acknowledgement, now: Acknowledgement) -> None:
        if now.kind != SNAPSHOT and (first.outcome, first.step) != (now.outcome, now.step):
            warnings.warn(
                f"order {now.id} was {first.outcome} in step {first.step} and is {now.outcome} in step {now.step} now "
                "that it is applied again: the training took another course; its first answer stands",
                RuntimeWarning,
                stacklevel=4,
            )

    def _check_mine(self, order: Order) -> None:
        if (order.run, order.job) != (self.run, self.job):
            raise StateError(
                f"a log of commands belongs to one training, got one of {order.run!r}, {order.job!r} for {self.run!r}, "
                f"{self.job!r}; use the folder of this run"
            )
