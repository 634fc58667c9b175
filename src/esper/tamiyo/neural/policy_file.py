"""A policy on a disk: a folder with tensors (safetensors) and a card (JSON) that says what it is; nothing pickled."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from esper.errors import EsperError, StateError
from esper.files import replace_file
from esper.tamiyo import actions, features
from esper.tamiyo.actions import Scope
from esper.tamiyo.features import GLOBAL_COLUMNS, SITE_COLUMNS
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.ranges import Ranges

FORMAT = "esper-policy"
VERSION = 1
"""Raised when a card or the network changes its meaning."""
TENSORS, CARD = "policy.safetensors", "card.json"

SHIPPED = Path(__file__).parent / "shipped"
"""The policy that comes with the package (``benchmarks/controller/ship.py``)."""

_MOST_CARD_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 20
"""What a safetensors file may have besides the tensors."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy is, what it learned from, how it did, and what it is not for."""

    ranges: Ranges
    """Of everything it has seen in training."""
    size: str = "small"
    scope: Scope = Scope()
    data: str = ""
    """Where its experience came from, and how much."""
    hosts: tuple[str, ...] = ()
    """Families of hosts it was trained on."""
    seeds: tuple[int, ...] = ()
    scores: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    limits: tuple[str, ...] = ()
    """What is known not to work, or was not tried."""
    global_columns: tuple[str, ...] = GLOBAL_COLUMNS
    site_columns: tuple[str, ...] = SITE_COLUMNS
    feature_version: int = features.VERSION
    action_version: int = actions.VERSION
    sha256: str = ""
    """Of the tensors' file; filled in by :func:`save`."""
    format: str = FORMAT
    version: int = VERSION


def save(folder: str | Path, policy: Policy, card: Card) -> Card:
    """Write a policy; returns the card as written.

    The card comes last and names the hash of the tensors, so a policy that was cut short is noticed.

    Raises
    ------
    StateError
        The folder cannot be written.
    """
    path = Path(folder)
    tensors = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    data = save_tensors(tensors)
    card = msgspec.structs.replace(card, size=policy.size, sha256=hashlib.sha256(data).hexdigest())
    try:
        path.mkdir(parents=True, exist_ok=True)
        replace_file(path / TENSORS, lambda temporary: temporary.write_bytes(data))
        written = msgspec.json.format(msgspec.json.encode(card), indent=1)
        replace_file(path / CARD, lambda temporary: temporary.write_bytes(written + b"\n"))
    except OSError as error:
        raise StateError(f"a policy needs a folder it can be written to, got {str(path)!r} ({error})") from error
    return card


def load(folder: str | Path) -> tuple[Policy, Card]:
    """Read a policy whose every part holds.

    Raises
    ------
    StateError
        There is none, it is damaged, foreign, or from a newer Esper.
    """
    path = Path(folder)
    card = read_card(path)
    policy = _empty(card, path)
    wanted = policy.state_dict()
    most = sum(value.numel() * value.element_size() for value in wanted.values()) + _MOST_HEADER_BYTES
    data = _read(path / TENSORS, most)
    if hashlib.sha256(data).hexdigest() != card.sha256:
        raise StateError(
            f"{TENSORS} must be the file that {CARD} was written with, got another one in {str(path)!r}; it is damaged "
            "or was mixed up: copy the folder again"
        )
    try:
        tensors = load_tensors(data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StateError(f"{path / TENSORS} must be a safetensors file, got an error ({error})") from error
    _check(tensors, wanted, path)
    policy.load_state_dict(tensors)
    return policy.eval(), card


def read_card(folder: str | Path) -> Card:
    """The card alone, checked.

    Raises
    ------
    StateError
        As :func:`load`.
    """
    path = Path(folder) / CARD
    data = _read(path, _MOST_CARD_BYTES)
    try:
        head: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise StateError(f"{path} must be the card of a policy, got no JSON ({error}); name another folder") from error
    if head.get("format") != FORMAT:
        raise StateError(
            f"{path} must be a card of format {FORMAT!r}, got {head.get('format')!r}; name the folder of a policy that "
            "Esper has written"
        )
    for what, found, known in (
        ("version", head.get("version"), VERSION),
        ("feature version", head.get("feature_version"), features.VERSION),
        ("action version", head.get("action_version"), actions.VERSION),
    ):
        if found != known:
            age = "a newer" if isinstance(found, int) and found > known else "another"
            raise StateError(
                f"a policy's {what} must be {known}, got {found!r} in {path}: it is of {age} Esper; use that one, or "
                "train a policy anew"
            )
    try:
        card = msgspec.convert(head, Card)
    except (msgspec.ValidationError, EsperError) as error:
        raise StateError(f"{path} must hold all of a card, got an error ({error}); it is damaged") from error
    _check_columns(card, path)
    return card


def _check_columns(card: Card, path: Path) -> None:
    for what, found, known, ranges in (
        ("global", card.global_columns, GLOBAL_COLUMNS, card.ranges.world),
        ("site", card.site_columns, SITE_COLUMNS, card.ranges.sites),
    ):
        differing = sorted(set(found) ^ set(known)) or ["another order"]
        if found != known:
            raise StateError(
                f"a policy's {what} columns must be those of this Esper, got {', '.join(differing[:5])} in {path}; "
                "train a policy anew"
            )
        if len(ranges) != len(known):
            raise StateError(f"{path} must hold a range for each of {len(known)} {what} columns, got {len(ranges)}")


def _empty(card: Card, path: Path) -> Policy:
    try:
        return Policy(card.size)
    except EsperError as error:
        raise StateError(f"{path / CARD} must name a known size ({error}); it is of a newer Esper") from error


def _check(tensors: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    odd = sorted(tensors.keys() ^ wanted.keys())
    odd += [
        name
        for name in sorted(tensors.keys() & wanted.keys())
        if tensors[name].shape != wanted[name].shape or tensors[name].dtype != wanted[name].dtype
    ]
    if odd:
        raise StateError(f"{path / TENSORS} must hold this network's tensors, got others ({', '.join(odd[:3])})")
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise StateError(f"a policy's weights must be finite, got some that are not in {name!r} of {path}")


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise StateError(
            f"a policy is a folder with {CARD} and {TENSORS}, got {str(path)!r} that cannot be read ({error}); name "
            "another folder"
        ) from error
    if len(data) > most:
        raise StateError(f"{path} may have at most {most} bytes, got more; it is damaged or foreign")
    return data
