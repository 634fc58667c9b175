"""The desk of one training: orders from outside come in at any time, from any thread, and leave at step boundaries.

::

    take       checked: size, schema, run and job, signature; an id that is known is answered, not taken again
    turn       in the training thread: on the disk (the intent), then handed out to be applied
    answer     on the disk (what became of it), and only then told: whoever sends acknowledgements follows the log
    write      in another thread: what was refused without a step, on the disk; no step waits for it

So whatever was told survives any death, and what was applied without having been told is applied again, in the same
step of the same run, before anything new but an emergency stop. What ends the process whenever it is applied is given
up. The bus need not remember: a delivery is done with once :meth:`Desk.is_open` says no.
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
from esper.kasmina.gates import Gate
from esper.oona.answers import (
    JOURNAL,
    POISON,
    SNAPSHOT,
    Answer,
    Attempt,
    Intent,
    Kept,
    acknowledge,
    attempt_entry,
    content_of,
    intent_entry,
    read_entry,
)
from esper.oona.attempts import MOST_ATTEMPTS, Attempts
from esper.oona.envelope import Envelope, seconds
from esper.oona.incoming import Verify, check_order, is_emergency, read_order
from esper.oona.pad import Pad
from esper.oona.register import MOST_AT_ONCE, Register
from esper.oona.replay import Replay
from esper.protocol import Acknowledgement, Order, Outcome
from esper.safety.command_log import Position
from esper.safety.disk import Disk
from esper.safety.tree import Tree

ROOM = 1000
"""Orders that may wait."""
EMERGENCY_ROOM = 16
"""More of them, for emergency stops."""
MOST_A_STEP = 256
"""Orders applied in one step; the others wait for the next one, but for emergency stops."""
_UNPLACED = -1
"""The turn of a desk that has seen no step, and of whose steps no checkpoint tells."""


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
        Called when answers have reached the log, in the thread that has written them; keep it short.

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
        self._verify, self._clock, self._room = verify, clock, room
        self._lock = threading.RLock()
        self._waiting: dict[str, Order] = {}
        """Taken, and not on the disk yet: a death forgets them, and their senders have not been told anything."""
        self._unlogged: list[Acknowledgement] = []
        self._doubted: list[Order] = []
        """They may be on the disk or not, and were not applied: nothing is said of them before it is known."""
        self._ended: str | None = None
        self._step = 0
        self._pad = Pad(Path(path), clock, disk)
        self._register = Register(self._pad, self._lock, on_written)
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
        with self._lock:
            told = None
            if doubt is None or self._content(order.id) is not None:
                told = self._put(order)
            else:  # One that is late is remembered too: a copy with another time may come, and its answer is this one.
                outcome: Outcome = "expired" if doubt.flaw == "expired" else "refused"
                self._turn_away(order, outcome, doubt.flaw, str(doubt))
        if self._ended is not None or self._register.num_turned_away >= MOST_AT_ONCE:
            self.write()
        return told

    def submit(self, order: Order) -> Acknowledgement | None:
        """Take an order of this very process, whose sender needs no proof; returns what :meth:`take` does.

        Raises
        ------
        EnvelopeError
            It cannot be written down.
        """
        order = msgspec.structs.replace(order, run=self.run, job=self.job)
        check_order(order)
        with self._lock:
            return self._put(order)

    def is_open(self, order_id: str) -> bool:
        """Whether its answer is still to come: until then its delivery must not be acknowledged to the bus."""
        with self._lock:
            return order_id in self._waiting or order_id in self._register.open

    @property
    def num_bytes(self) -> int:
        """How much of the log is on the disk for certain. Safe from any thread."""
        return self._pad.num_bytes

    @property
    def has_unwritten(self) -> bool:
        """Whether :meth:`write` has anything to do."""
        return self._register.has_unwritten

    def write(self) -> None:
        """Bring what was refused without a step onto the disk; it is told then. Not for the training thread."""
        self._register.write()

    def answer_to(self, order_id: str) -> Acknowledgement | None:
        """The answer for ever, or ``None`` before there is one."""
        with self._lock:
            known = self._register.answers.get(order_id)
            return None if known is None else known.acknowledgement

    def unlogged(self) -> list[Acknowledgement]:
        """Orders that the log could not take were refused; perhaps nobody else sends this. Each is told once."""
        with self._lock:
            told, self._unlogged = self._unlogged, []
            return told

    def end(self, reason: str) -> None:
        """The training is over: what waits and what comes is refused."""
        with self._register.waiting_for_pen():
            self._ended = reason
            if num := len(self._replay.intents):
                text = f"{num} logged commands were not reached again; the training took another course"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            self._turn_away_waiting(dict.fromkeys(self._waiting, ("refused", "ended", reason)))
            self._register.flush_all()

    def close(self) -> None:
        """Let the next process have the log."""
        with self._register.waiting_for_pen():
            self._ended = self._ended or "the desk is closed"
            self._register.flush_all()
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
            self._step = step
            if self._turn == _UNPLACED:
                self._place(step - 1)
            self._turn += 1
            self._take_from_log()
            self._write_down(step)
        while True:
            with self._lock:
                if not self._ready:
                    self._register.flush()
                    return
                order = self._ready.popleft()
            if order.id not in self._replay.attempts or self._begin_again(order):
                yield order

    def answer(self, order: Order, step: int, gate: Gate, *, hold: bool) -> None:
        """What became of an order. With ``hold`` it is not written before the next checkpoint."""
        outcome: Outcome = "applied" if gate.passed else "refused"
        told = acknowledge(order, outcome, gate.name, gate.reason, step)
        over: Attempt | None = None
        with self._lock:
            known = self._register.answers.get(order.id)
            if known is not None:
                self._compare(known.acknowledgement, told)
                return
            self._register.enter(Answer(told, content_of(order)), hold=hold)
            if order.id in self._replay.attempts:
                over = self._replay.attempts.end(order.id)
            if not self._ready or over is not None:  # the next one may end the process, and is not to take it along
                self._register.flush()
        if over is not None and self.answer_to(order.id) is None:
            self._register.write_entry(attempt_entry(over, step))

    def kept(self, refusal: str | None = None) -> None:
        """A checkpoint was written, or could not be: then nobody who asked for it gets it."""
        with self._lock:
            self._register.kept(refusal)

    # ---------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Tree]:
        """Answers, those that are held, and how far the log goes. What waits is not part of it."""
        with self._lock:
            answers, unwritten = list(self._register.answers.values()), self._register.unwritten
            kept = Kept(answers, unwritten, list(self._ready), list(self._replay.intents))
            return {
                "turn": self._turn,
                "position": self._pad.position.tree(),
                "kept": np.frombuffer(msgspec.msgpack.encode(kept), dtype=np.uint8),
            }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state` has told, or from a run that knew no desk; what the log says after it follows.

        A run that knew no desk has counted no turns: they begin with the number of its steps, and what the log holds
        from before is not applied (:meth:`Replay.place`).

        Raises
        ------
        StateError
            The log does not go on from there, or is another training's.
        """
        turn, position, kept = _UNPLACED, Position(), Kept([], [], [], [])
        if state is not None:
            turn, position = state["turn"], Position(**state["position"])
            kept = msgspec.msgpack.decode(bytes(state["kept"]), type=Kept)
        with self._register.waiting_for_pen():
            self._register.flush_all()  # what was refused meanwhile is no part of any checkpoint
            said = [read_entry(entry) for entry in self._pad.after(position)]
            answers = [*kept.answers, *(answer for answer in said if isinstance(answer, Answer))]
            replay = Replay(kept.replay, said, answers)
            replay.check(self.run, self.job)
            self._turn, self._ready, self._replay = turn, deque(kept.ready), replay
            orders = [*kept.ready, *(intent.order for intent in replay.intents)]
            self._register.restore(answers, kept.held, orders)
            answered = {answer.acknowledgement.id for answer in (*answers, *kept.held)}
            replay.attempts = Attempts(said, (order.id for order in orders if order.id not in answered))
            for order_id in [order_id for order_id in self._waiting if self._register.content(order_id) is not None]:
                del self._waiting[order_id]
            self._register.flush_all()

    # ---------------------------------------------------------------------------------------------- how

    def _put(self, order: Order) -> Acknowledgement | None:
        known = self._content(order.id)
        if known is not None:
            return self._register.again(order, known, self._step)
        if self._ended is not None:
            self._turn_away(order, "refused", "ended", self._ended)
        elif len(self._waiting) >= self._room + EMERGENCY_ROOM * is_emergency(order):
            reason = f"at most {self._room} orders may wait; send it later, with an id of its own"
            self._turn_away(order, "refused", "room", reason)
        else:
            self._waiting[order.id] = order
        return None

    def _content(self, order_id: str) -> str | None:
        """What an id stands for, if it is known."""
        waiting = self._waiting.get(order_id)
        return self._register.content(order_id) if waiting is None else content_of(waiting)

    def _turn_away(self, order: Order, outcome: Outcome, gate: str, reason: str) -> None:
        told = acknowledge(order, outcome, gate, reason, self._step)
        self._register.turn_away(order, told)
        if gate == JOURNAL:
            self._unlogged.append(told)

    def _turn_away_waiting(self, why: dict[str, tuple[Outcome, str, str]]) -> None:
        """Answer those of what waits that will not be applied: outcome, gate and reason by id."""
        for order_id, reasons in why.items():
            self._turn_away(self._waiting.pop(order_id), *reasons)

    def _take_from_log(self) -> None:
        self._ready.extend(self._replay.due(self._turn))

    def _place(self, steps: int) -> None:
        """The run stands after ``steps`` steps, of which no desk tells."""
        self._turn = steps
        for order, gate, reason in self._replay.place(steps, self._lateness):
            self._turn_away(order, "expired", gate, reason)

    def _begin_again(self, order: Order) -> bool:
        """Count another attempt at an order that no life has lived to answer; not if there were too many."""
        if not self._replay.attempts.has_failed(order.id):
            self._register.write_entry(attempt_entry(self._replay.attempts.begin(order.id), self._step))
            return True
        reason = f"the process ended each time that it was applied, {MOST_ATTEMPTS} times again; it is given up"
        warnings.warn(f"order {order.id} ({order.kind}) is refused: {reason}", RuntimeWarning, stacklevel=4)
        with self._lock:
            self._replay.attempts.end(order.id)
            told = acknowledge(order, "refused", POISON, reason, self._step)
            self._register.enter(Answer(told, content_of(order), order), hold=False)
        return False

    def _settle(self) -> None:
        """Refuse what was in doubt, once it is certain that it is not on the disk."""
        if self._doubted and self._pad.settle():
            doubted, self._doubted = self._doubted, []
            for order in doubted:
                self._turn_away(order, "refused", JOURNAL, "the disk did not take it; send it anew")

    def _write_down(self, step: int) -> None:
        """Bring what waits onto the disk: what is there is ready, all else is turned away.

        Until all of an earlier life is done that is emergency stops only.
        """
        is_new = not self._ready and not self._replay
        orders = list(islice(self._waiting.values(), MOST_A_STEP if is_new else 0))
        orders += [order for order in islice(self._waiting.values(), len(orders), None) if is_emergency(order)]
        if not orders and not (is_new and self._doubted):
            return
        with self._register.pen(ask=True) as is_mine:
            if is_mine:  # else refusals are on their way to the disk, and this is for the next step
                self._settle()
                self._write_intents(orders, step)

    def _write_intents(self, orders: list[Order], step: int) -> None:
        away: dict[str, tuple[Outcome, str, str]] = {
            order.id: ("expired", "deadline", late) for order in orders if (late := self._lateness(order)) is not None
        }
        timely = [order for order in orders if order.id not in away]
        entries = [intent_entry(Intent(order, self._turn), step) for order in timely]
        refusal = self._pad.write(entries) if entries else None
        for order, entry in zip(timely, entries, strict=True):
            if entry.id in self._pad:
                self._ready.append(self._waiting.pop(order.id))
                self._register.open[order.id] = content_of(order)
            elif entry.id in self._pad.doubtful:
                self._doubted.append(self._waiting.pop(order.id))
                self._register.open[order.id] = content_of(order)
            else:
                away[order.id] = ("refused", JOURNAL, refusal or "")
        self._turn_away_waiting(away)

    def _lateness(self, order: Order) -> str | None:
        """Why an order comes too late; ``None``: it does not."""
        is_late = order.deadline is not None and seconds(order.deadline) < self._clock()
        return f"its deadline {order.deadline} has passed" if is_late else None

    def _compare(self, first: Acknowledgement, now: Acknowledgement) -> None:
        if now.kind != SNAPSHOT and (first.outcome, first.step) != (now.outcome, now.step):
            warnings.warn(
                f"order {now.id} was {first.outcome} in step {first.step} and is {now.outcome} in step {now.step} now "
                "that it is applied again: the training took another course; its first answer stands",
                RuntimeWarning,
                stacklevel=4,
            )
