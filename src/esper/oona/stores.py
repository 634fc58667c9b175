"""Which claim store goes with a bus: its own Redis, this process's memory, or the one that is named."""

from __future__ import annotations

import os
from collections.abc import Mapping

from esper.oona.address import parse
from esper.oona.claim_stores import MemoryStore, RedisStore, make_store
from esper.oona.claims import Claims, ClaimStore

STORE_VARIABLE = "ESPER_BUS_CLAIMS"
_SHARED: dict[str, MemoryStore] = {}


def open_claims(url: str, environ: Mapping[str, str] | None = None) -> Claims | None:
    """Where large data of the bus at ``url`` go; ``None``: nowhere, and what is too large for it is not sent.

    ``ESPER_BUS_CLAIMS`` names a folder that all share, or a URL that fsspec knows. Otherwise Redis keeps them itself,
    and so does the bus in this process; Kafka has no place for them.

    Raises
    ------
    ConfigError
        The address is not understood, or the store needs something that is missing.
    """
    given = os.environ if environ is None else environ
    address = parse(url, given)
    named = given.get(STORE_VARIABLE)
    store: ClaimStore
    if named:
        store = make_store(named)
    elif address.broker == "redis":
        from esper.oona.redis_connection import RedisConnection

        store = RedisStore(RedisConnection(address), address=str(address), prefix=address.prefix)
    elif address.broker == "memory":
        store = _SHARED.setdefault(str(address), MemoryStore(shared=True))
    else:
        return None
    return Claims(store)
