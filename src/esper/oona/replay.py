"""Orders that earlier lives of a training have written down after its checkpoint: applied again, each in its turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from esper.errors import StateError
from esper.oona.answers import POISON, Answer, Attempt, Intent
from esper.oona.attempts import Attempts
from esper.protocol import Order


class Replay:
    """Orders of earlier lives, each to be applied again in its turn.

    Parameters
    ----------
    kept:
        What the checkpoint says is still to be applied again.
    said:
        What the log says after it.
    answers:
        All that are known. What was given up or has expired, although it was written down, is not applied by any life.
    """

    def __init__(
        self, kept: Sequence[Intent], said: Iterable[Intent | Answer | Attempt], answers: Iterable[Answer]
    ) -> None:
        told = [answer.acknowledgement for answer in answers]
        gone = {one.id for one in told if one.outcome == "expired" or one.gate == POISON}
        logged = [*kept, *(intent for intent in said if isinstance(intent, Intent))]
        left = [intent for intent in logged if intent.order.id not in gone]
        # An emergency stop that overtook others stands behind them in the log.
        self.intents = deque(sorted(left, key=lambda intent: intent.turn))
        self.attempts = Attempts()
        """At those that have no answer."""

    def __bool__(self) -> bool:
        return bool(self.intents)

    def check(self, run: str, job: str) -> None:
        """Refuse the log of another training.

        Raises
        ------
        StateError
            It is one.
        """
        for order in (intent.order for intent in self.intents):
            if (order.run, order.job) != (run, job):
                raise StateError(
                    f"a log of commands belongs to one training, got one of {order.run!r}, {order.job!r} for {run!r}, "
                    f"{job!r}; use the folder of this run"
                )

    def due(self, turn: int) -> list[Order]:
        """The orders of this turn; they are taken out."""
        orders: list[Order] = []
        while self.intents and self.intents[0].turn <= turn:
            orders.append(self.intents.popleft().order)
        return orders

    def place(self, steps: int, lateness: Callable[[Order], str | None]) -> list[tuple[Order, str, str]]:
        """Begin after ``steps`` steps, of which no checkpoint tells what orders were applied in them.

        What was written down before is in the run or is not, and nobody knows: it is not applied. What was written down
        later, not answered, and is too late now is not applied either. Returns those that nobody was told of, with gate
        and reason.
        """
        if steps == 0:  # all that was ever written down comes after this
            return []
        away: list[tuple[Order, str, str]] = []
        left: deque[Intent] = deque()
        for intent in self.intents:
            order, is_open = intent.order, intent.order.id in self.attempts
            late = lateness(order) if is_open else None
            if intent.turn <= steps:
                why = "it was given before a checkpoint that tells nothing of orders; send it anew if it is wanted"
                away += [(order, "checkpoint", why)] if is_open else []
            elif late is not None:
                away.append((order, "deadline", late))
            else:
                left.append(intent)
        self.intents = left
        for order, _, _ in away:
            self.attempts.end(order.id)
        return away
