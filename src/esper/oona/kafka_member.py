"""One member of a Kafka group: what it was given, what it has handed out, how far the group is done.

Blocking, for one thread at a time; ``kafka`` runs it beside the event loop. Kafka knows one offset a partition, so what
is committed is the first message that is not acknowledged, and what lies unacknowledged is handed out again from here.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from esper.errors import BusError
from esper.oona.bus import Begin, Delivery
from esper.oona.kafka_offsets import Partition, ends
from esper.oona.topics import Topic

_MOVING = (KafkaError.REBALANCE_IN_PROGRESS, KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID)
_SLICE_S = 0.1
_COMMIT_SLICE_S = 0.005
_LONGEST_SESSION_MS = 10_000
"""A member whose process died is noticed after so long, or after ``redeliver_s`` if that is shorter."""
_PREFETCH_KIB = 16 << 10
_ENOUGH_BYTES = 8 << 20
"""Of messages that were fetched and not handed out: beyond it no more are taken than have to be."""
_PAUSE_S = 0.001


@dataclass
class _Handed:
    delivery: Delivery
    until: float
    """When it may be handed out again."""


class Member:
    """A consumer of librdkafka and its bookkeeping.

    Parameters
    ----------
    settings:
        librdkafka's, for the connection.
    topics:
        By their names at the broker.
    prepare:
        Makes sure that a topic exists and gives its number of partitions.
    say:
        An error of librdkafka as one of ours.
    timeout_s:
        What the broker has to answer in.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        topics: Mapping[str, Topic],
        *,
        group: str,
        redeliver_s: float,
        timeout_s: float,
        prepare: Callable[[Topic], int],
        say: Callable[[KafkaError], BusError],
    ) -> None:
        session_ms = min(_LONGEST_SESSION_MS, max(1000, round(1000 * redeliver_s)))
        self._settings = {
            **settings,
            "group.id": group,
            "enable.auto.commit": False,
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": session_ms,
            "heartbeat.interval.ms": session_ms // 4,
            "max.poll.interval.ms": max(session_ms, round(1000 * redeliver_s)),
            "topic.metadata.refresh.interval.ms": 5000,
            "queued.max.messages.kbytes": _PREFETCH_KIB,
            "on_commit": self._on_commit,
            "error_cb": self._on_error,
        }
        self._group = group
        self._topics, self._redeliver_s, self._timeout_s = topics, redeliver_s, timeout_s
        self._prepare, self._say = prepare, say
        self._consumer: Consumer | None = None
        self._fresh: deque[Any] = deque()
        self._num_fresh_bytes = 0
        self._handed: dict[Partition, dict[int, _Handed]] = {}
        self._next: dict[Partition, int] = {}
        """The offset after the last message handed out."""
        self._committed: dict[Partition, int] = {}
        self._commit_reply: tuple[KafkaError | None, dict[Partition, int]] | None = None
        self._has_lost_touch = False
        self._has_entered = self._is_placed = False
        """Whether the group was asked to take it in, and whether it has said which partitions are its own."""
        self.is_leaving = False
        """Set from another thread: do not wait any longer."""

    def join(self, begin: Begin) -> None:
        """Get ready to enter the group, which the first :meth:`take` does; where it is new, pin where it begins, so
        that nothing published from now on is missed."""
        partitions = [
            TopicPartition(name, number)
            for name, topic in self._topics.items()
            for number in range(self._prepare(topic))
        ]
        is_pinned = self._pin(partitions, begin)
        reset = "latest" if begin == "newest" and not is_pinned else "earliest"
        self._consumer = Consumer({**self._settings, "auto.offset.reset": reset})
        self._has_entered = self._is_placed = False

    def _enter(self) -> None:
        assert self._consumer is not None
        self._has_entered = True
        self._consumer.subscribe(
            list(self._topics), on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke
        )

    def take(self, most: int, wait_s: float) -> list[Delivery]:
        """What has been lying too long, else what is new; empty if none came in ``wait_s`` seconds."""
        end = time.monotonic() + wait_s
        if self._consumer is None:
            self.join("oldest")
        if not self._has_entered:
            self._enter()
        while True:
            self._check_touch()
            taken = self._due(most) or self._hand_out(most)
            if taken or self.is_leaving:
                return taken
            self._fill(most, max(0.0, min(end - time.monotonic(), _SLICE_S)))
            if not self._fresh and time.monotonic() >= end:
                return self._due(most)

    def acknowledge(self, deliveries: Sequence[Delivery], names: Mapping[str, str]) -> None:
        """Commit what is now done from the front of each partition; ``names`` are the topics' names at the broker."""
        done: dict[Partition, set[int]] = {}
        for delivery in deliveries:
            number, _, offset = delivery.position.partition(":")
            done.setdefault((names[delivery.topic], int(number)), set()).add(int(offset))
        offsets: dict[Partition, int] = {}
        for partition, acknowledged in done.items():
            # What was taken away from this member is no longer its to acknowledge; the next one will.
            if partition in self._handed:
                left = [offset for offset in self._handed[partition] if offset not in acknowledged]
                first = min(left, default=self._next[partition])
                if first > self._committed.get(partition, -1):
                    offsets[partition] = first
        if offsets:
            self._commit(offsets)
        for partition, acknowledged in done.items():
            for offset in acknowledged:
                self._handed.get(partition, {}).pop(offset, None)

    def close(self) -> None:
        """Leave the group."""
        consumer, self._consumer = self._consumer, None
        is_entering = self._has_entered and not self._is_placed and not self._has_lost_touch
        self._forget_all()
        if consumer is not None:
            # While the group is making up its mind librdkafka's close can wait for ever, and the group then waits for a
            # member that is not there: hence the answer is awaited first, and the limit.
            end = time.monotonic() + self._timeout_s
            while is_entering and not self._is_placed and not self._has_lost_touch and time.monotonic() < end:
                consumer.poll(_SLICE_S)
            consumer.poll(0)
            closing = threading.Thread(target=consumer.close, daemon=True)
            closing.start()
            closing.join(self._timeout_s)

    # ------------------------------------------------------------------------------------------------------------------

    def _fill(self, most: int, wait_s: float) -> None:
        """Move what has arrived to ``_fresh``; serves librdkafka's callbacks."""
        assert self._consumer is not None
        first = self._consumer.poll(wait_s)
        if first is None:
            return
        # `consume` would wait for all of `most`, hence without waiting.
        for message in (first, *self._consumer.consume(max(1, most - 1), 0)):
            self._keep(message)

    def _serve(self) -> None:
        """Serve librdkafka's callbacks. Messages come along; while a backlog waits, more in the time of a commit than
        are handed out between two of them, so they are taken one by one once there are enough."""
        assert self._consumer is not None
        if self._num_fresh_bytes < _ENOUGH_BYTES:
            self._fill(100, _COMMIT_SLICE_S)
        else:
            self._keep(self._consumer.poll(0))
            time.sleep(_PAUSE_S)

    def _keep(self, message: Any) -> None:
        if message is None:
            return
        error = message.error()
        if error is None:
            self._fresh.append(message)
            self._num_fresh_bytes += len(message)
        elif error.code() != KafkaError._MAX_POLL_EXCEEDED:
            self.close()
            raise self._say(error)

    def _hand_out(self, most: int) -> list[Delivery]:
        until = time.monotonic() + self._redeliver_s
        taken: list[Delivery] = []
        while self._fresh and len(taken) < most:
            message = self._fresh.popleft()
            self._num_fresh_bytes -= len(message)
            partition = (message.topic(), message.partition())
            delivery = Delivery(
                self._topics[partition[0]].name,
                (message.key() or b"").decode(),
                message.value() or b"",
                f"{partition[1]}:{message.offset()}",
            )
            self._handed.setdefault(partition, {})[message.offset()] = _Handed(delivery, until)
            self._next[partition] = message.offset() + 1
            taken.append(delivery)
        return taken

    def _due(self, most: int) -> list[Delivery]:
        now = time.monotonic()
        lying = [h for handed in self._handed.values() for h in handed.values() if h.until <= now][:most]
        for handed in lying:
            handed.until = now + self._redeliver_s
            handed.delivery = replace(handed.delivery, attempts=handed.delivery.attempts + 1)
        return [handed.delivery for handed in lying]

    def _commit(self, offsets: dict[Partition, int]) -> None:
        """Commit and wait for the answer: librdkafka's own waiting has no limit."""
        assert self._consumer is not None
        end = time.monotonic() + self._timeout_s
        while True:
            self._commit_reply = None
            try:
                self._consumer.commit(
                    offsets=[TopicPartition(*partition, offset) for partition, offset in offsets.items()],
                    asynchronous=True,
                )
                error = self._commit_answer(offsets, end)
            except KafkaException as raised:
                error = raised.args[0]
            if error is None:
                self._committed |= offsets
                return
            # Members come or go. Polling ends it; what is then no longer this member's goes to another.
            if error.code() not in _MOVING or time.monotonic() >= end:
                raise self._say(error)
            self._fill(100, _SLICE_S)
            offsets = {partition: offset for partition, offset in offsets.items() if partition in self._handed}
            if not offsets:
                return

    def _commit_answer(self, offsets: dict[Partition, int], end: float) -> KafkaError | None:
        while time.monotonic() < end:
            self._serve()
            if self._commit_reply is not None:
                error, answered = self._commit_reply
                # The answer to an earlier one that was given up may come late.
                if error is not None or answered == offsets:
                    return error
                self._commit_reply = None
        return KafkaError(KafkaError._TIMED_OUT, f"no answer in {self._timeout_s:.3g} s")

    def _pin(self, partitions: list[TopicPartition], begin: Begin) -> bool:
        """Commit where a new group begins. False if the group is at work and has no offset there."""
        plain = {k: v for k, v in self._settings.items() if k not in ("on_commit", "error_cb")}
        consumer = Consumer({**plain, "error_cb": _ignore})
        try:
            missing = [p for p in consumer.committed(partitions, timeout=self._timeout_s) if p.offset < 0]
            last: dict[Partition, int] = {}
            if missing and begin == "newest":
                last = ends(self._settings | {"error_cb": _ignore}, self._group, missing, self._timeout_s)
            for partition in missing:
                low, _ = consumer.get_watermark_offsets(partition, timeout=self._timeout_s, cached=False)
                partition.offset = low if begin == "oldest" else last[partition.topic, partition.partition]
            if missing:
                # Only a group without members can be committed for from outside; others have been pinned already.
                consumer.commit(offsets=missing, asynchronous=False)
        except KafkaException as raised:
            error: KafkaError = raised.args[0]
            if error.code() not in (KafkaError.UNKNOWN_MEMBER_ID, KafkaError.ILLEGAL_GENERATION):
                raise self._say(error) from None
            return False
        finally:
            consumer.close()
        return True

    def _check_touch(self) -> None:
        """After all brokers were out of reach: are they still? One that has lost the group tells its next heartbeat."""
        if self._has_lost_touch:
            assert self._consumer is not None
            try:
                self._consumer.list_topics(timeout=self._timeout_s)
            except KafkaException as raised:
                raise self._say(raised.args[0]) from None
            self._has_lost_touch = False

    def _forget_all(self) -> None:
        self._fresh.clear()
        self._num_fresh_bytes = 0
        self._handed.clear()
        self._next.clear()
        self._has_lost_touch = False

    def _on_assign(self, _: Any, partitions: list[TopicPartition]) -> None:
        del partitions
        self._is_placed = True

    def _on_revoke(self, _: Any, partitions: list[TopicPartition]) -> None:
        gone = {(p.topic, p.partition) for p in partitions}
        self._fresh = deque(m for m in self._fresh if (m.topic(), m.partition()) not in gone)
        self._num_fresh_bytes = sum(len(m) for m in self._fresh)
        for partition in gone:
            self._handed.pop(partition, None)
            self._next.pop(partition, None)
            self._committed.pop(partition, None)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        failed = next((p.error for p in partitions if p.error is not None), None)
        self._commit_reply = (error or failed, {(p.topic, p.partition): p.offset for p in partitions})

    def _on_error(self, error: KafkaError) -> None:
        if error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._AUTHENTICATION):
            self._has_lost_touch = True


def _ignore(_: KafkaError) -> None:
    """What goes wrong is seen where it is waited for."""
