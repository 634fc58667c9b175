"""JSON from files that may have been tampered with: size, depth and number of values are checked before decoding.

Decoders build Python objects as they go, and twenty bytes of memory can come from one byte of text; some recurse. So
the text is measured first. Integers of any size are read (a random generator's state has some of 128 bits); NaN and
infinities, which are no JSON, are refused.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from esper.errors import StateError

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OPENING = b"[{"


def encode(value: Any) -> bytes:
    """Compact JSON in ASCII.

    Raises
    ------
    StateError
        Something in ``value`` has no JSON form.
    """
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(
            f"only plain values can be stored ({error}); use str, int, float, bool, lists, dicts"
        ) from error


def decode(data: bytes, *, max_bytes: int, max_depth: int, max_values: int) -> Any:
    """The value that ``data`` says.

    Raises
    ------
    StateError
        It is no JSON, or larger, deeper or of more values than allowed.
    """
    check(data, max_bytes=max_bytes, max_depth=max_depth, max_values=max_values)
    try:
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of too many digits
        raise StateError(f"stored JSON must be readable, got an error ({error}); it is damaged") from error


def check(data: bytes, *, max_bytes: int, max_depth: int, max_values: int) -> None:
    """Refuse what could not be decoded in bounded time and memory."""
    if len(data) > max_bytes:
        raise StateError(f"stored JSON may have at most {max_bytes} bytes, got {len(data)}; it is damaged or hostile")
    if data.count(b'"') > 4 * max_values:  # a key and a text for each value; taking strings out has its price too
        raise StateError(f"stored JSON may have at most {max_values} values, got more text; it is damaged or hostile")
    bare = _STRING.sub(b"", data)
    values = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
    if values > max_values:
        raise StateError(f"stored JSON may have at most {max_values} values, got {values}; it is damaged or hostile")
    depth = 0
    for bracket in bare.translate(None, _ALL_BUT_BRACKETS):
        depth += 1 if bracket in _OPENING else -1
        if depth > max_depth:
            raise StateError(f"stored JSON may be at most {max_depth} deep, got more; it is damaged or hostile")


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
