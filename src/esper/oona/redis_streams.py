"""The bus over Redis Streams: one stream a topic, consumer groups as they are, on one server or a Redis Cluster.

A message is handed over when the server has appended it; how safe it is then is the server's ``appendfsync``.
Durable topics are trimmed only up to what every group has acknowledged and refuse more than ``MOST_ENTRIES`` or
``MOST_BYTES``; a group that nobody reads any more holds them up until it is forgotten. The others keep about their
newest ``retention`` messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from esper.errors import BusError
from esper.oona import redis_scripts as scripts
from esper.oona.address import Address
from esper.oona.bus import Begin, Delivery, Message
from esper.oona.redis_connection import GroupGone, RedisConnection
from esper.oona.topics import Topic

MOST_ENTRIES = 1_000_000
"""What a durable topic may hold before it refuses more."""
MOST_BYTES = 256 << 20

BATCH_MESSAGES, BATCH_BYTES = 500, 256 << 10
"""One command's worth: the server does nothing else meanwhile."""
ENOUGH_BYTES = 8 << 20
"""What one call of ``receive`` gives at most, or one message: a backlog of large ones comes a few at a time."""
_FEW = 16
"""Messages asked for at once while it is not known how large they are; at most 1 MiB each, as senders make them."""

_HEIR = "(left)"
"""Holds what members have left behind until another takes it; nobody may be called so."""
_FORGET_MEMBERS_AFTER_S = 3600.0
_TRIM_EVERY_S = 1.0
_IDLE_POLLS_S = (0.002, 0.05)
"""A cluster has no command that waits on several streams; the shortest and the longest pause between two looks."""

_logger = logging.getLogger("esper.oona")


class RedisBus:
    """A connection to Redis. For one event loop."""

    is_remote = True

    def __init__(self, address: Address, *, most_entries: int = MOST_ENTRIES, most_bytes: int = MOST_BYTES) -> None:
        self.address = str(address)
        self._where = address
        self._connection = RedisConnection(address)
        self._most_entries, self._most_bytes = most_entries, most_bytes
        self._subscriptions: list[_RedisSubscription] = []
        self._is_closed = False

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        self._check_open()
        key = self._where.prefix + topic.name
        for batch in _batches(messages):
            words = [word for message in batch for word in (message.key, message.value)]
            if topic.durable:
                limits = (topic.retention, self._most_entries, self._most_bytes)
                full = await self._connection.call(key, "EVAL", scripts.PUBLISH_DURABLE, 1, key, *limits, *words)
                if full:
                    self._refuse(topic, full)
            else:
                await self._connection.call(key, "EVAL", scripts.PUBLISH_LOSSY, 1, key, topic.retention, *words)

    async def subscribe(
        self,
        topics: Sequence[Topic],
        *,
        group: str,
        consumer: str,
        begin: Begin = "oldest",
        redeliver_s: float = 30.0,
    ) -> _RedisSubscription:
        self._check_open()
        subscription = _RedisSubscription(self._where, self._connection, tuple(topics), group, consumer, redeliver_s)
        await subscription.join(begin)
        self._subscriptions = [s for s in self._subscriptions if not s.is_closed] + [subscription]
        return subscription

    async def backlog(self, topic: Topic, group: str) -> int:
        self._check_open()
        key = self._where.prefix + topic.name
        try:
            groups = [_pairs(info) for info in await self._connection.call(key, "XINFO", "GROUPS", key)]
        except GroupGone:
            groups = []
        state = next((info for info in groups if info["name"] == group.encode()), None)
        if state is None:
            raise BusError(f"{topic.name} has no group {group!r}; subscribe first")
        if state.get("lag") is None:
            # Redis before 7 does not count, nor a later one from whose middle entries were deleted.
            return await self._count_after(key, state["last-delivered-id"]) + state["pending"]
        # What a bounded topic has let go of since is nobody's backlog.
        num = await self._connection.call(key, "XLEN", key)
        return min(state["lag"], num) + state["pending"]

    async def _count_after(self, key: str, position: bytes) -> int:
        num = 0
        while entries := await self._connection.call(key, "XRANGE", key, b"(" + position, "+", "COUNT", BATCH_MESSAGES):
            num, position = num + len(entries), entries[-1][0]
        return num

    async def forget(self, topics: Sequence[Topic], group: str) -> None:
        self._check_open()
        for topic in topics:
            key = self._where.prefix + topic.name
            with contextlib.suppress(GroupGone):
                await self._connection.call(key, "XGROUP", "DESTROY", key, group)

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            await asyncio.gather(*(subscription.close() for subscription in self._subscriptions))
            await self._connection.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise BusError(f"{self.address} is used while open, got a closed bus; open it anew")

    def _refuse(self, topic: Topic, full: list[Any]) -> None:
        num, num_bytes, slowest = full
        raise BusError(
            f"{topic.name} may hold {self._most_entries} messages or {self._most_bytes} bytes that were not "
            f"acknowledged, got {num} and {num_bytes}, the oldest for group {slowest.decode()!r}; "
            "start or speed up its readers, or forget the group"
        )


