"""Where partitions end. Blocking."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition

Partition = tuple[str, int]


def ends(
    settings: Mapping[str, Any], group: str, partitions: Sequence[TopicPartition], limit_s: float
) -> dict[Partition, int]:
    """The offset after the last message of each partition, as a reader meets it.

    A broker that is asked for it may count the last batch as one message (tansu does), so this reads on from where the
    broker says that the end is.

    Raises
    ------
    KafkaException
        The broker does not answer in time.
    """
    consumer = Consumer({
        **settings, "group.id": group, "enable.auto.commit": False, "enable.partition.eof": True,
        # An empty answer comes at once.
        "fetch.wait.max.ms": 5,
    })  # fmt: skip
    found: dict[Partition, int] = {}
    end = time.monotonic() + limit_s
    try:
        consumer.assign([TopicPartition(p.topic, p.partition, OFFSET_END) for p in partitions])
        while len(found) < len(partitions):
            message = consumer.poll(max(0.0, end - time.monotonic()))
            if message is None:
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"no end of a partition in {limit_s:.3g} s"))
            error = message.error()
            if error is None:
                continue
            if error.code() != KafkaError._PARTITION_EOF:
                raise KafkaException(error)
            found[str(message.topic()), int(message.partition() or 0)] = int(message.offset() or 0)
        return found
    finally:
        consumer.close()
