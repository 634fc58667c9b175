"""Tensors as safetensors bytes, in parts of a bounded size, each checked against its hash before it is decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from esper.errors import StateError

PART_BYTES = 256 << 20
"""Tensors are collected into files of about this size, so that one copy of a part is all the memory a save needs. A
tensor that is larger has a file of its own."""


def without_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``(distinct, aliases)``: tensors that are one and the same piece of memory are kept once (tied weights)."""
    distinct: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for path, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise StateError(
                f"a stored tensor is dense and has its data, got {tensor.layout} on {tensor.device} at {path!r}; "
                "store it as dense tensors"
            )
        if tensor.numel() > 0:
            place = (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if first.setdefault(place, path) != path:
                aliases[path] = first[place]
                continue
        distinct[path] = tensor
    return distinct, aliases


def parts(tensors: Mapping[str, Tensor], part_bytes: int = PART_BYTES) -> Iterator[bytes]:
    """Safetensors files one after the other; a tensor comes from its device only for its own part."""
    part: dict[str, Tensor] = {}
    size = 0
    for path, tensor in tensors.items():
        needed = tensor.numel() * tensor.element_size()
        if part and size + needed > part_bytes:
            yield _encoded(part)
            part, size = {}, 0
        part[path] = tensor
        size += needed
    if part:
        yield _encoded(part)


def decoded(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises
    ------
    StateError
        It is not a safetensors file.
    """
    try:
        return load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise StateError(f"{name} must be a safetensors file, got an error ({error}); it is damaged") from error


def put_together(found: Iterable[Mapping[str, Tensor]], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors by path; an alias becomes a tensor of its own.

    Raises
    ------
    StateError
        A path comes twice, or an alias leads nowhere.
    """
    tensors: dict[str, Tensor] = {}
    for part in found:
        if tensors.keys() & part.keys():
            raise StateError(f"a tensor is stored once, got {min(tensors.keys() & part.keys())!r} twice; it is damaged")
        tensors.update(part)
    stored = dict(tensors)
    for path, source in aliases.items():
        if source not in stored or path in stored:
            raise StateError(f"tensor {path!r} must stand for a stored one, got {source!r}; the manifest is damaged")
        tensors[path] = stored[source].clone()
    return tensors


def _encoded(tensors: Mapping[str, Tensor]) -> bytes:
    """Row-major copies, none of which shares memory with another."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for path, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.numel() * value.element_size() or storage.data_ptr() in storages:
            value = value.clone(memory_format=torch.contiguous_format)
        storages.add(value.untyped_storage().data_ptr())
        plain[path] = value
    try:
        return save(plain)
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise StateError(f"every tensor must have a form in safetensors, got an error ({error}); convert it") from error
