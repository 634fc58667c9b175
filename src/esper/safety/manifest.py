"""The manifest of a checkpoint: what it holds, which files with which hashes, and a seal over itself.

::

    {"seal":"<SHA-256 of the manifest's bytes>","manifest":{"format":"esper-checkpoint","schema":1,...}}

The file is JSON. The seal is checked on the bytes as they are, before anything of it is decoded.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, cast

import msgspec

from esper.errors import StateError
from esper.safety import bounded_json

FORMAT = "esper-checkpoint"
SCHEMA_VERSION = 3
"""Version of what the tree of a checkpoint means; see ``migrations``."""

MAX_BYTES = 16 << 20
MAX_VALUES = 400_000
"""About 30,000 parameter tensors with their optimizer's state; empty lists of this number take some 30 MB."""
MAX_DEPTH = 140
"""A tree may be 64 deep, and a level takes at most two in JSON."""

_MOST = 1 << 62

_HEAD, _MIDDLE, _TAIL = b'{"seal":"', b'","manifest":', b"}\n"
_NAME = re.compile(r"checkpoint-(\d{8,12})(?:\.json|-\d{3,6}\.safetensors)")


class RefusedError(StateError):
    """Not damage, so that an older checkpoint must not silently stand in: of a newer Esper, or of another kind."""


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of tensors."""

    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a checkpoint beside its tensors."""

    format: str
    schema: int
    kind: str
    number: int
    step: int
    written_by: dict[str, str]
    digest: str
    """Of the whole tree, as :func:`esper.safety.tree.digest` has it."""
    files: tuple[StoredFile, ...]
    aliases: dict[str, str]
    """Paths of tensors that are stored under another path."""
    document: Any
    """The tree without its tensors."""


def number_of(name: str) -> int | None:
    """The number of the checkpoint to which a file of this name belongs; ``None`` if it is no checkpoint's file."""
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def manifest_name(number: int) -> str:
    return f"checkpoint-{number:08d}.json"


def tensors_name(number: int, part: int) -> str:
    return f"checkpoint-{number:08d}-{part:03d}.safetensors"


def encode(manifest: Manifest) -> bytes:
    """The manifest's file.

    Raises
    ------
    StateError
        It is too large to be read back.
    """
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    fields["files"] = [msgspec.to_builtins(file) for file in manifest.files]
    body = bounded_json.encode(fields)
    bounded_json.check(body, max_bytes=MAX_BYTES, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def decode(data: bytes, *, number: int) -> Manifest:
    """The manifest of checkpoint ``number``, everything in it checked that can be without its files.

    Raises
    ------
    StateError
        The seal is broken, a field is missing or of another type, it is of a newer Esper, or a file name leads
        elsewhere.
    """
    manifest = _typed(_unsealed(data))
    if manifest.format != FORMAT:
        raise StateError(f"a checkpoint's manifest says {FORMAT!r}, got {manifest.format!r}; it is something else")
    if manifest.number != number:
        raise StateError(f"manifest {number} must carry its own number, got {manifest.number}; it was renamed")
    if not (0 <= manifest.schema <= _MOST and 0 <= manifest.step <= _MOST):
        raise StateError(f"schema and step count from 0, got {manifest.schema} and {manifest.step}; it is damaged")
    if manifest.schema > SCHEMA_VERSION:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.written_by.items()))
        raise RefusedError(
            f"this Esper reads checkpoints of schema up to {SCHEMA_VERSION}, got {manifest.schema} "
            f"(written by {versions}); update: pip install --upgrade esper-morph"
        )
    expected = [tensors_name(number, part) for part in range(len(manifest.files))]
    named = [file.name for file in manifest.files]
    if named != expected:
        wrong = next((name for name in named if name not in expected), "a wrong order")
        raise StateError(f"files of checkpoint {number} are named {expected}, got {wrong!r}; it is damaged or hostile")
    if any(file.bytes < 0 for file in manifest.files):
        raise StateError("sizes of files count from 0, got a negative one; the manifest is damaged")
    return manifest


def _unsealed(data: bytes) -> bytes:
    """The bytes under the seal."""
    start = len(_HEAD) + 64 + len(_MIDDLE)
    seal, body = data[len(_HEAD) : len(_HEAD) + 64], data[start : -len(_TAIL)]
    expected = hashlib.sha256(body).hexdigest().encode()
    if seal != expected or data != _HEAD + seal + _MIDDLE + body + _TAIL:
        raise StateError("a manifest's seal must fit its content, got another; the file is damaged")
    return body


def _typed(body: bytes) -> Manifest:
    fields = bounded_json.decode(body, max_bytes=MAX_BYTES, max_depth=MAX_DEPTH, max_values=MAX_VALUES)
    if not isinstance(fields, dict):
        raise StateError(f"a manifest is an object, got {type(fields).__name__}; it is damaged or hostile")
    named = cast("dict[str, Any]", fields)
    document = named.pop("document", None)
    try:  # the document's integers may be larger than msgspec takes
        return msgspec.structs.replace(msgspec.convert({**named, "document": None}, Manifest), document=document)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:  # ValueError: text that is no Unicode
        raise StateError(f"a manifest must have its fields ({error}); it is damaged or hostile") from error
