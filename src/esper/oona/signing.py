"""Who may say something: HMAC-SHA256 over all of a message, keys with names, a window of time, ids seen before.

The signature covers every attribute but itself, as JSON with sorted keys and nothing but ASCII, and the data. A key
belongs to one issuer, or to all who share it; an order that it signs names that issuer. Keys are never shown: not in a
``repr``, not in an error.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import json
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from esper.errors import ConfigError, EnvelopeError
from esper.oona import envelope as wire
from esper.oona.envelope import Envelope
from esper.protocol import ORDER_SCHEMA

KEY_VARIABLE = "ESPER_BUS_KEY"
KEY_FILE_VARIABLE = "ESPER_BUS_KEY_FILE"
MIN_SECRET_CHARS = 32
MAX_FILE_BYTES = 64 << 10
WINDOW_S = 60.0
"""How far a message's time may be from the receiver's clock, before or after: age and skew together."""
MAX_SEEN = 200_000
SHARED = "*"
"""The issuer of a key that several share: any."""
_ORDERS = ORDER_SCHEMA.rpartition(":")[0] + ":"
_ENTRY = re.compile(r"([A-Za-z0-9._-]{1,64})(?:@([A-Za-z0-9._-]{1,64}|\*))?:(\S+)")


class Keyring:
    """Keys by name: one signs, all are accepted.

    To change a key put the new one behind the old one everywhere, then in front of it, then take the old one away.

    Parameters
    ----------
    keys:
        Secret text by name; the first one signs.
    issuers:
        Whose each key is, by its name; one that is left out is everybody's who has it.

    Raises
    ------
    ConfigError
        There is no key, or one that is too short. The message does not show it.
    """

    def __init__(self, keys: Mapping[str, str], issuers: Mapping[str, str] | None = None) -> None:
        short = [name for name, secret in keys.items() if len(secret) < MIN_SECRET_CHARS]
        if not keys or short:
            raise ConfigError(
                f"a bus key must have at least {MIN_SECRET_CHARS} characters, got "
                f"{f'fewer for key {short[0]!r}' if short else 'no key'}; make one with: openssl rand -hex 32"
            )
        self._keys = {name: secret.encode() for name, secret in keys.items()}
        self._issuers = {name: issuer for name, issuer in (issuers or {}).items() if issuer != SHARED}
        self.signing_id = next(iter(keys))

    @classmethod
    def of(cls, text: str) -> Keyring:
        """Keys from text, several parted by space, comma or newline.

        ``NAME:SECRET`` is the key of the issuer NAME, ``NAME@ISSUER:SECRET`` one of ISSUER's, ``NAME@*:SECRET`` one
        that all share who have it. A lone secret is shared, and called ``default``.

        Raises
        ------
        ConfigError
            The text has another form. The message does not show it.
        """
        parts = [part for part in re.split(r"[\s,]+", text) if part]
        if len(parts) == 1 and ":" not in parts[0]:
            return cls({"default": parts[0]})
        found: dict[str, str] = {}
        issuers: dict[str, str] = {}
        for number, part in enumerate(parts, start=1):
            match = _ENTRY.fullmatch(part)
            if match is None or match[1] in found:
                raise ConfigError(
                    f"bus keys are NAME:SECRET or NAME@ISSUER:SECRET with names of letters, digits, '.', '_' and '-', "
                    f"each once, got entry {number} of another form; give each key a name of its own"
                )
            found[match[1]], issuers[match[1]] = match[3], match[2] or match[1]
        return cls(found, issuers)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Keyring | None:
        """Keys from ``ESPER_BUS_KEY``, or from the file that ``ESPER_BUS_KEY_FILE`` names; ``None`` without both.

        Raises
        ------
        ConfigError
            Both are set, or what is set cannot be used.
        """
        given = os.environ if environment is None else environment
        text, path = given.get(KEY_VARIABLE), given.get(KEY_FILE_VARIABLE)
        if text and path:
            raise ConfigError(f"bus keys come from one place, got {KEY_VARIABLE} and {KEY_FILE_VARIABLE}; unset one")
        if path:
            text = _read(Path(path))
        return cls.of(text) if text else None

    @property
    def ids(self) -> tuple[str, ...]:
        """Names of the keys, the one that signs first."""
        return tuple(self._keys)

    def issuer_of(self, key_id: str | None) -> str | None:
        """Whose a key is; ``None``: everybody's who has it."""
        return self._issuers.get(key_id or "")

    def issuer(self, named: str | None, otherwise: str) -> str:
        """Who gives the orders that this ring signs: whose the key is, or else who is named.

        Raises
        ------
        ConfigError
            Somebody else is named.
        """
        owner = self.issuer_of(self.signing_id)
        if owner is not None and named not in (None, owner):
            raise ConfigError(
                f"an order's issuer must be {owner!r}, whose key {self.signing_id!r} signs it, got {named!r}; leave it "
                "out, or sign with another key"
            )
        return owner or named or otherwise

    def sign(self, envelope: Envelope) -> Envelope:
        """The message with key id and signature."""
        named = msgspec.structs.replace(envelope, esperkeyid=self.signing_id, espersignature=None)
        return msgspec.structs.replace(named, espersignature=_mac(self._keys[self.signing_id], named))

    @property
    def signature_bytes(self) -> int:
        """How much longer a message is when it is signed."""
        return len(f',"esperkeyid":"{self.signing_id}","espersignature":""') + 2 * hashlib.sha256().digest_size

    def is_signed(self, envelope: Envelope) -> bool:
        """Whether the signature is that of one of the keys; takes as long whether it nearly fits or not at all."""
        key = self._keys.get(envelope.esperkeyid or "")
        signature = (envelope.espersignature or "").encode("utf-8", "surrogatepass")
        expected = _mac(key or bytes(32), msgspec.structs.replace(envelope, espersignature=None)).encode()
        return hmac.compare_digest(expected, signature) and key is not None

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self.ids)})"


