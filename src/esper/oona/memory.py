"""The bus inside one process: no server, nothing to install. ``memory://NAME`` is the same bus for all its threads."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from esper.errors import BusError
from esper.oona.bus import Begin, Delivery, Message
from esper.oona.topics import Topic

MOST_BYTES = 256 << 20
"""What a durable topic may hold before it refuses more."""

MOST_LOSSY_BYTES = 64 << 20
"""What a topic that may lose keeps at most, however few messages that are."""

_HUBS: dict[str, Hub] = {}
_HUBS_LOCK = threading.Lock()


@dataclass
class _Pending:
    """Handed out and not acknowledged."""

    offset: int
    consumer: str
    until: float
    """When it may be handed out again."""
    attempts: int


@dataclass
class _Group:
    next_offset: int
    pending: OrderedDict[int, _Pending] = field(default_factory=OrderedDict[int, _Pending])

    @property
    def oldest(self) -> int:
        """The first message this group still needs."""
        return min(self.pending, default=self.next_offset)


@dataclass
class _Stream:
    topic: Topic
    messages: deque[Message] = field(default_factory=deque[Message])
    first: int = 0
    """Offset of the oldest message kept."""
    num_bytes: int = 0
    groups: dict[str, _Group] = field(default_factory=dict[str, _Group])

    @property
    def end(self) -> int:
        return self.first + len(self.messages)

    def append(self, message: Message) -> None:
        self.messages.append(message)
        self.num_bytes += len(message.value)

    def trim(self, *, hard: bool = False) -> None:
        """Let go of what every group is done with, but for the newest (``hard``: of those too), and of what is too old
        on a topic that may lose."""
        keep_from = min((group.oldest for group in self.groups.values()), default=self.first)
        newest = max(self.first, self.end - self.topic.retention)
        if not self.topic.durable and not hard:
            keep_from = newest  # whoever comes later reads what there was, though all who were there are done with it
        elif not self.topic.durable or not self.groups:
            keep_from = max(keep_from, newest)
        elif not hard:
            keep_from = min(keep_from, newest)
        while self.first < keep_from or (not self.topic.durable and self.num_bytes > MOST_LOSSY_BYTES):
            self.num_bytes -= len(self.messages.popleft().value)
            self.first += 1
        for group in self.groups.values():
            group.next_offset = max(group.next_offset, self.first)
            for offset in [o for o in group.pending if o < self.first]:
                del group.pending[offset]


class Hub:
    """Streams that several connections share; safe from any thread.

    Parameters
    ----------
    max_bytes:
        Most bytes of one durable topic.
    clock:
        Seconds that only go forward.
    """

    def __init__(self, *, max_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._clock = max_bytes, clock
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}
        self._tickets = itertools.count()

    def put(self, topic: Topic, messages: Sequence[Message]) -> None:
        """Append all of them or none."""
        with self._lock:
            stream = self._stream(topic)
            added = sum(len(message.value) for message in messages)
            if topic.durable and stream.num_bytes + added > self._max_bytes:
                stream.trim(hard=True)
            size = stream.num_bytes + added
            if topic.durable and size > self._max_bytes:
                raise BusError(
                    f"{topic.name} may hold {self._max_bytes} bytes that were not acknowledged, got {size}; "
                    "start or speed up its readers"
                )
            for message in messages:
                stream.append(message)
            stream.trim()
            waiting = list(self._waiting.values())
        for loop, event in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def join(self, topics: Sequence[Topic], group: str, begin: Begin) -> None:
        """Make a group where there is none yet."""
        with self._lock:
            for topic in topics:
                stream = self._stream(topic)
                stream.groups.setdefault(group, _Group(stream.first if begin == "oldest" else stream.end))

    def take(self, topics: Sequence[Topic], group: str, consumer: str, most: int, redeliver_s: float) -> list[Delivery]:
        """What comes next for this member: first what others have left lying, then what is new."""
        now = self._clock()
        taken: list[Delivery] = []
        with self._lock:
            for topic in topics:
                stream = self._streams[topic.name]
                # One that was forgotten under its members begins anew, as over a broker.
                state = stream.groups.setdefault(group, _Group(stream.first))
                for entry in [p for p in state.pending.values() if p.until <= now][: most - len(taken)]:
                    entry.consumer, entry.until, entry.attempts = consumer, now + redeliver_s, entry.attempts + 1
                    taken.append(_delivery(stream, entry))
                while len(taken) < most and state.next_offset < stream.end:
                    entry = _Pending(state.next_offset, consumer, now + redeliver_s, 1)
                    state.pending[entry.offset] = entry
                    state.next_offset += 1
                    taken.append(_delivery(stream, entry))
        return taken

    def done(self, group: str, deliveries: Sequence[Delivery]) -> None:
        """Acknowledged; what is not pending is passed over."""
        with self._lock:
            for delivery in deliveries:
                state = self._streams[delivery.topic].groups.get(group)
                if state is not None:
                    state.pending.pop(int(delivery.position), None)
            for name in {delivery.topic for delivery in deliveries}:
                self._streams[name].trim()

    def release(self, topics: Sequence[Topic], group: str, consumer: str) -> None:
        """A member has left: what it holds may be handed out at once."""
        with self._lock:
            for topic in topics:
                state = self._streams[topic.name].groups.get(group)
                for entry in state.pending.values() if state is not None else ():
                    if entry.consumer == consumer:
                        entry.until = 0.0

    def forget(self, topics: Sequence[Topic], group: str) -> None:
        """Drop a group and what only it still needed."""
        with self._lock:
            for topic in topics:
                stream = self._stream(topic)
                stream.groups.pop(group, None)
                stream.trim()

    def backlog(self, topic: Topic, group: str) -> int:
        """Messages a group is not done with."""
        with self._lock:
            stream = self._streams.get(topic.name)
            if stream is None or group not in stream.groups:
                raise BusError(f"{topic.name} has no group {group!r}; subscribe first")
            state = stream.groups[group]
            return stream.end - state.next_offset + len(state.pending)

    def wake(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> int:
        """Set ``event`` in ``loop`` whenever something arrives, until :meth:`sleep` with the number returned."""
        with self._lock:
            ticket = next(self._tickets)
            self._waiting[ticket] = (loop, event)
            return ticket

    def sleep(self, ticket: int) -> None:
        with self._lock:
            self._waiting.pop(ticket, None)

    def _stream(self, topic: Topic) -> _Stream:
        return self._streams.setdefault(topic.name, _Stream(topic))


@contextmanager
def hub_named(name: str, hub: Hub) -> Generator[None]:
    """While this lasts ``memory://NAME`` leads to this hub."""
    with _HUBS_LOCK:
        _HUBS[name] = hub
    try:
        yield
    finally:
        with _HUBS_LOCK:
            del _HUBS[name]


