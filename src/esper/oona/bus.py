"""What a bus is. The backends are in ``memory``, ``redis_streams`` and ``kafka``; one contract suite holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from esper.oona.topics import Topic

Begin = Literal["oldest", "newest"]


@dataclass(frozen=True)
class Message:
    """What is sent. Messages of one ``key`` (a job) keep their order; ``value`` is an encoded envelope."""

    key: str
    value: bytes


@dataclass(frozen=True)
class Delivery:
    """What was received and waits to be acknowledged.

    ``position`` is the broker's own name for the message, ``attempts`` how often it has been handed out to this group,
    1 the first time (a broker that does not count says 1).
    """

    topic: str
    key: str
    value: bytes
    position: str
    attempts: int = 1


class Subscription(Protocol):
    """One member of a group. For one task at a time."""

    async def receive(self, most: int = 100, wait_s: float = 1.0) -> list[Delivery]:
        """Up to ``most`` messages; an empty list when none came in ``wait_s`` seconds.

        What a member of the group has received and not acknowledged within the subscription's ``redeliver_s`` is
        handed out again, to any member.

        Raises
        ------
        BusError
            The broker cannot be reached. Nothing is lost; call again later.
        """
        ...

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """The group is done with these. Until this returns they may come again.

        Raises
        ------
        BusError
            The broker cannot be reached.
        """
        ...

    async def close(self) -> None:
        """Leave the group; what is not acknowledged goes to the others. Closing twice is harmless."""
        ...


class Bus(Protocol):
    """A connection to a broker. For one event loop; connects on first use."""

    @property
    def address(self) -> str:
        """Where it leads, without secrets."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether others than this process can send over it."""
        ...

    async def publish(self, topic: Topic, messages: Sequence[Message]) -> None:
        """Hand messages over, in order. When this returns the broker has taken all of them.

        Raises
        ------
        BusError
            The broker cannot be reached or has no room. Some of the messages may have been taken: send all of them
            again, receivers go by the envelope's id.
        """
        ...

    async def subscribe(
        self,
        topics: Sequence[Topic],
        *,
        group: str,
        consumer: str,
        begin: Begin = "oldest",
        redeliver_s: float = 30.0,
    ) -> Subscription:
        """Become the member ``consumer`` of ``group``: every group gets every message, one of its members each.

        ``begin`` says where a group that is new to the broker starts.

        Raises
        ------
        BusError
            The broker cannot be reached.
        """
        ...

    async def backlog(self, topic: Topic, group: str) -> int:
        """Messages of ``topic`` that ``group`` has not acknowledged.

        Raises
        ------
        BusError
            The broker cannot be reached, or knows no such group.
        """
        ...

    async def close(self) -> None:
        """End the connection. Closing twice is harmless."""
        ...
