"""State as a tree: nested plain values with tensors and arrays at the leaves, split into JSON and named tensors.

This is the one form in which anything of a run is kept: snapshots in memory, checkpoints on disk, and the hash that
proves a restore. Dictionaries with any plain keys, lists and tuples (kept apart), ``None``, booleans, integers, floats
(not-a-number and infinities too), strings, bytes, ``torch.Tensor`` and ``numpy.ndarray``. Nothing else: a class would
have to be imported to be read back, and a checkpoint must never cause an import.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from esper.errors import StateError

Tree = Any
"""A value as described above."""

_MARK = "$"
"""The key that tells an encoded node from a plain dictionary."""
MAX_DEPTH = 64
_DTYPE = re.compile(r"[<>|=]?[?biufcmMSUV]\d{0,9}(\[\w{1,9}\])?")
"""NumPy has dtypes that are small programs; those of a stored array are one number each."""


def split(tree: Tree) -> tuple[Any, dict[str, Tensor]]:
    """``(document, tensors)``: what JSON can say, and the tensors by the path at which they hang.

    Tensors are not copied. Arrays come as flat uint8 tensors over their own memory; their dtype and shape are in the
    document.

    Raises
    ------
    StateError
        A value of another type (its path is named), or a tree deeper than 64.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, "", tensors, 0), tensors


def join(document: Any, tensors: Mapping[str, Tensor]) -> Tree:
    """The tree that :func:`split` has taken apart; arrays are copied, tensors are those given.

    Raises
    ------
    StateError
        The document is not one that :func:`split` writes, or a tensor is missing, unused or does not fit.
    """
    left = dict(tensors)
    tree = _decode(document, "", left, 0)
    if left:
        raise StateError(f"every stored tensor must have its place, got {len(left)} without one ({min(left)}...)")
    return tree


def digest(tree: Tree) -> str:
    """SHA-256 of a tree: equal exactly when types, structure, dtypes, shapes and every bit are equal.

    The device of a tensor does not count; the order of a dictionary does (an optimizer's state has one).
    """
    total = hashlib.sha256()
    document, tensors = split(tree)
    for part in _canonical(document):
        total.update(part)
    for name, tensor in tensors.items():
        value = tensor.detach()
        total.update(f"|{name}:{value.dtype}:{tuple(value.shape)}:".encode("utf-8", "surrogatepass"))
        total.update(tensor_bytes(value))
    return total.hexdigest()


def copy_of(tree: Tree, place: Callable[[Tensor], Tensor] | None = None) -> Tree:
    """A tree that shares no memory with ``tree``; ``place`` copies a tensor (by default: to where it is)."""
    copied = place or _clone
    document, tensors = split(tree)
    arrays = _names_of_arrays(document)
    return join(document, {n: t.clone() if n in arrays else copied(t.detach()) for n, t in tensors.items()})


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, whatever its dtype or device."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def _below(path: str, key: object) -> str:
    """A path as in JSON pointers (RFC 6901): a key may hold a slash."""
    return f"{path}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.preserve_format)


def _encode(value: Tree, path: str, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise StateError(f"a state may be at most {MAX_DEPTH} deep, got more at {path!r}; flatten it")
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_MARK: "float", "v": repr(value)}
    if isinstance(value, bytes):
        return {_MARK: "bytes", "v": value.hex()}
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_MARK: "tensor", "v": path}
    if isinstance(value, np.ndarray):
        return _encode_array(cast("np.ndarray[Any, Any]", value), path, tensors)
    if isinstance(value, list | tuple):
        items = cast("list[Tree] | tuple[Tree, ...]", value)
        parts = [_encode(item, f"{path}/{number}", tensors, depth + 1) for number, item in enumerate(items)]
        return parts if isinstance(value, list) else {_MARK: "tuple", "v": parts}
    if isinstance(value, dict):
        return _encode_dict(cast("dict[Any, Tree]", value), path, tensors, depth)
    raise StateError(
        f"a state holds plain values, tensors and arrays, got {type(value).__name__} at {path or '/'!r}; "
        "let its owner's state_dict() return plain values"
    )