def _delivery(stream: _Stream, entry: _Pending) -> Delivery:
    message = stream.messages[entry.offset - stream.first]
    return Delivery(stream.topic.name, message.key, message.value, str(entry.offset), entry.attempts)


class MemoryBus:
    """A connection to the hub called ``name``."""

    is_remote = False

    def __init__(self, name: str = "", *, hub: Hub | None = None) -> None:
        self.address = f"memory://{name}"
        with _HUBS_LOCK:
            self._hub = hub or _HUBS.setdefault(name, Hub())
        self._subscriptions: list[_MemorySubscription] = []

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        self._hub.put(topic, messages)
        # No server is waited for, so others in this loop would not get their turn.
        await asyncio.sleep(0)

    async def subscribe(
        self,
        topics: Sequence[Topic],
        *,
        group: str,
        consumer: str,
        begin: Begin = "oldest",
        redeliver_s: float = 30.0,
    ) -> _MemorySubscription:
        self._hub.join(topics, group, begin)
        subscription = _MemorySubscription(self._hub, tuple(topics), group, consumer, redeliver_s)
        self._subscriptions.append(subscription)
        return subscription

    async def backlog(self, topic: Topic, group: str) -> int:
        return self._hub.backlog(topic, group)

    async def forget(self, topics: Sequence[Topic], group: str) -> None:
        self._hub.forget(topics, group)

    async def close(self) -> None:
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()


class _MemorySubscription:
    def __init__(self, hub: Hub, topics: tuple[Topic, ...], group: str, consumer: str, redeliver_s: float) -> None:
        self._hub, self._topics, self._group, self._consumer = hub, topics, group, consumer
        self._redeliver_s = redeliver_s
        self._closed = False

    async def receive(self, most: int = 100, wait_s: float = 1.0) -> list[Delivery]:
        if self._closed:
            raise BusError("a subscription receives while open, got a closed one; subscribe anew")
        await asyncio.sleep(0)
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        end = loop.time() + wait_s
        ticket = self._hub.wake(loop, arrived)
        try:
            while True:
                arrived.clear()
                taken = self._hub.take(self._topics, self._group, self._consumer, most, self._redeliver_s)
                left = end - loop.time()
                if taken or left <= 0:
                    return taken
                # What others have left lying comes back by time alone, so look again now and then.
                await _wait(arrived, min(left, self._redeliver_s, 0.5))
        finally:
            self._hub.sleep(ticket)

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self._hub.done(self._group, deliveries)

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._hub.release(self._topics, self._group, self._consumer)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    # Not `asyncio.wait_for`: before Python 3.12 it swallows a cancellation that meets the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