class _RedisSubscription:
    """One member. ``_handed`` are the entries that the caller has seen, ``_spare`` those it asked no more for.

    A read that was cut off may have given this member entries that nobody saw; so may an earlier life of it under the
    same name. They are fetched again before anything new, or they would come back after ``redeliver_s`` and behind
    their successors.
    """

    def __init__(
        self,
        address: Address,
        connection: RedisConnection,
        topics: tuple[Topic, ...],
        group: str,
        consumer: str,
        redeliver_s: float,
    ) -> None:
        if consumer == _HEIR:
            raise BusError(f"a consumer has a name of its own, got {consumer!r}")
        self._address, self._connection = address, connection
        self._topics = {address.prefix + topic.name: topic for topic in topics}
        self._group, self._consumer = group, consumer
        self._redeliver_s = redeliver_s
        self._handed: dict[tuple[str, bytes], float] = {}
        self._spare: list[Delivery] = []
        self._was_cut_off = True
        self._unseen: dict[str, bytes] = {}
        """Streams in which what was cut off is still looked for, each with the entry after which."""
        self._sizes: dict[str, int] = {}
        """Bytes of a stream's message, the mean of the last that came."""
        self._next_claim = self._next_trim = 0.0
        self.is_closed = False

    async def join(self, begin: Begin) -> None:
        """Make the group where there is none."""
        for key in self._topics:
            try:
                start = "0" if begin == "oldest" else "$"
                await self._connection.call(key, "XGROUP", "CREATE", key, self._group, start, "MKSTREAM")
            except BusError as error:
                if "BUSYGROUP" not in str(error):
                    raise
            with contextlib.suppress(GroupGone):
                idle_ms = round(1000 * _FORGET_MEMBERS_AFTER_S)
                await self._connection.call(key, "EVAL", scripts.SWEEP, 1, key, self._group, idle_ms)

    async def receive(self, most: int = 100, wait_s: float = 1.0) -> list[Delivery]:
        if self.is_closed:
            raise BusError("a subscription receives while open, got a closed one; subscribe anew")
        end = time.monotonic() + wait_s
        pause_s = _IDLE_POLLS_S[0]
        while True:
            left = max(0.0, end - time.monotonic())
            try:
                taken = await self._take(most, min(left, 1.0, self._redeliver_s / 2))
            except GroupGone:
                _logger.warning(
                    "%s no longer knows the group %r: it was restarted without its data, or emptied. "
                    "The group is made anew and begins with the oldest message there is.",
                    self._address,
                    self._group,
                )
                self._handed.clear()
                await self.join("oldest")
                continue
            if taken or time.monotonic() >= end:
                return taken
            if not self._can_block:
                await asyncio.sleep(min(pause_s, max(0.0, end - time.monotonic())))
                pause_s = min(2 * pause_s, _IDLE_POLLS_S[1])

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        by_key: dict[str, list[str]] = {}
        for delivery in deliveries:
            by_key.setdefault(self._address.prefix + delivery.topic, []).append(delivery.position)
        for key, positions in by_key.items():
            for part in range(0, len(positions), BATCH_MESSAGES):
                await self._connection.call(key, "XACK", key, self._group, *positions[part : part + BATCH_MESSAGES])
            for position in positions:
                self._handed.pop((key, position.encode()), None)
        if by_key and time.monotonic() >= self._next_trim:
            self._next_trim = time.monotonic() + _TRIM_EVERY_S
            for key in by_key:
                topic = self._topics[key]
                if topic.durable:
                    await self._connection.call(key, "EVAL", scripts.TRIM, 1, key, topic.retention)

    async def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        # Without a server nothing can be handed on; others take it after redeliver_s.
        with contextlib.suppress(BusError):
            for key in self._topics:
                with contextlib.suppress(GroupGone):
                    leave = (scripts.LEAVE, 1, key, self._group, self._consumer, _HEIR)
                    await self._connection.call(key, "EVAL", *leave)

    @property
    def _can_block(self) -> bool:
        return len(self._topics) == 1 or not self._address.is_cluster

    async def _take(self, most: int, block_s: float) -> list[Delivery]:
        """What comes next: what was cut off, then what others have left lying, then what is new."""
        was_cut_off, self._was_cut_off = self._was_cut_off, True
        if was_cut_off:
            self._spare, self._unseen = [], dict.fromkeys(self._topics, b"0")
        taken = self._spare
        while not taken and self._unseen:
            taken = await self._recover()
        if not taken and time.monotonic() >= self._next_claim:
            taken = await self._claim(most)
            if not taken:
                self._next_claim = time.monotonic() + min(self._redeliver_s / 4, 0.5)
        if not taken:
            taken = await self._read(most, block_s)
        # Only here, past every await: an error and a cancellation leave it set.
        self._was_cut_off = False
        taken, self._spare = taken[:most], taken[most:]
        now = time.monotonic()
        for delivery in taken:
            self._handed[self._address.prefix + delivery.topic, delivery.position.encode()] = now
        return taken

    async def _recover(self) -> list[Delivery]:
        """Some of what the server has given this member and nobody saw; empty where there was none."""
        key, after = next(iter(self._unseen.items()))
        head = ("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", self._at_once(key))
        reply = await self._connection.call(key, *head, "STREAMS", key, after)
        entries = reply[0][1] if reply else []
        self._learn(key, entries)
        found = await self._again(key, [entry for entry in entries if (key, entry[0]) not in self._handed])
        if entries:
            self._unseen[key] = entries[-1][0]
        else:
            del self._unseen[key]
        return found

    async def _claim(self, most: int) -> list[Delivery]:
        """What has been lying for ``redeliver_s``, with others or here."""
        now = time.monotonic()
        # Older ones may be claimed by anybody, so they need not be known any more.
        self._handed = {entry: since for entry, since in self._handed.items() if now - since < self._redeliver_s}
        idle_ms = max(1, round(1000 * self._redeliver_s))
        found: list[Delivery] = []
        for key in self._topics:
            after = b"0-0"
            while len(found) < most and not _is_enough(found):
                count = min(most - len(found), self._at_once(key))
                after, entries, *_ = await self._connection.call(
                    key, "XAUTOCLAIM", key, self._group, self._consumer, idle_ms, after, "COUNT", count
                )
                self._learn(key, entries)
                found += await self._again(key, entries)
                if after == b"0-0":
                    break
        return found

    async def _again(self, key: str, entries: list[Any]) -> list[Delivery]:
        """Entries that were handed out before, with how often."""
        # An entry that a bounded topic has let go of has no fields.
        kept = [entry for entry in entries if entry is not None and entry[1]]
        if not kept:
            return []
        first, last = kept[0][0], kept[-1][0]
        pending = await self._connection.call(
            key, "XPENDING", key, self._group, first, last, 10 * len(kept) + 100, self._consumer
        )
        attempts = {entry[0]: int(entry[3]) for entry in pending}
        return [self._delivery(key, entry, attempts.get(entry[0], 2)) for entry in kept]

    async def _read(self, most: int, block_s: float) -> list[Delivery]:
        """What is new: as many as were asked for, or enough bytes; of several streams some more."""
        found: list[Delivery] = []
        is_more = True
        while is_more and len(found) < most and not _is_enough(found):
            count = min(most - len(found), self._at_once(*self._topics))
            reply = await self._read_some(count, 0.0 if found else block_s)
            is_more = any(len(entries) >= count for _, entries in reply)
            for key, entries in reply:
                self._learn(key.decode(), entries)
                found += [self._delivery(key.decode(), entry, 1) for entry in entries]
        return found

    async def _read_some(self, count: int, block_s: float) -> list[Any]:
        """Streams and their new entries, at most ``count`` of each."""
        head = ("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", count)
        if self._can_block:
            # BLOCK 0 would wait for ever.
            block = ("BLOCK", round(1000 * block_s)) if block_s >= 0.001 else ()
            keys = list(self._topics)
            words = (*head, *block, "STREAMS", *keys, *[">"] * len(keys))
            return await self._connection.call(keys[0], *words, block_s=block_s) or []
        reply: list[Any] = []
        for key in self._topics:
            reply += await self._connection.call(key, *head, "STREAMS", key, ">") or []
        return reply

    def _learn(self, key: str, entries: Sequence[Any]) -> None:
        sizes = [len(entry[1][3]) for entry in entries if entry is not None and entry[1]]
        if sizes:
            self._sizes[key] = sum(sizes) // len(sizes)

    def _at_once(self, *keys: str) -> int:
        """How many messages to ask for: about enough of the largest of these streams, as far as is known."""
        known = [self._sizes[key] for key in keys if key in self._sizes]
        return max(1, min(BATCH_MESSAGES, ENOUGH_BYTES // (max(known) + 1))) if known else _FEW

    def _delivery(self, key: str, entry: Any, attempts: int) -> Delivery:
        fields = _pairs(entry[1])
        return Delivery(self._topics[key].name, fields["k"].decode(), fields["v"], entry[0].decode(), attempts)


def _batches(messages: Sequence[Message]) -> Iterator[list[Message]]:
    batch: list[Message] = []
    num_bytes = 0
    for message in messages:
        if batch and (len(batch) == BATCH_MESSAGES or num_bytes + len(message.value) > BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(message)
        num_bytes += len(message.value)
    if batch:
        yield batch


def _is_enough(deliveries: Sequence[Delivery]) -> bool:
    return sum(len(delivery.value) for delivery in deliveries) >= ENOUGH_BYTES


def _pairs(flat: Sequence[Any]) -> dict[str, Any]:
    """Name, value, name, value ... as a dictionary."""
    return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}
