"""Chunks: contiguous slices of a site's output features, the unit of telemetry, targeting and embargo.

Slices follow :func:`numpy.array_split` and :func:`torch.tensor_split`: the first ``num_features % num_chunks`` of them
are one feature longer, so that splitting and concatenating loses nothing for any size.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esper.errors import SiteError

MAX_DEFAULT_CHUNKS = 1024
"""Chunks a site gets when the user names no number; more than that must be asked for."""


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, Python's or numpy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_whole(name: str, value: object) -> None:
    """Raise :class:`~esper.errors.SiteError` unless ``value`` is a whole number."""
    if not is_whole(value):
        raise SiteError(f"{name} must be a whole number, got {value!r}; pass an int")


def default_num_chunks(num_features: int) -> int:
    """One chunk a feature, up to 1,024.

    Raises
    ------
    SiteError
        ``num_features`` is less than one.
    """
    _check_features(num_features)
    return min(num_features, MAX_DEFAULT_CHUNKS)


def chunk_bounds(num_features: int, num_chunks: int) -> npt.NDArray[np.int64]:
    """Where each chunk begins and ends.

    Returns
    -------
    ``(num_chunks + 1,)`` int64, from 0 to ``num_features``, strictly increasing: chunk ``c`` holds the features
    ``bounds[c]`` to ``bounds[c + 1] - 1``. Sizes differ by at most one.

    Raises
    ------
    SiteError
        ``num_chunks`` is less than one or more than ``num_features``, or either is no whole number.
    """
    _check_features(num_features)
    check_whole("chunks", num_chunks)
    if not 1 <= num_chunks <= num_features:
        raise SiteError(
            f"chunks must be between 1 and out_features={num_features}, got {num_chunks}; "
            f"pass chunks={num_features} for one chunk a feature"
        )
    size, longer = divmod(num_features, num_chunks)
    index = np.arange(num_chunks + 1, dtype=np.int64)
    return index * size + np.minimum(index, longer)


def columns_of(bounds: npt.NDArray[np.int64], chunk_indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Feature columns of some chunks, in the order in which the chunks are given.

    Parameters
    ----------
    bounds:
        ``(C + 1,)`` int64 from :func:`chunk_bounds`.
    chunk_indices:
        ``(K,)`` integers in ``0 .. C - 1``.

    Returns
    -------
    ``(F,)`` int64, where F is the sum of the chunks' sizes.

    Raises
    ------
    SiteError
        An index is not an integer or lies outside the site's chunks.
    """
    chunks = np.asarray(chunk_indices).reshape(-1)
    if chunks.size == 0:
        return np.zeros(0, dtype=np.int64)
    num_chunks = len(bounds) - 1
    if chunks.dtype.kind not in "iu":
        raise SiteError(f"chunk indices must be integers, got {chunks.dtype}; use np.flatnonzero on a mask")
    outside = (chunks < 0) | (chunks >= num_chunks)
    if outside.any():
        raise SiteError(
            f"chunk indices must be between 0 and {num_chunks - 1}, got {int(chunks[outside][0])}; "
            f"the site has {num_chunks} chunks"
        )
    first = bounds[chunks]
    sizes = bounds[chunks + 1] - first
    ends = np.cumsum(sizes)
    # Each chunk's columns count on from its own first one: shift a single arange chunk by chunk.
    return np.repeat(first - (ends - sizes), sizes) + np.arange(ends[-1], dtype=np.int64)


def _check_features(num_features: int) -> None:
    check_whole("out_features", num_features)
    if num_features < 1:
        raise SiteError(f"out_features must be at least 1, got {num_features}; a site needs an output to be split")
