"""Orders that no life of a training has lived to answer: how often each was begun, so that none is replayed for ever.

::

    intent              on the disk before the order is applied; whether a life came to that nobody knows
    attempt, begun      on the disk before it is applied again by another life
    attempt, over       it was applied and the process is still there, but its answer has to wait for a checkpoint

What is begun again and again and never over kills the process that applies it.
"""

from __future__ import annotations

from collections.abc import Iterable

from esper.oona.answers import Answer, Attempt, Intent

MOST_ATTEMPTS = 2
"""Lives that began to apply an order again and did not live to answer it, after which it is given up."""


class Attempts:
    """What the log says of the orders without an answer.

    Parameters
    ----------
    said:
        The log's entries.
    unanswered:
        Ids of the orders that are to be applied again and have no answer.
    """

    def __init__(self, said: Iterable[Intent | Answer | Attempt] = (), unanswered: Iterable[str] = ()) -> None:
        self._begun = dict.fromkeys(unanswered, 0)
        self._over = dict.fromkeys(self._begun, 0)
        for one in said:
            if isinstance(one, Attempt) and one.order_id in self._begun:
                counts = self._over if one.is_over else self._begun
                counts[one.order_id] = max(counts[one.order_id], one.number)

    def __contains__(self, order_id: str) -> bool:
        return order_id in self._begun

    def has_failed(self, order_id: str) -> bool:
        """Whether it must not be begun again."""
        return self._begun[order_id] - self._over[order_id] >= MOST_ATTEMPTS

    def begin(self, order_id: str) -> Attempt:
        """Another one: to be written before the order is applied."""
        self._begun[order_id] += 1
        return Attempt(order_id, self._begun[order_id])

    def end(self, order_id: str) -> Attempt:
        """It was applied: no death from now on is its doing. To be written where the answer is not."""
        del self._over[order_id]
        return Attempt(order_id, self._begun.pop(order_id), is_over=True)
