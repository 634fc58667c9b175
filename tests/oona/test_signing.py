"""Only who has a key is listened to, only once, and only in time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import ConfigError, EnvelopeError
from esper.oona import envelope as wire
from esper.oona.envelope import Envelope
from esper.oona.signing import Flaw, Keyring, Verifier, _Issued
from esper.protocol import ORDER_SCHEMA, Order, Pause

pytestmark = pytest.mark.unit

OLD, NEW = "o" * 40, "n" * 40
NOW = 1_800_000_000.0


def an_envelope(**changes: Any) -> Envelope:
    plain = Envelope(
        id="1", source="esper/desk", type="esper.order", dataschema="esper:order:1", time=wire.timestamp(NOW),
        subject="grown-seed0", esperrun="digits-01", esperexpires=wire.timestamp(NOW + 30), traceparent="00-1-1-01",
        extensions={"sequence": "7"}, data=b'{"command":{"type":"stop"}}',
    )  # fmt: skip
    return msgspec.structs.replace(plain, **changes)


def flaw(verifier: Verifier, envelope: Envelope) -> Flaw | None:
    reason = verifier.check(envelope)
    return None if reason is None else reason.flaw


def test_what_was_signed_is_accepted_once() -> None:
    keys = Keyring({"a": NEW})
    verifier = Verifier(keys, clock=lambda: NOW)
    signed = wire.decode(wire.encode(keys.sign(an_envelope())))
    assert flaw(verifier, signed) is None
    again = verifier.check(signed)
    assert again is not None
    assert (again.flaw, again.is_authentic) == (Flaw.REPEATED, True)
    assert flaw(verifier, keys.sign(an_envelope(data=b"{}"))) is Flaw.REUSED
    assert flaw(verifier, keys.sign(an_envelope(id="2"))) is None


def test_without_a_signature_or_with_another_key_nothing_is_accepted() -> None:
    verifier = Verifier(Keyring({"a": NEW}), clock=lambda: NOW)
    unsigned = verifier.check(an_envelope())
    assert unsigned is not None
    assert (unsigned.flaw, unsigned.is_authentic) == (Flaw.UNSIGNED, False)
    assert flaw(verifier, Keyring({"a": OLD}).sign(an_envelope())) is Flaw.FORGED
    assert flaw(verifier, Keyring({"b": NEW}).sign(an_envelope())) is Flaw.FORGED
    assert flaw(verifier, an_envelope(esperkeyid="a", espersignature="")) is Flaw.FORGED
    assert flaw(verifier, an_envelope(esperkeyid="nobody", espersignature="0" * 64)) is Flaw.FORGED
    assert verifier.num_seen == 0


def test_keys_change_one_after_the_other() -> None:
    before, both, after = Keyring.of(f"old:{OLD}"), Keyring.of(f"new:{NEW}\nold:{OLD}"), Keyring.of(f"new:{NEW}")
    assert both.is_signed(before.sign(an_envelope()))
    assert both.sign(an_envelope()).esperkeyid == "new"
    assert after.is_signed(both.sign(an_envelope()))
    assert not after.is_signed(before.sign(an_envelope()))


@pytest.mark.parametrize(
    ("age_s", "expected"),
    [(0, None), (59, None), (-59, None), (61, Flaw.STALE), (-61, Flaw.STALE), (31, Flaw.EXPIRED)],
)
def test_messages_are_fresh_on_either_side_of_the_clock(age_s: float, expected: Flaw | None) -> None:
    keys = Keyring({"a": NEW})
    lasting = 30 if expected is Flaw.EXPIRED else 1000
    sent = keys.sign(an_envelope(esperexpires=wire.timestamp(NOW + lasting)))
    assert flaw(Verifier(keys, clock=lambda: NOW + age_s), sent) is expected


@pytest.mark.parametrize("times", [{"time": "soon"}, {"time": "2026-01-01T00:00:00"}, {"esperexpires": "never"}])
def test_a_time_that_is_none_is_stale(times: dict[str, str]) -> None:
    keys = Keyring({"a": NEW})
    assert flaw(Verifier(keys, clock=lambda: NOW), keys.sign(an_envelope(**times))) is Flaw.STALE


def test_ids_are_forgotten_when_their_messages_are_stale_and_not_before() -> None:
    keys, now = Keyring({"a": NEW}), [NOW]
    verifier = Verifier(keys, max_seen=2, clock=lambda: now[0])
    ahead = keys.sign(an_envelope(id="ahead", time=wire.timestamp(NOW + 59), esperexpires=None))
    assert flaw(verifier, ahead) is None
    assert flaw(verifier, keys.sign(an_envelope(id="2"))) is None
    assert flaw(verifier, keys.sign(an_envelope(id="3"))) is Flaw.CROWDED  # refused, not forgotten
    now[0] = NOW + 118  # the first message would still be fresh
    assert flaw(verifier, ahead) is Flaw.REPEATED
    now[0] = NOW + 121
    later = keys.sign(an_envelope(id="4", time=wire.timestamp(now[0]), esperexpires=None))
    assert flaw(verifier, later) is None
    assert verifier.num_seen == 1


_SIGNED = wire.encode(Keyring({"a": NEW}).sign(an_envelope()))


def _mutated(value: bytes, edits: list[tuple[int, int, int]]) -> bytes:
    changed = bytearray(value)
    for kind, place, byte in edits:
        at = place % len(changed)
        if kind == 0:
            changed[at] = byte
        elif kind == 1:
            changed.insert(at, byte)
        elif kind == 2:
            del changed[at]
        else:
            changed[at] ^= 1 << byte % 8
    return bytes(changed)


def _check_mutation(edits: list[tuple[int, int, int]]) -> None:
    try:
        read = wire.decode(_mutated(_SIGNED, edits))
    except EnvelopeError:
        return
    verifier = Verifier(Keyring({"a": NEW}), clock=lambda: NOW)
    # Bytes may differ where the message does not (a space in the JSON).
    assert (verifier.check(read) is None) == (read == wire.decode(_SIGNED))


def test_ten_thousand_mutations_are_refused() -> None:
    rng = random.Random(0)
    for _ in range(10_000):
        _check_mutation([(rng.randrange(4), rng.randrange(2000), rng.randrange(256)) for _ in range(rng.randint(1, 3))])


_EDIT = st.tuples(st.integers(0, 3), st.integers(0, 2000), st.integers(0, 255))


@given(st.lists(_EDIT, min_size=1, max_size=8))
def test_mutations_are_refused(edits: list[tuple[int, int, int]]) -> None:
    _check_mutation(edits)


@pytest.mark.long
@settings(max_examples=10_000)
@given(st.lists(_EDIT, min_size=1, max_size=8))
def test_ten_thousand_searched_mutations_are_refused(edits: list[tuple[int, int, int]]) -> None:
    _check_mutation(edits)


_TEXT = st.text(max_size=12)


@given(st.sampled_from([n for n in Envelope.__struct_fields__ if n not in ("extensions", "data")]), _TEXT)
def test_every_attribute_is_signed(name: str, text: str) -> None:
    keys = Keyring({"a": NEW})
    signed = keys.sign(an_envelope())
    changed = msgspec.structs.replace(signed, **{name: text})
    assert keys.is_signed(changed) == (changed == signed)
    assert not keys.is_signed(msgspec.structs.replace(signed, extensions={"sequence": "8"}))
    assert not keys.is_signed(msgspec.structs.replace(signed, data=b""))


def test_parts_cannot_be_moved_between_header_and_data() -> None:
    keys = Keyring({"a": NEW})
    signed = keys.sign(an_envelope(data=b"ab"))
    assert not keys.is_signed(msgspec.structs.replace(signed, extensions={}, data=b'{"sequence":"7"}ab'))


@pytest.mark.parametrize(
    "text", ["short", f"a:{NEW} a:{OLD}", f"a:{NEW} {OLD}", f"a b:{NEW}", f"ä:{NEW}", f"a:{NEW},b:short"]
)
def test_keys_of_another_form_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Keyring.of(text)
    shown = repr(caught.value) + str(caught.value.__cause__) + str(caught.value.__context__)
    assert not any(secret in shown for secret in (NEW, OLD, "short"))


def test_keys_come_from_the_environment_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"new:{NEW}\nold:{OLD}\n")
    assert Keyring.from_environment({}) is None
    lone = Keyring.from_environment({"ESPER_BUS_KEY": NEW})
    assert lone is not None
    assert lone.ids == ("default",)
    both = Keyring.from_environment({"ESPER_BUS_KEY_FILE": str(file)})
    assert both is not None
    assert both.ids == ("new", "old")
    with pytest.raises(ConfigError, match="one place"):
        Keyring.from_environment({"ESPER_BUS_KEY": NEW, "ESPER_BUS_KEY_FILE": str(file)})
    with pytest.raises(ConfigError, match="readable text file"):
        Keyring.from_environment({"ESPER_BUS_KEY_FILE": str(tmp_path / "none")})
    file.write_bytes(b"\xff" + NEW.encode())
    with pytest.raises(ConfigError, match="readable text file") as caught:
        Keyring.from_environment({"ESPER_BUS_KEY_FILE": str(file)})
    assert caught.value.__cause__ is None
    file.write_bytes(bytes(70_000))
    with pytest.raises(ConfigError, match="a larger one"):
        Keyring.from_environment({"ESPER_BUS_KEY_FILE": str(file)})


def test_secrets_are_shown_nowhere() -> None:
    keys = Keyring.of(f"new@*:{NEW}\nold@*:{OLD}")
    verifier = Verifier(keys, clock=lambda: NOW)
    reasons = [
        verifier.check(an_envelope()), verifier.check(Keyring({"new": "x" * 40}).sign(an_envelope())),
        verifier.check(keys.sign(an_envelope(time="x"))),
    ]  # fmt: skip
    signed = keys.sign(an_envelope())
    shown = "".join(map(str, [keys, repr(keys), verifier, *reasons, signed, wire.describe(wire.encode(signed))]))
    assert NEW not in shown
    assert OLD not in shown


@pytest.mark.parametrize("wrong", [{"window_s": 0}, {"window_s": float("nan")}, {"max_seen": 0}])
def test_a_window_has_a_size(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        Verifier(Keyring({"a": NEW}), **wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Whose a key is

ADA, BOB, ALL = "a" * 32, "b" * 32, "c" * 32
RING = f"ada:{ADA} ada-2@ada:{NEW} bob:{BOB} night@*:{ALL}"


def an_order_of(issuer: str | None, **fields: Any) -> Envelope:
    plain = {"command": {"type": "pause"}, "id": "1", "issuer": issuer}
    data = json.dumps({name: value for name, value in plain.items() if value is not None}).encode()
    return an_envelope(**{"dataschema": ORDER_SCHEMA, "data": data, **fields})


@pytest.mark.parametrize(
    ("signs", "issuer", "expected"),
    [
        ("ada:" + ADA, "ada", None), ("ada-2@ada:" + NEW, "ada", None), ("bob:" + BOB, "bob", None),
        ("night@*:" + ALL, "anybody", None), ("night@*:" + ALL, "ada", None),
        ("bob:" + BOB, "ada", Flaw.IMPERSONATED), ("ada-2@ada:" + NEW, "ada-2", Flaw.IMPERSONATED),
        ("ada:" + ADA, "Ada", Flaw.IMPERSONATED), ("ada:" + ADA, "", Flaw.IMPERSONATED),
        ("ada:" + ADA, None, Flaw.IMPERSONATED),
        # what the sender says of his own key counts for nothing
        ("bob@ada:" + BOB, "ada", Flaw.IMPERSONATED), ("ada@*:" + ADA, "bob", Flaw.IMPERSONATED),
    ],
)  # fmt: skip
def test_an_order_names_the_issuer_whose_key_has_signed_it(signs: str, issuer: str | None, expected: Any) -> None:
    verifier = Verifier(Keyring.of(RING), clock=lambda: NOW)
    reason = verifier.check(Keyring.of(signs).sign(an_order_of(issuer)))
    assert (reason and reason.flaw) is expected
    if reason is not None:
        assert not reason.is_authentic and verifier.num_seen == 0
        assert not any(secret in str(reason) for secret in (ADA, BOB, ALL, NEW))


def test_who_gives_an_order_is_read_as_the_order_is() -> None:
    verifier, bob = Verifier(Keyring.of(RING), clock=lambda: NOW), Keyring.of(f"bob:{BOB}")
    for number, names in enumerate((b'"issuer":"bob","issuer":"ada"', b'"issuer":"ada","issuer":"bob"')):
        data = b'{"command":{"type":"pause"},' + names + b"}"
        envelope = an_order_of(None, data=data, id=str(number))
        is_bobs = msgspec.json.decode(data, type=Order).issuer == "bob"
        assert (verifier.check(bob.sign(envelope)) is None) == is_bobs
    assert Order(command=Pause()).issuer == _Issued().issuer
    for data in (b"", b"[]", b'{"issuer":1}', b"[" * 5000, b'{"issuer":"\xff"}'):
        assert flaw(verifier, bob.sign(an_order_of(None, data=data))) is Flaw.IMPERSONATED
    assert flaw(verifier, bob.sign(an_order_of("ada", dataschema="esper:order:2", id="8"))) is Flaw.IMPERSONATED
    assert flaw(verifier, bob.sign(an_envelope(id="9", dataschema="esper:health:1"))) is None, (
        "what is no order names nobody"
    )


def test_who_signs_is_who_issues() -> None:
    assert Keyring.of(f"ada:{ADA} bob:{BOB}").issuer(None, "operator") == "ada"
    assert Keyring.of(f"ada-2@ada:{ADA}").issuer("ada", "operator") == "ada"
    shared = Keyring.of(ALL)
    assert (shared.issuer(None, "operator"), shared.issuer("eve", "operator")) == ("operator", "eve")
    with pytest.raises(ConfigError, match="must be 'ada', whose key 'ada-2' signs it, got 'bob'") as caught:
        Keyring.of(f"ada-2@ada:{ADA}").issuer("bob", "operator")
    assert ADA not in str(caught.value)
    for text in (f"ada@:{ADA}", f"ada@b@c:{ADA}", f"ada@**:{ADA}", f"@ada:{ADA}"):
        with pytest.raises(ConfigError, match="of another form"):
            Keyring.of(text)
