"""Commands to one Redis server or to a Redis Cluster, each with a time limit and errors without secrets."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from redis import asyncio as aioredis
from redis import exceptions
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from esper.errors import BusError
from esper.oona.address import Address
from esper.oona.patience import patience_for

_RAW = ("XREADGROUP", "XAUTOCLAIM", "XPENDING", "XRANGE")
"""Replies that are read here as the server sends them."""
_FAILURES = (exceptions.RedisError, exceptions.RedisClusterException, OSError)


class GroupGone(Exception):
    """The server does not know the group: it lost its data, or the stream was deleted."""


class RedisConnection:
    """A pool of connections. Nothing is tried twice here: whoever calls knows what may be repeated."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client: Any = None
        self._starting = asyncio.Lock()

    async def call(self, key: str, *command: Any, block_s: float = 0.0) -> Any:
        """The reply to ``command``, which touches ``key`` alone and may block for ``block_s`` seconds.

        Large arguments have more time.

        Raises
        ------
        BusError
            No answer in time, or a refusal.
        GroupGone
            The stream or its group do not exist.
        """
        num_bytes = sum(len(part) for part in command if isinstance(part, bytes))
        limit_s = self._address.timeout_s + block_s + patience_for(num_bytes)
        try:
            async with asyncio.timeout(limit_s):
                client = await self._connected()
                if self._address.is_cluster:
                    # Without a node redis-py asks the server for the keys of each script and read.
                    node = client.get_node_from_key(key)
                    return await client.execute_command(*command, target_nodes=node)
                return await client.execute_command(*command)
        except exceptions.ResponseError as error:
            text = str(error)
            if text.startswith(("NOGROUP", "UNBLOCKED")) or "no such key" in text or "requires the key" in text:
                raise GroupGone from error
            raise self._refused(error) from self._cause(error)
        except (*_FAILURES, TimeoutError) as error:
            raise self._unreachable(error, limit_s) from self._cause(error)

    async def close(self) -> None:
        """End all connections."""
        client, self._client = self._client, None
        if client is not None:
            # A server that is gone cannot be taken leave of.
            with contextlib.suppress(*_FAILURES, TimeoutError):
                async with asyncio.timeout(self._address.timeout_s):
                    await client.aclose()

    async def _connected(self) -> Any:
        async with self._starting:
            if self._client is None:
                self._client = self._make()
            if self._address.is_cluster:
                # Only the first time, and after a node was lost.
                await self._client.initialize()
            return self._client

    def _make(self) -> Any:
        address, credentials = self._address, self._address.credentials
        settings: dict[str, Any] = {
            "username": credentials.username or None,
            "password": credentials.password or None,
            "socket_connect_timeout": address.timeout_s,
            # `call` has the limit; the socket's own would cut blocking reads short.
            "socket_timeout": None,
            "retry": Retry(NoBackoff(), 0),
            # Version 3 would give dictionaries where lists are read here.
            "protocol": 2,
        }
        if address.has_tls:
            settings |= {
                "ssl": True,
                "ssl_ca_certs": credentials.ca or None,
                "ssl_certfile": credentials.cert or None,
                "ssl_keyfile": credentials.keyfile or None,
            }
        hosts = [(host.strip("[]"), port) for host, port in address.hosts]
        if address.is_cluster:
            client = RedisCluster(startup_nodes=[ClusterNode(*host) for host in hosts], **settings)
        else:
            client = aioredis.Redis(host=hosts[0][0], port=hosts[0][1], db=address.database, **settings)
        for command in _RAW:
            client.response_callbacks.pop(command, None)
        return client

    def _refused(self, error: Exception) -> BusError:
        return BusError(f"{self._address} must take what it is given, got {self._hidden(error)}; see the server's log")

    def _unreachable(self, error: Exception, limit_s: float) -> BusError:
        # asyncio's own limit has no text.
        reason = self._hidden(error) or f"no answer in {limit_s:.3g} s"
        return BusError(
            f"{self._address} must answer, got {type(error).__name__} ({reason}); is it up, is it the right one?"
        )

    def _hidden(self, error: Exception) -> str:
        return self._address.credentials.hide(str(error))

    def _cause(self, error: Exception) -> Exception | None:
        """The error itself, unless its text holds what is secret."""
        return error if self._hidden(error) == str(error) else None