class Flaw(enum.StrEnum):
    """Why a message is not acted on."""

    UNSIGNED = "unsigned"
    FORGED = "forged"
    """The key is unknown or the signature does not fit."""
    IMPERSONATED = "impersonated"
    """The order names an issuer whose key it is not."""
    STALE = "stale"
    EXPIRED = "expired"
    REPEATED = "repeated"
    """This very message was accepted before: a redelivery or a replay. Whoever knows its outcome may tell it again."""
    REUSED = "reused"
    """Another message with this id was accepted before."""
    CROWDED = "crowded"
    """More messages in the window than can be remembered."""


@dataclass(frozen=True)
class Reason:
    """What is wrong, and a sentence for people."""

    flaw: Flaw
    text: str

    @property
    def is_authentic(self) -> bool:
        """Whether a holder of a key has sent it, although it comes too late or again."""
        return self.flaw not in (Flaw.UNSIGNED, Flaw.FORGED, Flaw.IMPERSONATED)

    def __str__(self) -> str:
        return self.text


class Verifier:
    """Accepts each message once, and only fresh. For one thread.

    Ids are remembered as long as their messages are fresh and forgotten when the process ends; what must not happen
    twice after that goes by its own journal.

    Parameters
    ----------
    window_s:
        How far a message's time may lie before or after the receiver's. A sender's clock that is wrong by some seconds
        costs as much of the time a message may spend on its way.
    max_seen:
        Ids remembered at once. Where that is not enough messages are refused, not forgotten.
    clock:
        Unix time.
    """

    def __init__(
        self,
        keyring: Keyring,
        *,
        window_s: float = WINDOW_S,
        max_seen: int = MAX_SEEN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not 0 < window_s < float("inf") or max_seen < 1:
            raise ConfigError(f"a window needs seconds and room above 0, got window_s={window_s}, max_seen={max_seen}")
        self._keyring, self._window_s, self._max_seen, self._clock = keyring, window_s, max_seen, clock
        self._seen: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        """By hash, so that a long id takes no more room: until when, and the signature's hash."""

    @property
    def num_seen(self) -> int:
        """Ids remembered now."""
        return len(self._seen)

    def check(self, envelope: Envelope) -> Reason | None:
        """``None`` where the message may be acted on; it is remembered then."""
        if envelope.espersignature is None or envelope.esperkeyid is None:
            return Reason(Flaw.UNSIGNED, "a message must be signed here; set ESPER_BUS_KEY where it is sent")
        if not self._keyring.is_signed(envelope):
            return Reason(
                Flaw.FORGED, f"the signature must fit a key of this receiver ({', '.join(self._keyring.ids)})"
            )
        impersonated = self._impersonated(envelope)
        if impersonated is not None:
            return impersonated
        now = self._clock()
        late = self._late(envelope, now)
        if late is not None:
            return late
        name, digest = _digest(envelope.id), _digest(envelope.espersignature)
        known = self._seen.get(name)
        if known is not None:
            same = hmac.compare_digest(known[1], digest)
            return Reason(Flaw.REPEATED, "this message was accepted before") if same else Reason(
                Flaw.REUSED, "an id stands for one message, and another one had it before"
            )  # fmt: skip
        self._forget(now)
        if len(self._seen) >= self._max_seen:
            return Reason(Flaw.CROWDED, f"at most {self._max_seen} messages in {2 * self._window_s:g} s; send fewer")
        self._seen[name] = (now + 2 * self._window_s, digest)
        return None

    def _impersonated(self, envelope: Envelope) -> Reason | None:
        owner = self._keyring.issuer_of(envelope.esperkeyid)
        if owner is None or not envelope.dataschema.startswith(_ORDERS):
            return None
        try:
            named = repr(wire.read_json(envelope.data, _Issued).issuer)
        except EnvelopeError as error:
            named = str(error)
        if named == repr(owner):
            return None
        rule = f"an order's issuer must be {owner!r}, whose key {envelope.esperkeyid!r} has signed it"
        return Reason(Flaw.IMPERSONATED, f"{rule}, got {named[:200]}")

    def _late(self, envelope: Envelope, now: float) -> Reason | None:
        try:
            age = now - wire.seconds(envelope.time)
            left = None if envelope.esperexpires is None else wire.seconds(envelope.esperexpires) - now
        except EnvelopeError as error:
            return Reason(Flaw.STALE, str(error))
        if abs(age) > self._window_s:
            where = "old" if age > 0 else "ahead"
            return Reason(
                Flaw.STALE,
                f"a message must be at most {self._window_s:g} s old or ahead, got {abs(age):.0f} s {where}; send a "
                "new one, and check both clocks",
            )
        if left is not None and left < 0:
            return Reason(Flaw.EXPIRED, f"a message must not be expired, got one that expired {-left:.0f} s ago")
        return None

    def _forget(self, now: float) -> None:
        """Let go of ids whose messages would be stale by now."""
        while self._seen:
            name, (until, _) = next(iter(self._seen.items()))
            if until > now:
                return
            del self._seen[name]


class _Issued(msgspec.Struct):
    """Of an order only who gives it, as the order itself is read."""

    issuer: str = "operator"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _mac(key: bytes, envelope: Envelope) -> str:
    """Signature of all that ``envelope`` has; ``espersignature`` must be ``None``."""
    head = json.dumps(envelope.header(), sort_keys=True, separators=(",", ":")).encode()
    prefix = b"esper-bus-1\n%d\n" % len(head)
    return hmac.digest(key, b"".join((prefix, head, envelope.data)), "sha256").hex()


def _read(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{KEY_FILE_VARIABLE} names a file of at most {MAX_FILE_BYTES} bytes, got a larger one")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{KEY_FILE_VARIABLE} must name a readable text file, got {path} ({type(error).__name__}); check it"
        ) from None  # a decoding error would carry the file's content
