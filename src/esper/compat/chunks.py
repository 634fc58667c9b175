"""``ChunkManager``: the arithmetic of :mod:`esper.kasmina.chunks` on tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from esper.errors import SiteError
from esper.kasmina.chunks import chunk_bounds


class ChunkManager:
    """Split a layer's output into chunks and put chunks together again; both lose nothing, for any size.

    Chunk ``c`` holds the features ``bounds[c]`` to ``bounds[c + 1] - 1``; sizes differ by at most one. Esper itself
    never splits a tensor: seeds add to the columns of their chunks in place of that.

    Parameters
    ----------
    layer_dim:
        Output features F of the layer.
    num_chunks:
        Chunks C, between 1 and F.
    dim:
        Axis that holds features: the last one, or 1 for the channels of a convolution.

    Raises
    ------
    SiteError
        ``num_chunks`` is less than one or more than ``layer_dim``, or either is no whole number.
    """

    def __init__(self, layer_dim: int, num_chunks: int, *, dim: int = -1) -> None:
        self.layer_dim = layer_dim
        self.num_chunks = num_chunks
        self.dim = dim
        self.bounds = chunk_bounds(layer_dim, num_chunks)
        """``(C + 1,)`` int64."""
        self.sizes: tuple[int, ...] = tuple(int(size) for size in np.diff(self.bounds))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """C views of ``x`` (any dtype, F features on ``dim``). Raises ``SiteError`` for another number of features."""
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not type-check
            raise SiteError(f"what is split must be a tensor, got {type(x).__name__}; pass the layer's own output")
        if not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.layer_dim:
            raise SiteError(
                f"a tensor to be split must have {self.layer_dim} features on axis {self.dim}, got shape "
                f"{tuple(x.shape)}; pass the layer's own output"
            )
        return torch.split(x, list(self.sizes), dim=self.dim)

    def concatenate(self, chunks: Iterable[Tensor]) -> Tensor:
        """What :meth:`split` had split, bit for bit. Raises ``SiteError`` for chunks that are not its chunks."""
        chunks = list(chunks)
        found = tuple(chunk.shape[self.dim] if chunk.dim() else 0 for chunk in chunks)
        if found != self.sizes:
            raise SiteError(
                f"chunks must have the sizes that split() gives them, got {len(found)} with {sum(found)} features for "
                f"{self.num_chunks} with {self.layer_dim}; pass all of them, in order"
            )
        return torch.cat(chunks, dim=self.dim)