def _encode_array(value: np.ndarray[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    if value.dtype.hasobject or value.dtype.names is not None:
        raise StateError(f"an array in a state holds numbers, got dtype {value.dtype} at {path!r}; use plain lists")
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    tensors[path] = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
    return {_MARK: "array", "v": path, "dtype": value.dtype.str, "shape": list(value.shape)}


def _encode_dict(value: dict[Any, Tree], path: str, tensors: dict[str, Tensor], depth: int) -> Any:
    for key in value:
        if not (key is None or isinstance(key, bool | str | bytes) or type(key) in (int, float)):
            raise StateError(f"a key in a state is a plain value, got {type(key).__name__} at {path or '/'!r}")
    parts = {key: _encode(item, _below(path, key), tensors, depth + 1) for key, item in value.items()}
    if all(isinstance(key, str) for key in value) and _MARK not in value:
        return parts
    names = [_below(path, key) for key in value]
    if len(set(names)) < len(names):
        raise StateError(f"keys in a state must differ as text too, got {path!r} with one twice (1 and '1'?)")
    return {_MARK: "dict", "v": [[_encode(key, path, {}, depth + 1), part] for key, part in parts.items()]}


def _decode(document: Any, path: str, left: dict[str, Tensor], depth: int) -> Tree:
    if depth > 2 * MAX_DEPTH:
        raise StateError(f"a stored state may be at most {MAX_DEPTH} deep, got more at {path!r}")
    if document is None or isinstance(document, bool | str | int | float):
        return document
    if isinstance(document, list):
        return [_decode(item, f"{path}/{i}", left, depth + 1) for i, item in enumerate(cast("list[Any]", document))]
    if not isinstance(document, dict):
        raise StateError(f"a stored state is made of JSON's types, got {type(document).__name__} at {path!r}")
    node = cast("dict[str, Any]", document)
    if _MARK not in node:
        return {key: _decode(item, _below(path, key), left, depth + 1) for key, item in node.items()}
    kind, value = node[_MARK], node.get("v")
    decode = _DECODERS.get(kind) if isinstance(kind, str) else None
    if decode is None:
        raise StateError(f"a stored node is one of {', '.join(sorted(_DECODERS))}, got {kind!r} at {path!r}")
    try:
        return decode(node, value, path, left, depth)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"the stored {kind} at {path!r} cannot be read ({error}); it is damaged") from error


def _decode_float(node: dict[str, Any], value: Any, path: str, left: dict[str, Tensor], depth: int) -> float:
    if value not in ("nan", "inf", "-inf"):
        raise StateError(f"a stored float is nan, inf or -inf, got {value!r} at {path!r}")
    return float(value)


def _decode_bytes(node: dict[str, Any], value: Any, path: str, left: dict[str, Tensor], depth: int) -> bytes:
    return bytes.fromhex(value)


def _decode_tuple(node: dict[str, Any], value: Any, path: str, left: dict[str, Tensor], depth: int) -> tuple[Tree, ...]:
    if not isinstance(value, list):
        raise StateError(f"a stored tuple has a list of items, got {type(value).__name__} at {path!r}")
    items = cast("list[Any]", value)
    return tuple(_decode(item, f"{path}/{number}", left, depth + 1) for number, item in enumerate(items))


def _decode_dict(node: dict[str, Any], value: Any, path: str, left: dict[str, Tensor], depth: int) -> dict[Any, Tree]:
    pairs = [(_decode(key, path, {}, depth + 1), item) for key, item in value]
    return {key: _decode(item, _below(path, key), left, depth + 1) for key, item in pairs}


def _decode_tensor(node: dict[str, Any], value: Any, path: str, left: dict[str, Tensor], depth: int) -> Tensor:
    return _taken(value, path, left)


def _decode_array(
    node: dict[str, Any], value: Any, path: str, left: dict[str, Tensor], depth: int
) -> np.ndarray[Any, Any]:
    if not isinstance(node["dtype"], str) or not _DTYPE.fullmatch(node["dtype"]):
        raise StateError(f"a stored array holds numbers, got dtype {node['dtype']!r} at {path!r}; it is damaged")
    dtype = np.dtype(node["dtype"])
    return np.frombuffer(bytes(tensor_bytes(_taken(value, path, left))), dtype=dtype).reshape(node["shape"]).copy()


_DECODERS: dict[str, Callable[[dict[str, Any], Any, str, dict[str, Tensor], int], Tree]] = {
    "float": _decode_float,
    "bytes": _decode_bytes,
    "tuple": _decode_tuple,
    "dict": _decode_dict,
    "tensor": _decode_tensor,
    "array": _decode_array,
}


def _taken(name: Any, path: str, left: dict[str, Tensor]) -> Tensor:
    if name != path or name not in left:
        raise StateError(f"the tensor of {path!r} must be stored once under that name, got {name!r}; it is damaged")
    return left.pop(name)


def _names_of_arrays(document: Any) -> set[str]:
    found: set[str] = set()
    waiting = [document]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += cast("list[Any]", node)
        elif isinstance(node, dict):
            entries = cast("dict[str, Any]", node)
            if entries.get(_MARK) == "array":
                found.add(entries["v"])
            waiting += entries.values()
    return found


def _canonical(document: Any) -> Iterator[bytes]:
    """Every value with its type and length, so that no two documents read the same."""
    if isinstance(document, dict):
        entries = cast("dict[str, Any]", document)
        yield f"d{len(entries)}:".encode()
        for key, value in entries.items():
            yield from _canonical(key)
            yield from _canonical(value)
    elif isinstance(document, list):
        items = cast("list[Any]", document)
        yield f"l{len(items)}:".encode()
        for item in items:
            yield from _canonical(item)
    else:
        text = document.hex() if isinstance(document, float) else repr(document)
        yield f"{type(document).__name__}{len(text)}:{text}".encode()
