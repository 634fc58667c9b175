"""NumPy arrays as safetensors bytes. What comes from outside is measured before it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import load, save

from esper.errors import EnvelopeError, StateError
from esper.oona import envelope as wire
from esper.safety import bounded_json

Array = npt.NDArray[Any]
T = TypeVar("T")

MAX_HEAD_BYTES = 64 << 10
MAX_ARRAYS = 64
HEAD = "head"
"""The array of bytes that holds everything that is no array, as JSON."""


def pack(head: Any, arrays: Mapping[str, Array]) -> bytes:
    """Safetensors bytes of ``arrays``, with ``head`` as JSON among them.

    Raises
    ------
    EnvelopeError
        Something has no form there.
    """
    text = np.frombuffer(wire.write_json(head), dtype=np.uint8)
    try:
        return save({HEAD: text, **{name: np.ascontiguousarray(array) for name, array in arrays.items()}})
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise EnvelopeError(f"arrays must have a form in safetensors ({error})") from error


def unpack(data: bytes, kind: type[T]) -> tuple[T, dict[str, Array]]:
    """The head as ``kind``, and the arrays.

    Raises
    ------
    EnvelopeError
        They are not what :func:`pack` writes, or the header is larger than it may be.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEAD_BYTES, len(data) - 8):
        raise EnvelopeError(f"arrays must begin with a header of at most {MAX_HEAD_BYTES} bytes, got {size}")
    try:
        bounded_json.check(data[8 : 8 + size], max_bytes=MAX_HEAD_BYTES, max_depth=4, max_values=8 * MAX_ARRAYS)
        arrays = load(data)
    except StateError as error:
        raise EnvelopeError(f"the header of arrays must be readable ({error})") from error
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise EnvelopeError(f"arrays must be safetensors ({type(error).__name__}: {error})") from error
    head = arrays.pop(HEAD, None)
    if head is None or head.dtype != np.uint8 or head.ndim != 1:
        raise EnvelopeError(f"arrays must have {HEAD!r}, a row of bytes, among them")
    return wire.read_json(head.tobytes(), kind), arrays


def take(arrays: Mapping[str, Array], name: str, dtype: type[np.generic], shape: tuple[int | None, ...]) -> Array:
    """The array ``name``, of that type and shape (``None``: any size).

    Raises
    ------
    EnvelopeError
        It is missing or another.
    """
    array = arrays.get(name)
    fits = array is not None and array.dtype == dtype and array.ndim == len(shape)
    if array is None or not fits or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        got = "none" if array is None else f"{array.dtype} {array.shape}"
        raise EnvelopeError(f"array {name!r} must be {np.dtype(dtype)} of shape {shape}, got {got}")
    return array
