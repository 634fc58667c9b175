"""What waits to be published, and the one account of what became of everything that was offered.

::

    offered + recovered = delivered + dropped + queued + in flight + spooled          at any moment
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from esper.errors import BusError, ConfigError
from esper.oona.envelope import Envelope
from esper.oona.topics import HEALTH, HEARTBEATS, OBSERVATIONS, Topic

PRIORITIES = {HEARTBEATS.name: 0, OBSERVATIONS.name: 1, HEALTH.name: 2}
"""Who goes first, and who stays when there is no room: a small number. Control and events have a way of their own."""


@dataclass(frozen=True, eq=False)
class Offer:
    """Something to be published.

    ``build`` makes the message, in the courier's thread, from the counts at that time; ``num_bytes`` is about its size;
    ``expires`` is the unix time after which nobody wants it (0: never). One that ``supersedes`` takes the place of
    those of its topic that do too and still wait here.
    """

    topic: Topic
    num_bytes: int
    build: Callable[[Mapping[str, int]], Envelope]
    expires: float = 0.0
    supersedes: bool = False


class Waiting:
    """Offers in memory, bounded, and the account. Every method may be called from any thread and takes no time.

    Where there is no room the oldest offers of the least important topics go, down to the one that comes; it goes
    itself where only more important ones are left.
    """

    def __init__(self, *, max_offers: int, max_bytes: int, clock: Callable[[], float] = time.time) -> None:
        if max_offers < 1 or max_bytes < 1:
            raise ConfigError(f"a queue needs room, got max_offers={max_offers}, max_bytes={max_bytes}")
        self._max_offers, self._max_bytes, self._clock = max_offers, max_bytes, clock
        self._lock = threading.Lock()
        self._queues = {name: deque[Offer]() for name in sorted(PRIORITIES, key=PRIORITIES.__getitem__)}
        self._held = self._held_bytes = 0
        """Offers in the queues and in flight; both count towards the bound."""
        self._offered = self._recovered = self._delivered = self._in_flight = self._spooled = 0
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def offer(self, offer: Offer) -> bool:
        """Take an offer; whether it waits now.

        Raises
        ------
        BusError
            Its topic is none of those that may lose messages.
        """
        queue = self._queues.get(offer.topic.name)
        if queue is None:
            raise BusError(f"only {', '.join(self._queues)} may be dropped, got {offer.topic.name}; send it yourself")
        with self._lock:
            self._offered += 1
            if offer.num_bytes > self._max_bytes:
                self._dropped["too_large"] += 1
                return False
            if offer.supersedes:
                self._drop_superseded(queue)
            while self._held >= self._max_offers or self._held_bytes + offer.num_bytes > self._max_bytes:
                if not self._evict(PRIORITIES[offer.topic.name]):
                    self._dropped["queue_full"] += 1
                    return False
            queue.append(offer)
            self._held += 1
            self._held_bytes += offer.num_bytes
            return True

    def _drop_superseded(self, queue: deque[Offer]) -> None:
        old = [offer for offer in queue if offer.supersedes]
        for offer in old:
            queue.remove(offer)
            self._release(offer)
        self._dropped["superseded"] += len(old)

    def _evict(self, priority: int) -> bool:
        for name, queue in reversed(self._queues.items()):
            if PRIORITIES[name] >= priority and queue:
                self._release(queue.popleft())
                self._dropped["queue_full"] += 1
                return True
        return False

    def _release(self, offer: Offer) -> None:
        self._held -= 1
        self._held_bytes -= offer.num_bytes

    def take(self, topics: Sequence[str], most: int, most_bytes: int) -> list[Offer]:
        """The oldest offers of the most important of ``topics`` that has any, at least one; they are in flight then."""
        now = self._clock()
        with self._lock:
            for name, queue in self._queues.items():
                if name not in topics:
                    continue
                taken: list[Offer] = []
                while queue and len(taken) < most:
                    if 0 < queue[0].expires < now:
                        self._release(queue.popleft())
                        self._dropped["expired"] += 1
                        continue
                    most_bytes -= queue[0].num_bytes
                    if taken and most_bytes < 0:
                        break
                    taken.append(queue.popleft())
                if taken:
                    self._in_flight += len(taken)
                    return taken
            return []

    def put_back(self, offers: Sequence[Offer]) -> None:
        """In flight no more: the first of their queue again, but for those that were superseded meanwhile."""
        with self._lock:
            self._in_flight -= len(offers)
            for offer in reversed(offers):
                queue = self._queues[offer.topic.name]
                if offer.supersedes and any(other.supersedes for other in queue):
                    self._release(offer)
                    self._dropped["superseded"] += 1
                else:
                    queue.appendleft(offer)

    def delivered(self, offers: Sequence[Offer]) -> None:
        with self._lock:
            self._land(offers)
            self._delivered += len(offers)

    def dropped(self, offers: Sequence[Offer], reason: str) -> None:
        with self._lock:
            self._land(offers)
            self._dropped[reason] += len(offers)

    def spooled(self, offers: Sequence[Offer], lost: Mapping[str, int]) -> None:
        """These wait on the disk now, but for those of them and of earlier ones that were ``lost``, by reason."""
        with self._lock:
            self._land(offers)
            self._spooled += len(offers) - sum(lost.values())
            self._dropped.update(lost)

    def unspooled(self, delivered: int, lost: Mapping[str, int]) -> None:
        """So many went from the disk to the bus, and so many were lost there."""
        with self._lock:
            self._spooled -= delivered + sum(lost.values())
            self._delivered += delivered
            self._dropped.update(lost)

    def recovered(self, count: int) -> None:
        """So many were on the disk already when this process began."""
        with self._lock:
            self._recovered += count
            self._spooled += count

    def note(self, what: str, count: int = 1) -> None:
        """Count something that is no offer's fate."""
        with self._lock:
            self._notes[what] += count

    def give_up(self, reason: str) -> None:
        """Drop all that is in the queues."""
        with self._lock:
            for queue in self._queues.values():
                self._dropped[reason] += len(queue)
                while queue:
                    self._release(queue.popleft())

    def _land(self, offers: Sequence[Offer]) -> None:
        self._in_flight -= len(offers)
        for offer in offers:
            self._release(offer)

    @property
    def num_queued(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    @property
    def num_bytes(self) -> int:
        """In the queues and in flight."""
        return self._held_bytes

    def counts(self) -> dict[str, int]:
        """The account at this moment; ``dropped_...`` by reason."""
        with self._lock:
            queued = sum(len(queue) for queue in self._queues.values())
            return {
                "offered": self._offered,
                "recovered": self._recovered,
                "delivered": self._delivered,
                "dropped": sum(self._dropped.values()),
                "pending": queued + self._in_flight + self._spooled,
                "queued": queued,
                "in_flight": self._in_flight,
                "spooled": self._spooled,
                **{f"dropped_{reason}": count for reason, count in sorted(self._dropped.items()) if count},
                **dict(sorted(self._notes.items())),
            }
