"""How messages are made: who sends them, claims for what is large, a signature, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from esper.oona import envelope as wire
from esper.oona.bus import Message
from esper.oona.claims import Claims
from esper.oona.envelope import ARRAYS, JSON, Envelope
from esper.oona.schemas import HEALTH_SCHEMA, OBSERVATION_SCHEMA
from esper.oona.signing import Keyring


@dataclass(frozen=True, kw_only=True)
class Sender:
    """One job of one run, or a controller.

    Parameters
    ----------
    source:
        Who it is, e.g. ``esper/kasmina``.
    run, subject:
        The run and the job in it; both empty for somebody who speaks for no run.
    keyring:
        Signs everything; ``None``: nothing is signed.
    claims:
        Where large data go; ``None``: what is too large for the bus cannot be sent.
    """

    source: str
    run: str = ""
    subject: str = ""
    keyring: Keyring | None = None
    claims: Claims | None = None

    def envelope(
        self,
        schema: str,
        data: bytes,
        *,
        kind: str | None = None,
        subject: str | None = None,
        expires: str | None = None,
        extensions: Mapping[str, str] | None = None,
        id: str | None = None,
        time: str | None = None,
    ) -> Envelope:
        """A message of this sender about ``data`` of a schema; ``kind`` says more than the schema's name does."""
        name = schema.split(":")[1]
        return Envelope(
            id=id or wire.fresh_id(),
            source=self.source,
            type=f"esper.{name}" if kind is None else f"esper.{name}.{kind}",
            dataschema=schema,
            time=time or wire.now(),
            subject=self.subject if subject is None else subject,
            datacontenttype=ARRAYS if schema in (HEALTH_SCHEMA, OBSERVATION_SCHEMA) else JSON,
            esperrun=self.run,
            esperexpires=expires,
            extensions=dict(extensions or {}),
            data=data,
        )

    async def message(self, envelope: Envelope) -> Message:
        """The message as the bus takes it; its data in the claim store where they are large.

        Raises
        ------
        EnvelopeError
            It is too large.
        BusError
            The claim store cannot be reached.
        """
        envelope = msgspec.structs.replace(envelope, esperkeyid=None, espersignature=None)
        if self.claims is not None:
            signature_bytes = 0 if self.keyring is None else self.keyring.signature_bytes
            envelope = await self.claims.check_in(envelope, signature_bytes)
        if self.keyring is not None:
            envelope = self.keyring.sign(envelope)
        return Message(key=f"{envelope.esperrun}/{envelope.subject}", value=wire.encode(envelope))
