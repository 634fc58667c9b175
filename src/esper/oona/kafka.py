"""The bus over Kafka: keys as they are, groups as they are, an offset committed once all before it is acknowledged.

Two things differ from other brokers. Kafka hands a message to nobody else while its member is alive: ``redeliver_s``
means that the member itself is given it again, that a member which does not call ``receive`` for so long is put out of
the group, and that one whose process died is after at most ten seconds; then its messages go to the others. And a
broker lets go of messages by age and size, whoever has read them: topics are made here with no limit where durable,
with an hour and 64 MiB a partition where not; one that exists already stays as it is.

librdkafka's plain clients run in threads of their own. The package's asyncio clients were not taken: a cancelled
``consume`` there loses what it had already fetched, and its commits wait without a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from esper.errors import BusError
from esper.oona.address import Address
from esper.oona.bus import Begin, Delivery, Message
from esper.oona.kafka_member import Member
from esper.oona.kafka_offsets import ends
from esper.oona.topics import Topic

PARTITIONS = 4
"""Of a topic that is made here: so many members of a group can share it."""
_LARGEST_BYTES = 4 << 20
_SHORTEST_TIMEOUT_S = 1.0
"""librdkafka looks at its time limits once a second."""
_NEW_PRODUCER_S = 1.0
"""A new producer asks for its id at once, and when it is not connected yet half a second later."""
_DURABLE = {"retention.ms": "-1", "retention.bytes": "-1"}
_LOSSY = {"retention.ms": "3600000", "retention.bytes": str(64 << 20)}

_logger = logging.getLogger("esper.oona.kafka")

_T = TypeVar("_T")


class KafkaBus:
    """A connection to Kafka. For one event loop; one thread publishes, one more receives for each subscription."""

    is_remote = True

    def __init__(self, address: Address) -> None:
        self.address = str(address)
        self._where = replace(address, timeout_s=max(address.timeout_s, _SHORTEST_TIMEOUT_S))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="esper-kafka")
        self._settings = _settings(self._where)
        self._producer: Producer | None = None
        self._admin: AdminClient | None = None
        self._partitions: dict[str, int] = {}
        self._subscriptions: list[_KafkaSubscription] = []
        self._is_closed = False

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        await self._run(self._publish, topic, messages)

    async def subscribe(
        self,
        topics: Sequence[Topic],
        *,
        group: str,
        consumer: str,
        begin: Begin = "oldest",
        redeliver_s: float = 30.0,
    ) -> _KafkaSubscription:
        names = {topic.name: self._where.prefix + topic.name for topic in topics}
        member = Member(
            {**self._settings, "client.id": consumer},
            {names[topic.name]: topic for topic in topics},
            group=self._where.prefix + group,
            redeliver_s=redeliver_s,
            timeout_s=self._where.timeout_s,
            prepare=self._prepare,
            say=self._say,
        )
        await self._run(member.join, begin)
        subscription = _KafkaSubscription(member, names)
        self._subscriptions = [s for s in self._subscriptions if not s.is_closed] + [subscription]
        return subscription

    async def backlog(self, topic: Topic, group: str) -> int:
        return await self._run(self._backlog, topic, group)

    async def forget(self, topics: Sequence[Topic], group: str) -> None:
        await self._run(self._forget, group)

    async def close(self) -> None:
        if self._is_closed:
            return
        await asyncio.gather(*(subscription.close() for subscription in self._subscriptions))
        await self._run(self._drop)
        self._is_closed = True
        self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[..., _T], *args: Any) -> _T:
        if self._is_closed:
            raise BusError(f"{self.address} is used while open, got a closed bus; open it anew")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # ------------------------------------------------------------------------------------------------------------------
    # In the thread

    def _publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        """Hand over and wait for every answer; without one for ``timeout_s`` all of it is given up."""
        self._prepare(topic)
        end = time.monotonic() + self._where.timeout_s
        if self._producer is None:
            self._producer = Producer(self._settings | _PRODUCER)
            end += _NEW_PRODUCER_S
        producer, name = self._producer, self._where.prefix + topic.name
        failures: list[KafkaError] = []
        num_answers = 0

        def on_delivery(error: KafkaError | None, _: Any) -> None:
            nonlocal num_answers
            num_answers += 1
            if error is not None:
                failures.append(error)

        seen = num_sent = 0
        try:
            while num_answers < len(messages) and not failures:
                num_sent += _produce(producer, name, messages[num_sent:], on_delivery)
                producer.poll(0.005)
                if num_answers > seen:
                    end, seen = time.monotonic() + self._where.timeout_s, num_answers
                elif time.monotonic() >= end:
                    failures.append(KafkaError(KafkaError._TIMED_OUT, f"no answer in {self._where.timeout_s:.3g} s"))
        except KafkaException as raised:
            failures.append(raised.args[0])
        if failures:
            # What is still on its way must not arrive behind what is sent anew.
            self._drop()
            self._partitions.clear()
            raise self._say(failures[0])

    def _drop(self) -> None:
        producer, self._producer, self._admin = self._producer, None, None
        if producer is not None:
            # What is thrown away here leaves a gap, which it says once more.
            with contextlib.suppress(KafkaException):
                producer.purge(in_queue=True, in_flight=True, blocking=False)
                producer.flush(0.1)

    def _prepare(self, topic: Topic) -> int:
        """Make sure of the topic; how many partitions it has."""
        name = self._where.prefix + topic.name
        known = self._partitions.get(name)
        if known is None:
            # A name of its own: a member that joins anew comes here from its own thread, and _drop may come between.
            admin = self._admin = self._admin or AdminClient(self._settings)
            limit_s = self._where.timeout_s
            try:
                there = admin.list_topics(timeout=limit_s).topics
                if name not in there:
                    self._create(admin, name, topic)
                    there = admin.list_topics(name, timeout=limit_s).topics
            except KafkaException as raised:
                raise self._say(raised.args[0]) from None
            if name not in there or there[name].error is not None or not there[name].partitions:
                raise BusError(
                    f"{self.address} must have the topic {name}, got none and may not make it; "
                    f"make it with {PARTITIONS} partitions, or allow this user to"
                )
            known = self._partitions[name] = len(there[name].partitions)
        return known

    def _create(self, admin: AdminClient, name: str, topic: Topic) -> None:
        config = {**(_DURABLE if topic.durable else _LOSSY), "max.message.bytes": str(_LARGEST_BYTES)}
        wanted = NewTopic(name, num_partitions=PARTITIONS, replication_factor=-1, config=config)
        made = admin.create_topics([wanted], request_timeout=self._where.timeout_s / 2)[name]
        # It may exist by now, or the broker may make it when asked for: that is looked at next.
        with contextlib.suppress(KafkaException, TimeoutError):
            made.result(self._where.timeout_s)

    def _backlog(self, topic: Topic, group: str) -> int:
        name, limit_s = self._where.prefix + topic.name, self._where.timeout_s
        consumer = Consumer({**self._settings, "group.id": self._where.prefix + group})
        try:
            partitions = [TopicPartition(name, number) for number in range(self._prepare(topic))]
            committed = consumer.committed(partitions, timeout=limit_s)
            if all(partition.offset < 0 for partition in committed):
                raise BusError(f"{topic.name} has no group {group!r}; subscribe first")
            last = ends(self._settings, self._where.prefix + group, partitions, limit_s)
            behind = 0
            for partition in committed:
                low, _ = consumer.get_watermark_offsets(partition, timeout=limit_s, cached=False)
                behind += last[partition.topic, partition.partition] - max(low, partition.offset)
            return behind
        except KafkaException as raised:
            raise self._say(raised.args[0]) from None
        finally:
            consumer.close()

    def _forget(self, group: str) -> None:
        if self._admin is None:
            self._admin = AdminClient(self._settings)
        name = self._where.prefix + group
        try:
            gone = self._admin.delete_consumer_groups([name], request_timeout=self._where.timeout_s)[name]
            gone.result(self._where.timeout_s)
        except KafkaException as raised:
            error: KafkaError = raised.args[0]
            if error.code() != KafkaError.GROUP_ID_NOT_FOUND:
                raise self._say(error) from None

    def _say(self, error: KafkaError) -> BusError:
        hint = "is it up, is it the right one?"
        if error.code() == KafkaError.INVALID_SESSION_TIMEOUT:
            hint = "it minds short sessions; ask for a redeliver_s of at least 6 s"
        # Without the cause: its text may quote what is secret.
        reason = self._where.credentials.hide(f"{error.name()}: {error.str()}")
        return BusError(f"{self.address} must answer and take what it is given, got {reason}; {hint}")


class _KafkaSubscription:
    """A member in a thread of its own. What it fetched for a cancelled ``receive`` waits for the next."""

    def __init__(self, member: Member, names: dict[str, str]) -> None:
        self._member, self._names = member, names
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="esper-kafka-member")
        self._unseen: list[Delivery] = []
        self.is_closed = False

    async def receive(self, most: int = 100, wait_s: float = 1.0) -> list[Delivery]:
        if self.is_closed:
            raise BusError("a subscription receives while open, got a closed one; subscribe anew")
        await asyncio.get_running_loop().run_in_executor(self._thread, self._take, most, wait_s)
        taken, self._unseen = self._unseen[:most], self._unseen[most:]
        return taken

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        if self.is_closed:
            raise BusError("a subscription acknowledges while open, got a closed one; they come again to the group")
        work = self._member.acknowledge
        await asyncio.get_running_loop().run_in_executor(self._thread, work, list(deliveries), self._names)

    async def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._member.is_leaving = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._member.close)
            self._thread.shutdown(wait=False)

    def _take(self, most: int, wait_s: float) -> None:
        if not self._unseen:
            self._unseen += self._member.take(most, wait_s)


_PRODUCER: dict[str, Any] = {
    "acks": "all",
    "enable.idempotence": True,
    # No message of a batch is given up and a later one delivered.
    "enable.gapless.guarantee": True,
    "message.timeout.ms": 0,
    "message.max.bytes": _LARGEST_BYTES,
    "batch.size": 1 << 20,
    "linger.ms": 1,
    # Java's default, so that all languages put a key in the same partition.
    "partitioner": "murmur2_random",
}


def _settings(address: Address) -> dict[str, Any]:
    credentials, limit_ms = address.credentials, round(1000 * address.timeout_s)
    layers = ("SASL_" if credentials.password else "") + ("SSL" if address.has_tls else "PLAINTEXT")
    settings = {
        "bootstrap.servers": ",".join(f"{host}:{port}" for host, port in address.hosts),
        "security.protocol": layers,
        "socket.timeout.ms": limit_ms,
        "socket.connection.setup.timeout.ms": limit_ms,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1000,
        # What goes wrong is raised; librdkafka would write it to the terminal as well.
        "log_level": 2,
        "logger": _Quiet(),
        "error_cb": _ignore,
    }
    if credentials.password:
        settings |= {
            "sasl.mechanism": address.sasl,
            "sasl.username": credentials.username,
            "sasl.password": credentials.password,
        }
    if address.has_tls:
        files = {
            "ssl.ca.location": credentials.ca,
            "ssl.certificate.location": credentials.cert,
            "ssl.key.location": credentials.keyfile,
        }
        settings |= {name: path for name, path in files.items() if path}
    return settings


class _Quiet:
    """librdkafka's words, for those who want them."""

    def log(self, _: int, text: str, *words: object) -> None:
        _logger.debug(text, *words)


def _ignore(_: KafkaError) -> None:
    """What goes wrong is seen where it is waited for."""


def _produce(producer: Producer, name: str, messages: Sequence[Message], on_delivery: Callable[..., None]) -> int:
    """How many of ``messages`` librdkafka's queue had room for."""
    for number, message in enumerate(messages):
        try:
            producer.produce(name, key=message.key.encode(), value=message.value, on_delivery=on_delivery)
        except BufferError:
            return number
    return len(messages)
