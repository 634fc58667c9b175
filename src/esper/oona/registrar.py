"""Files the field reports of all runs on a bus.

::

    runs --- report ---> read ---> store ---> acknowledge
                          '------> dead letters (nobody can read it, or nobody vouches for it)

Nothing is acknowledged before it is stored, and stored twice it is there once: a report arrives at least once and
counts once, whoever dies in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence

from esper.errors import BusError, EnvelopeError, StateError
from esper.karn import FieldReport
from esper.oona import envelope as wire
from esper.oona.aside import aside, within
from esper.oona.backoff import Backoff
from esper.oona.bus import Bus, Delivery, Subscription
from esper.oona.claims import ClaimExpired, Claims
from esper.oona.dead_letters import bury
from esper.oona.schemas import decode_payload
from esper.oona.sender import Sender
from esper.oona.signing import Keyring
from esper.oona.topics import FIELD_REPORTS

Store = Callable[[Sequence[FieldReport]], int]
"""Keeps reports, all of them or none, and says how many were new; called in a thread of its own. Raises
``StateError`` where it cannot now."""
CLAIM_WAIT_S = 10.0
_MOST_AT_ONCE = 100
_WAIT_S = 0.5


class Registrar:
    """Reads the field reports of a bus. For one event loop.

    Parameters
    ----------
    group:
        Who it reads for: members of one group share the reports, every group gets all of them.
    consumer:
        This member's name in the group.
    keyring:
        Reports must be signed by one of its keys then; ``None``: anybody's are taken.
    most:
        End after so many reports, those that were known already among them; ``None``: never.
    """

    def __init__(
        self,
        bus: Bus,
        store: Store,
        *,
        group: str,
        consumer: str = "listener",
        keyring: Keyring | None = None,
        claims: Claims | None = None,
        most: int | None = None,
        redeliver_s: float = 30.0,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self._bus, self._store, self._keyring, self._claims = bus, store, keyring, claims
        self.group, self._consumer, self._most, self._redeliver_s = group, consumer, most, redeliver_s
        self._note = on_note or _silent
        self._sender = Sender(source="esper/karn", keyring=keyring, claims=claims)
        self.counts: Counter[str] = Counter()
        """Reports: filed, new (of these), buried."""

    async def serve(self, until: asyncio.Event) -> None:
        """File until ``until`` is set or there were enough; a bus that fails is waited for."""
        backoff = Backoff()
        while not until.is_set() and self._room:
            try:
                await self._serve(until, backoff)
            except BusError as error:
                self._note(f"the bus fails ({error}); trying again")
                await _pause(until, backoff.next_s())

    @property
    def _room(self) -> int:
        """How many reports to ask for."""
        return _MOST_AT_ONCE if self._most is None else min(_MOST_AT_ONCE, self._most - self.counts["filed"])

    async def _serve(self, until: asyncio.Event, backoff: Backoff) -> None:
        subscription = await self._bus.subscribe(
            [FIELD_REPORTS], group=self.group, consumer=self._consumer, begin="oldest", redeliver_s=self._redeliver_s
        )
        try:
            while not until.is_set() and self._room:
                deliveries = await subscription.receive(most=self._room, wait_s=_WAIT_S)
                backoff.reset()
                if deliveries:
                    await self._take(subscription, deliveries, until)
        finally:
            with contextlib.suppress(BusError):  # it is what failed; what is not acknowledged comes again either way
                await subscription.close()

    async def _take(self, subscription: Subscription, deliveries: Sequence[Delivery], until: asyncio.Event) -> None:
        reports: list[FieldReport] = []
        for delivery in deliveries:
            try:
                reports.append(await self._read(delivery))
            except EnvelopeError as error:
                self.counts["buried"] += 1
                self._note(f"a report is for the dead letters: {error}")
                await bury(self._bus, self._sender, delivery, str(error))
        new = await self._stored(reports, until)
        if new is None:  # told to end; all of them come again
            return
        self.counts["new"] += new
        await subscription.acknowledge(deliveries)
        self.counts["filed"] += len(reports)

    async def _read(self, delivery: Delivery) -> FieldReport:
        envelope = wire.decode(delivery.value)
        if self._keyring is not None and not self._keyring.is_signed(envelope):
            raise EnvelopeError("who has a key files signed reports only; give the runs the key")
        if self._claims is not None:
            whole = await within(CLAIM_WAIT_S, self._claims.redeem(envelope), "the claim store")
            if isinstance(whole, ClaimExpired):
                raise EnvelopeError(f"a report must still be where its claim says, got {whole.why}; import the run")
            envelope = whole
        report = decode_payload(envelope)
        if not isinstance(report, FieldReport):
            raise EnvelopeError(f"field reports are filed here, got {type(report).__name__}")
        return report

    async def _stored(self, reports: Sequence[FieldReport], until: asyncio.Event) -> int | None:
        """How many were new; a store that refuses is asked again until it is time to end."""
        backoff, told = Backoff(), ""
        while reports:
            try:
                return await aside(functools.partial(self._store, reports))
            except StateError as error:
                if str(error) != told:
                    self._note(f"{len(reports)} reports wait: {error}")
                told = str(error)
            await _pause(until, backoff.next_s())
            if until.is_set():
                return None
        return 0


async def _pause(until: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(until.wait(), seconds)


def _silent(note: str) -> None:
    """Nobody asked for notes."""
