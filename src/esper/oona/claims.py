"""Claim checks: what is too large for the bus waits in a store, and the message says which it is.

The message carries a hash, never an address: the receiver looks in the store that its own settings name. Stores are in
``claim_stores``.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import msgspec

from esper.errors import EnvelopeError
from esper.oona import envelope as wire
from esper.oona.aside import aside, within
from esper.oona.envelope import ARRAYS, CLAIM, JSON, Envelope
from esper.oona.patience import patience_for

CLAIM_BYTES = 1 << 20
"""The data of messages above this size go to the store."""
MOST_BYTES = 64 << 20
"""Data above this size are not taken from a store."""
TTL_S = 300.0
MOST_IN_FLIGHT = 4
"""Contents that one process hands to stores at the same time: many at once would make each other late, and each that is
late is sent again."""
PATIENCE_S = 10.0
"""How long a store may take for content of no size."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IN_FLIGHT = threading.BoundedSemaphore(MOST_IN_FLIGHT)
_LOOK_S = 0.01


class ClaimReference(msgspec.Struct, frozen=True, kw_only=True):
    """What a message carries instead of its data."""

    sha256: str
    size: int
    expires: str
    """RFC 3339 in UTC."""
    media_type: str


class ClaimExpired(msgspec.Struct, frozen=True, kw_only=True):
    """The data are not to be had any more; the message says no more than that they were there."""

    sha256: str
    size: int
    expires: str
    why: Literal["expired", "missing"]


class ClaimStore(Protocol):
    """Where content waits, by the hash of what it is. For one event loop."""

    ttl_s: float
    """Seconds that content is kept at least."""

    @property
    def address(self) -> str:
        """Where it is, without secrets."""
        ...

    async def put(self, name: str, data: bytes) -> None:
        """Keep ``data`` for :attr:`ttl_s` from now. Nobody sees a part of it.

        Raises
        ------
        BusError
            The store cannot be reached or has no room.
        """
        ...

    async def get(self, name: str, limit: int) -> bytes | None:
        """The content, or as much as tells that it has more than ``limit`` bytes; ``None`` where there is none.

        Raises
        ------
        BusError
            The store cannot be reached.
        """
        ...

    async def sweep(self) -> int:
        """Remove what is too old, where the store does not do so by itself; returns how many."""
        ...

    async def close(self) -> None:
        """Closing twice is harmless."""
        ...


class Claims:
    """Puts large data into a store and gets them out again.

    Parameters
    ----------
    above:
        Bytes above which a message is sent as a claim: all of it, as it would be on the wire.
    patience_s:
        How long the store may take, beside a second for each MiB.
    clock:
        Unix time.
    """

    def __init__(
        self,
        store: ClaimStore,
        *,
        above: int = CLAIM_BYTES,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self._above, self._patience_s, self._clock = store, above, patience_s, clock

    async def check_in(self, envelope: Envelope, signature_bytes: int = 0) -> Envelope:
        """The message as it is to be sent: itself, or with a claim in the place of its data.

        ``signature_bytes`` is how much longer it will be when it is signed.

        Raises
        ------
        EnvelopeError
            The data are larger than any receiver takes.
        BusError
            The store cannot be reached, or takes too long.
        """
        size = len(envelope.data)
        if envelope.datacontenttype == CLAIM or wire.num_bytes(envelope) + signature_bytes <= self._above:
            return envelope
        if size > MOST_BYTES:
            raise EnvelopeError(f"a claim may stand for {MOST_BYTES} bytes, got {size}; send less at once")
        name = await _hash(envelope.data)
        async with _turn():
            put = self.store.put(name, envelope.data)
            await within(self._patience_s + patience_for(size), put, f"the claim store at {self.store.address}")
        reference = ClaimReference(
            sha256=name, size=size, media_type=envelope.datacontenttype,
            expires=wire.timestamp(self._clock() + self.store.ttl_s),
        )  # fmt: skip
        return msgspec.structs.replace(envelope, datacontenttype=CLAIM, data=wire.write_json(reference))

    async def redeem(self, envelope: Envelope) -> Envelope | ClaimExpired:
        """The message with its data, whether they were sent as a claim or not. Verify its signature before.

        Raises
        ------
        EnvelopeError
            The claim is none, or what the store has is something else.
        BusError
            The store cannot be reached; try again later.
        """
        if envelope.datacontenttype != CLAIM:
            return envelope
        reference = reference_in(envelope)
        gone = ClaimExpired(sha256=reference.sha256, size=reference.size, expires=reference.expires, why="missing")
        data = await self.store.get(reference.sha256, reference.size)
        if data is None:
            is_late = wire.seconds(reference.expires) < self._clock()
            return msgspec.structs.replace(gone, why="expired") if is_late else gone
        if len(data) != reference.size or not hmac.compare_digest(await _hash(data), reference.sha256):
            raise EnvelopeError(
                f"a claim's content must have the size and hash it says, got other content for {reference.sha256[:12]} "
                f"({reference.size} bytes)"
            )
        return msgspec.structs.replace(envelope, datacontenttype=reference.media_type, data=data)


def reference_in(envelope: Envelope) -> ClaimReference:
    """The claim that a message carries, checked.

    Raises
    ------
    EnvelopeError
        It is none.
    """
    reference: ClaimReference = wire.read_json(envelope.data, ClaimReference)
    if not _SHA256.fullmatch(reference.sha256):
        raise EnvelopeError(f"a claim's sha256 must be 64 hexadecimal digits, got {reference.sha256[:80]!r}")
    if not 0 < reference.size <= MOST_BYTES:
        raise EnvelopeError(f"a claim's size must be between 1 and {MOST_BYTES}, got {reference.size}")
    if reference.media_type not in (JSON, ARRAYS):
        raise EnvelopeError(f"a claim's media type must be {JSON} or {ARRAYS}, got {reference.media_type[:80]!r}")
    wire.seconds(reference.expires)
    return reference


@asynccontextmanager
async def _turn() -> AsyncGenerator[None]:
    """Wait until few enough are under way, in whatever threads."""
    while not _IN_FLIGHT.acquire(blocking=False):
        await asyncio.sleep(_LOOK_S)
    try:
        yield
    finally:
        _IN_FLIGHT.release()


async def _hash(data: bytes) -> str:
    """SHA-256 of much data, elsewhere: it takes milliseconds in which the loop would stand still."""
    return await aside(lambda: hashlib.sha256(data).hexdigest())
